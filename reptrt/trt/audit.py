"""Audit an engine: which layers planned INT8 run in INT8, and why the others do not."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reptrt.core.errors import ConfigError, EngineError
from reptrt.graph.intent import planned_int8
from reptrt.graph.model import proto_of
from reptrt.trt.inspect import Inspection, inspect_engine
from reptrt.trt.inspector import UNKNOWN, Layer

_NARROW = 16  # channels below which INT8 kernels are padded


@dataclass(frozen=True, slots=True)
class Miss:
    """A layer that was planned INT8 and does not run in INT8."""

    layer: str  # node of the ONNX file
    precision: str  # the type it computes in; "?" if the engine does not have it
    reason: str


@dataclass(frozen=True, slots=True)
class Audit:
    """The layers that were planned INT8, compared with those of the engine."""

    path: Path
    planned: tuple[str, ...]
    misses: tuple[Miss, ...]
    reformats: tuple[str, ...]  # "name: FP16 -> INT8"
    quantization_passes: tuple[str, ...]  # Q or DQ nodes that run as layers of their own
    float_outputs: tuple[str, ...]  # INT8 layers whose float output another launch quantizes

    @property
    def built(self) -> int:
        """Number of planned layers that run in INT8."""
        return len(self.planned) - len(self.misses)

    def to_dict(self) -> dict[str, Any]:
        """Return the audit as JSON values."""
        return asdict(self) | {"path": str(self.path), "built": self.built}

    def to_lines(self) -> list[str]:
        """Return the audit for people, the sum first."""
        return [
            f"audit  {self.path}  {self.built} of {len(self.planned)} planned layers run in INT8  "
            f"{len(self.reformats)} reformats  {len(self.quantization_passes)} Q/DQ passes  "
            f"{len(self.float_outputs)} float outputs quantized by another launch",
            *(
                f"{miss.layer}: {miss.precision}, planned INT8: {miss.reason}"
                for miss in self.misses
            ),
            *(f"reformat {line}" for line in self.reformats),
            *(f"Q/DQ pass {name}" for name in self.quantization_passes),
            *(f"float output {line}" for line in self.float_outputs),
        ]


def audit(path: Path, onnx_path: Path | None = None) -> Audit:
    """Compare the layers that were planned INT8 with those of the engine.

    Args:
        path: the engine.
        onnx_path: the Q/DQ graph with the plan; None: the plan is in the engine's sidecar.

    Raises:
        ConfigError: there is no plan, or the file is not an engine.
        EngineError: the engine cannot be loaded here, or has no details of its layers.
    """
    if path.suffix.lower() == ".onnx":
        raise ConfigError(f"{path}: an audit is of an engine; give the .engine file")
    planned = None if onnx_path is None else planned_int8(proto_of(onnx_path))
    inspection = inspect_engine(path)
    planned = inspection.planned if planned is None else planned
    if planned is None:
        raise ConfigError(f"{path}: no sidecar says what was planned INT8; give the ONNX file too")
    return compare(inspection, planned)


def compare(inspection: Inspection, planned: Sequence[str]) -> Audit:
    """Find each planned layer in an engine, and why it does not run in INT8 if so.

    Raises:
        EngineError: the engine has no details of its layers.
    """
    layers = [layer for layer in inspection.layers if not layer.is_reformat]
    if layers and not any(layer.inputs or layer.outputs for layer in layers):
        raise EngineError(
            f"{inspection.path}: holds only the names of its layers; build it with reptrt "
            "build-engine, which keeps the details"
        )
    made = {name: _made_from(name, layers) for name in planned}
    misses = (_miss(name, layer, layers) for name, layer in made.items())
    floats = (_float_output(name, layer, layers) for name, layer in made.items())
    return Audit(
        path=inspection.path,
        planned=tuple(planned),
        misses=tuple(miss for miss in misses if miss is not None),
        reformats=tuple(_reformat_line(layer) for layer in inspection.reformats),
        quantization_passes=tuple(layer.name for layer in layers if layer.is_quantization),
        float_outputs=tuple(line for line in floats if line is not None),
    )


def _made_from(name: str, layers: Sequence[Layer]) -> Layer | None:
    """Return the layer that does the multiplications of a node."""
    made = [layer for layer in layers if name in layer.origin and not layer.is_quantization]
    return max(made, key=_computes, default=None)


def _float_output(name: str, layer: Layer | None, layers: Sequence[Layer]) -> str | None:
    """Return the launch that quantizes the float output of an INT8 layer; None if there is none."""
    if layer is None or layer.precision != "INT8":
        return None
    for tensor in layer.outputs:
        for other in layers:
            reads = any(tensor.name == source.name for source in other.inputs)
            if reads and tensor.dtype != "INT8" and any(t.dtype == "INT8" for t in other.outputs):
                return f"{name}: {tensor.dtype}, made INT8 by {other.name}"
    return None


def _miss(name: str, layer: Layer | None, layers: Sequence[Layer]) -> Miss | None:
    """Return why a planned layer does not run in INT8; None if it does."""
    if layer is None:
        reason = "no layer of the engine names it: TensorRT renamed it or removed it"
        return Miss(name, UNKNOWN, reason)
    if layer.precision == "INT8":
        return None
    sources = {tensor.name for tensor in layer.inputs}
    for other in layers:
        if other.is_quantization and sources & {tensor.name for tensor in other.outputs}:
            reason = f"{other.name} runs on its own before it instead of being fused into it"
            return Miss(name, layer.precision, reason)
    channels = [t.shape[1] for t in (*layer.inputs, *layer.outputs) if len(t.shape) > 1]
    if channels and 0 < min(channels) < _NARROW:
        reason = f"it is narrow ({min(channels)} channels, INT8 kernels work on {_NARROW} and more)"
        return Miss(name, layer.precision, reason)
    kernel = f" ({layer.kernel})" if layer.kernel else ""
    if layer.precision == UNKNOWN:
        return Miss(name, UNKNOWN, f"the inspector does not say what {layer.name}{kernel} runs in")
    return Miss(name, layer.precision, f"TensorRT took another kernel for {layer.name}{kernel}")


def _computes(layer: Layer) -> bool:
    """Return whether kind or kernel of a layer names a multiplication."""
    return bool(re.search(r"conv|gemm|matmul|matrix|fc", f"{layer.kind} {layer.kernel}", re.I))


def _reformat_line(layer: Layer) -> str:
    before = ", ".join(f"{t.dtype} {t.format}".strip() for t in layer.inputs)
    after = ", ".join(f"{t.dtype} {t.format}".strip() for t in layer.outputs)
    return f"{layer.name}: {before} -> {after}"
