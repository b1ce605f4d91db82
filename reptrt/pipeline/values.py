"""What stages make, as values: a network in memory that can be run, judged, passed on and saved."""

import functools
import hashlib
import html
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from reptrt.core.arrays import AnyArray
from reptrt.core.artifacts import (
    ONNX_SUFFIXES,
    read_sidecar,
    require_folder,
    require_suffix,
    write_artifact,
)
from reptrt.core.errors import ConfigError, option
from reptrt.data.dataset import open_dataset
from reptrt.data.from_user import images_from
from reptrt.execute.runner import OrtRunner, outputs_in_parts
from reptrt.graph.model import Model
from reptrt.graph.net import Net, bytes_from_model, model_from_net
from reptrt.pipeline.reports import CalibrateReport, ExportReport

Batch = TypeVar("Batch", AnyArray, torch.Tensor)

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_BATCH = 64  # images at a time


@dataclass(frozen=True, slots=True)
class Origin:
    """What the sidecar of a file will say of it."""

    artifact: str  # "float-onnx" or "int8-onnx"
    parents: Mapping[str, str]  # name -> sha256, hex
    options: Mapping[str, Any]  # what the stage was asked for
    details: Mapping[str, Any]  # what the stage found


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Made(Model):
    """A network that a stage made.

    Every function of reptrt that takes the path of an ONNX file takes it too.
    """

    origin: Origin

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the ONNX file and its sidecar, whole or not at all; return the path.

        Raises:
            ConfigError: ``path`` is not a path.
            ArtifactError: the name does not end in .onnx, the folder does not exist, or the disk
                refused the bytes.
        """
        if not isinstance(path, str | os.PathLike):
            raise ConfigError(f"{option('path')}: got {type(path).__name__}, expected a path")
        path = Path(path)
        require_folder(path)
        require_suffix(path, ONNX_SUFFIXES, "a network")
        write_artifact(
            path,
            bytes_from_model(self.proto),
            artifact=self.origin.artifact,
            parents=self.origin.parents,
            options=self.origin.options,
            details=self.origin.details,
        )
        return path

    def __call__(self, images: Batch) -> Batch | tuple[Batch, ...]:
        """Run images through the network in onnxruntime on the CPU.

        An INT8 network computes with the codes of INT8 kernels: this is the simulation of its
        engine.

        Args:
            images: an array or tensor (N, C, H, W) or (N, H, W, C); uint8 pixels are prepared as
                the network says, floats are its input already.

        Returns:
            The output, in the type of ``images`` (array or tensor); a tuple if there are several.
            An output whose first axis is not the batch is the one of the last images.

        Raises:
            DataError: the images do not fit the network.
        """
        arrays = images_from(images, labels=False)
        dataset = open_dataset(arrays, self.preprocess)
        parts: dict[str, list[AnyArray]] = {name: [] for name in self._runner.output_names}
        for batch in dataset.batches(_BATCH):
            for outputs in outputs_in_parts(self._runner, batch):
                for name, output in outputs.items():
                    parts[name].append(output)
        results: list[Any] = [_joined(part, dataset.length) for part in parts.values()]
        if isinstance(images, torch.Tensor):
            results = [torch.from_numpy(result).to(images.device) for result in results]
        return results[0] if len(results) == 1 else tuple(results)

    @functools.cached_property
    def _runner(self) -> OrtRunner:
        return OrtRunner(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields; the session of onnxruntime is opened again where it is needed."""
        return {name: value for name, value in vars(self).items() if name != "_runner"}

    def __repr__(self) -> str:
        graph = self.proto.graph
        constants = {constant.name for constant in graph.initializer}
        image = next(value for value in graph.input if value.name not in constants)
        sizes = image.type.tensor_type.shape.dim[1:]
        size = "x".join(str(dim.dim_value or "?") for dim in sizes)
        layers = sum(node.op_type in _WEIGHTED for node in graph.node)
        kib = self.proto.ByteSize() / 2**10
        return f"<{type(self).__name__} {self.name}: {size}, {layers} layers, {kib:.0f} KiB>"

    def _repr_html_(self) -> str:
        """Return the network, and how it was made, as HTML; notebooks call this."""
        report = getattr(self, "report", None)
        line = f"<pre>{html.escape(repr(self))}</pre>"
        return line if report is None else f"{line}\n{report._repr_html_()}"


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Exported(Made):
    """A fused float network, proved equal to its source."""

    report: ExportReport = field(repr=False)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Calibrated(Made):
    """An INT8 network: the float one with Q/DQ pairs and INT8 weights."""

    report: CalibrateReport = field(repr=False)


def _joined(parts: list[AnyArray], length: int) -> AnyArray:
    """Return what parts of the images gave as one array, or the last part if rows are no images."""
    rows = sum(len(part) if part.ndim else 0 for part in parts)
    return np.concatenate(parts) if rows == length else parts[-1]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Loaded(Made):
    """A network read from a file."""

    @staticmethod
    def load(path: Path) -> "Loaded":
        """Read an ONNX file, with its origin where it has a sidecar.

        Raises:
            ArtifactError: the file cannot be read, or is not the one its sidecar was written for.
        """
        model, sidecar = Model.read(path), read_sidecar(path)
        if sidecar is not None:
            origin = Origin(sidecar.artifact, sidecar.parents, sidecar.options, sidecar.details)
        else:
            is_int8 = any(node.op_type == "QuantizeLinear" for node in model.proto.graph.node)
            kind = "int8-onnx" if is_int8 else "float-onnx"
            origin = Origin(kind, {model.name: model.sha256}, {}, {})
        return Loaded(
            name=model.name, proto=model.proto, sha256=model.sha256, path=path, origin=origin
        )


def finished_model(net: Net) -> tuple[Any, str]:
    """Return a graph as an ONNX model and the sha256 that its file will have."""
    proto = model_from_net(net)
    return proto, hashlib.sha256(bytes_from_model(proto)).hexdigest()
