"""What the sidecar of an engine records, as values: written and read here only."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reptrt.core.artifacts import Sidecar, read_sidecar, sidecar_path, write_artifact
from reptrt.core.errors import ArtifactError, ReptrtError
from reptrt.core.options_json import json_from_options, options_from_json
from reptrt.graph.preprocess import Preprocess
from reptrt.rewrite.contract import Skipped
from reptrt.trt.options import BuildOptions, ShapeRange

_ARTIFACT = "engine"
_CHANGES = -1  # a dimension whose size changes from call to call


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or output of an engine; -1 is a dimension that changes from call to call."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # TensorRT's name: "FLOAT", "HALF", "INT8", ...

    def __post_init__(self) -> None:
        if min(self.shape, default=0) < _CHANGES:
            raise ArtifactError(
                f"tensor {self.name}: shape is {list(self.shape)}, expected sizes, or -1 where "
                "the size changes"
            )


@dataclass(frozen=True, slots=True)
class Rest:
    """What was done to the part of a graph that is not INT8."""

    state: Literal["converted", "was fp16", "fp32"]  # to FP16; left as it was; left in FP32
    num_converted: int = 0  # nodes that compute in FP16 now
    left_fp32: tuple[Skipped, ...] = ()  # nodes that FP16 cannot hold, and why

    def __str__(self) -> str:
        if self.state != "converted":
            return {"was fp16": "rest fp16 as in the file", "fp32": "rest fp32"}[self.state]
        left = f", {len(self.left_fp32)} left in fp32" if self.left_fp32 else ""
        return f"rest fp16 ({self.num_converted} nodes converted{left})"


@dataclass(frozen=True, slots=True)
class EngineDetails:
    """What was built, in a form that equal builds share."""

    backend: str  # "tensorrt" or "tensorrt-rtx"
    backend_version: str
    targets: tuple[str, ...]  # compute capabilities; (): those of tensorrt-rtx from sm80 on
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    profile: Mapping[str, ShapeRange]  # of every input that has a dimension of -1
    num_layers: int  # of the parsed network, before TensorRT fuses
    int8_layers: tuple[str, ...]  # planned INT8: names of the graph's nodes
    size_bytes: int
    device_memory_bytes: int | None  # activations of one execution context; None: not known
    without_effect: tuple[str, ...]  # options that this backend takes but does not follow
    rest: Rest
    preprocess: Preprocess | None  # None: the graph does not say how its images are prepared
    num_classes: int | None  # of a detector with NMS; None: there is no NMS, or it is not known

    def __post_init__(self) -> None:
        """Check what readers rely on.

        Raises:
            ArtifactError: no inputs or outputs, or a profile that does not fit the inputs.
        """
        for role, tensors in (("inputs", self.inputs), ("outputs", self.outputs)):
            if not tensors:
                raise ArtifactError(f"{role}: got none, expected one or more tensors")
        ranks = {t.name: len(t.shape) for t in self.inputs if _CHANGES in t.shape}
        profiled = {name: len(shapes.minimum) for name, shapes in self.profile.items()}
        if ranks != profiled:
            raise ArtifactError(
                f"profile: got dimensions {profiled}, expected {ranks}: those of every input that "
                "has a dimension of -1"
            )


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """The sidecar of an engine."""

    sha256: str  # of the engine, hex
    parents: Mapping[str, str]  # name of the ONNX file -> sha256, hex
    options: BuildOptions  # what was asked for
    details: EngineDetails  # what was built


def write_engine(
    path: Path,
    plan: bytes,
    *,
    parents: Mapping[str, str],
    options: BuildOptions,
    details: EngineDetails,
) -> EngineRecord:
    """Write an engine and its sidecar, both or neither; return what the sidecar records.

    Raises:
        ArtifactError: the folder does not exist, or the disk refused the bytes.
    """
    sidecar = write_artifact(
        path,
        plan,
        artifact=_ARTIFACT,
        parents=parents,
        options=json_from_options(options),
        details=json_from_options(details),
    )
    return EngineRecord(sidecar.sha256, parents, options, details)


def read_engine_record(path: Path) -> EngineRecord | None:
    """Return what the sidecar of an engine records; None if it has no sidecar.

    Raises:
        ArtifactError: the engine is not the one that the sidecar was written for, or an entry of
            the sidecar is missing, unknown, or of another type than `write_engine` writes.
    """
    sidecar = read_sidecar(path)
    if sidecar is None:
        return None
    try:
        return _record(sidecar)
    except ReptrtError as err:
        raise ArtifactError(
            f"{sidecar_path(path)}: {err}; build the engine again, or delete this file to use the "
            "engine without what it records"
        ) from err


def _record(sidecar: Sidecar) -> EngineRecord:
    if sidecar.artifact != _ARTIFACT:
        raise ArtifactError(f"artifact: got {sidecar.artifact!r}, expected {_ARTIFACT!r}")
    return EngineRecord(
        sha256=sidecar.sha256,
        parents=sidecar.parents,
        options=options_from_json(BuildOptions, sidecar.options, "options"),
        details=options_from_json(EngineDetails, sidecar.details, "details"),
    )
