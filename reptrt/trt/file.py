"""Engine files: the header, which is readable without TensorRT, and deserializing.

The first bytes are alike in every release since 8.6; trtexec --getPlanVersionOnly reads them too:

    0..3    "ftrt" (tensorrt) or "vtrt" (tensorrt_rtx)
    16..23  number of bytes of the file, little endian
    24..27  version of the TensorRT that wrote it, one byte per part
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reptrt.core.errors import ArtifactError, EngineError
from reptrt.trt import binding, driver, versions
from reptrt.trt.details import EngineRecord, read_engine_record
from reptrt.trt.driver import Gpu
from reptrt.trt.messages import Messages
from reptrt.trt.versions import Backend, capability

_TAGS = (b"ftrt", b"vtrt")
_HEADER_BYTES = 28
_OLDEST_FULL = 8  # major versions below are tensorrt_rtx's


@dataclass(frozen=True, slots=True)
class PlanHeader:
    """The first bytes of an engine."""

    tag: str
    version: tuple[int, int, int, int]
    size: int

    @property
    def backend(self) -> Literal["tensorrt", "tensorrt-rtx"]:
        """Which TensorRT wrote it."""
        return "tensorrt" if self.version[0] >= _OLDEST_FULL else "tensorrt-rtx"

    @property
    def label(self) -> str:
        """Name and version of the TensorRT that wrote it."""
        return f"{self.backend} {'.'.join(map(str, self.version))}"


@dataclass(frozen=True, slots=True)
class OpenEngine:
    """A deserialized engine, and the objects that have to live as long as it does."""

    path: Path
    header: PlanHeader
    record: EngineRecord | None  # None: it has no sidecar
    gpu: Gpu
    backend: Backend
    messages: Messages
    runtime: Any
    engine: Any


def read_header(path: Path) -> PlanHeader:
    """Read the header of an engine file.

    Raises:
        ArtifactError: the file cannot be read.
        EngineError: it is not an engine, or a truncated one.
    """
    try:
        with open(path, "rb") as stream:
            start = stream.read(_HEADER_BYTES)
        actual = path.stat().st_size
    except FileNotFoundError as err:
        raise ArtifactError(f"{path}: does not exist; check the path") from err
    except OSError as err:
        raise ArtifactError(f"{path}: cannot be read ({err.strerror or err})") from err
    if start[:4] not in _TAGS or len(start) < _HEADER_BYTES:
        raise EngineError(
            f"{path}: not a TensorRT engine (it starts with {start[:4]!r}, expected "
            f"{_TAGS[0]!r} or {_TAGS[1]!r}); build one from an .onnx file"
        )
    size = int.from_bytes(start[16:24], "little")
    first, second, third, fourth = start[24:28]
    header = PlanHeader(start[:4].decode(), (first, second, third, fourth), size)
    if header.backend == "tensorrt-rtx" and actual != size:  # unchecked for tensorrt: no sample
        raise EngineError(
            f"{path}: {actual} bytes, its header says {size}: truncated or damaged; build it again"
        )
    return header


@contextlib.contextmanager
def open_engine(path: Path) -> Iterator[OpenEngine]:
    """Deserialize an engine, after every check that is possible before.

    Raises:
        ArtifactError: the file cannot be read, is not the one its sidecar was written for, or the
            sidecar is damaged.
        MissingDependencyError: the TensorRT it needs is not installed.
        EngineError: no GPU, another GPU, another TensorRT, a damaged file.
    """
    header = read_header(path)
    record = read_engine_record(path)
    gpu = driver.find_gpu()
    if not isinstance(gpu, Gpu):
        raise EngineError(f"{path}: using an engine needs an NVIDIA GPU: {gpu}")
    backend = binding.load(header.backend)
    _check_version(path, header, backend, record)
    if record is not None and not backend.features.engine_validity:
        _check_gpu(path, record, gpu)
    plan = path.read_bytes()
    with Messages(backend) as messages:
        versions.register_plugins(backend, messages.logger)
        runtime = _create_runtime(path, backend, messages)
        reason = versions.why_invalid(backend, runtime, plan)
        if reason is not None:
            raise EngineError(
                f"{path}: {backend.label} on {gpu.name} ({gpu.target}) refuses this engine: "
                f"{reason}; {_remedy(backend, gpu)}"
            )
        if record is not None and record.options.version_compatible:
            runtime.engine_host_code_allowed = True  # its own lean runtime is in the file
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(
                f"{path}: {backend.label} on {gpu.name} ({gpu.target}) refuses this engine of "
                f"{header.label}: {messages.reason()}; build it again here"
            )
        yield OpenEngine(path, header, record, gpu, backend, messages, runtime, engine)


def _check_version(
    path: Path, header: PlanHeader, backend: Backend, record: EngineRecord | None
) -> None:
    """Refuse an engine that this TensorRT cannot read.

    A version-compatible engine runs on its own and later versions of the same major version. If
    there is no sidecar, which would tell, TensorRT itself decides within one major version.
    """
    later = header.version[0] == backend.version[0] and header.version < backend.version
    compatible = record is None or record.options.version_compatible
    if header.version == backend.version or (later and compatible):
        return
    raise EngineError(
        f"{path}: built by {header.label}, this is {backend.label}; build it again here"
        + (", or version compatible there" if later and backend.name == "tensorrt" else "")
    )


def _remedy(backend: Backend, gpu: Gpu) -> str:
    """Return how to get an engine that runs on a GPU, after a backend refused one."""
    if gpu.target in backend.features.targets:
        return f"build it again for target {gpu.target}"
    return (
        f"{backend.name} runs on {', '.join(backend.features.targets)} only: build it here with "
        "backend tensorrt"
    )


def _check_gpu(path: Path, record: EngineRecord, gpu: Gpu) -> None:
    """Refuse an engine that was built for other GPUs."""
    targets = record.details.targets
    ampere = record.options.hardware_compatible == "ampere+"
    if gpu.target in targets or (ampere and capability(gpu.target) >= (8, 0)):
        return
    raise EngineError(
        f"{path}: built for {'sm80 and later' if ampere else ', '.join(targets)}, this GPU "
        f"({gpu.name}) is {gpu.target}; build it again on this machine"
    )


def _create_runtime(path: Path, backend: Backend, messages: Messages) -> Any:
    try:
        return backend.trt.Runtime(messages.logger)
    except TypeError as err:  # what pybind11 makes of a null pointer
        raise EngineError(
            f"{path}: {backend.label} does not start: {messages.reason()}; update the NVIDIA driver"
        ) from err
