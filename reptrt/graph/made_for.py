"""The runtime that an INT8 file was made for, kept in the net's metadata.

A file without an entry was made for TensorRT, or not by reptrt.
"""

import onnx

from reptrt.core.choices import TargetName
from reptrt.graph.net import Net

KEY = "reptrt.target"


def record_target(net: Net, target: TargetName) -> None:
    """Record the target of a net; TensorRT, the default, leaves no entry."""
    if target != "tensorrt":
        net.metadata[KEY] = target


def recorded_target(model: onnx.ModelProto) -> str | None:
    """Return the target that a model names, or None."""
    return next((entry.value for entry in model.metadata_props if entry.key == KEY), None)
