"""The runtime that an INT8 file was made for.

The net's metadata name it, except TensorRT, which the options in the file's sidecar name. A file
without either was made for TensorRT by an older version, or not by reptrt.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from reptrt.core.artifacts import read_sidecar
from reptrt.core.choices import TargetName
from reptrt.graph.model import Network, is_engine, proto_of
from reptrt.graph.net import Net

KEY = "reptrt.target"


def record_target(net: Net, target: TargetName) -> None:
    """Record the target of a net; TensorRT, the default, leaves no entry."""
    if target != "tensorrt":
        net.metadata[KEY] = target


def recorded_target(model: onnx.ModelProto) -> str | None:
    """Return the target that a model names, or None."""
    return next((entry.value for entry in model.metadata_props if entry.key == KEY), None)


def target_of(network: Network, options: Mapping[str, Any] | None = None) -> str | None:
    """Return the runtime that a network was made for; None: not known, or it is float.

    Args:
        network: a file of any kind, or a model in memory.
        options: of the calibration that made a model in memory; None: not known.

    Raises:
        ArtifactError: the file cannot be read, or is not the one its sidecar was written for.
    """
    if is_engine(network):
        return "tensorrt"
    if isinstance(network, Path) and not network.is_file():
        return None
    if (target := recorded_target(proto_of(network))) is not None:
        return target
    path = network if isinstance(network, Path) else network.path
    sidecar = None if path is None else read_sidecar(path)
    if sidecar is not None and sidecar.artifact == "int8-onnx":
        options = sidecar.options
    return None if options is None else str(options.get("target", "tensorrt"))
