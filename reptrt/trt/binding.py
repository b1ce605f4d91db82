"""The one door to TensorRT: ``tensorrt`` 10.12+ and 11.x, and ``tensorrt_rtx``, as one API.

What differs between the three, by the names in their bindings:

    |                              | 10.12 - 10.16 | 11.x  | rtx 1.4 - 1.7               |
    | needs a GPU to build         | yes           | yes   | no                          |
    | set_compute_capability       | -             | -     | sm75 to sm121               |
    | hardware_compatibility_level | works         | works | accepted, without effect    |
    | VERSION_COMPATIBLE           | works         | works | its lean runtime is missing |
    | timing cache                 | works         | works | accepted, without effect    |
    | REFIT, STRIP_PLAN            | works         | works | only with a driver          |
    | STRONGLY_TYPED               | needed        | no-op | no-op                       |
    | BuilderFlag.INT8, FP16       | unused here   | gone  | gone since 1.5              |
    | IRuntimeConfig cuda graphs   | -             | -     | WHOLE_GRAPH_CAPTURE         |

Nothing here is imported until `load` is called.
"""

import ctypes
import functools
import importlib
import logging
import re
import sys
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from reptrt.core.errors import ConfigError, EngineError, MissingDependencyError

BackendName = Literal["auto", "tensorrt", "tensorrt-rtx"]
CURRENT = "current"  # a target: whatever GPU this machine has

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_OLDEST = {"tensorrt": (10, 12), "tensorrt-rtx": (1, 4)}
_NEEDED = ("Builder", "OnnxParser", "Runtime", "ILogger", "IProgressMonitor")
_COMPATIBILITY = {"AMPERE_PLUS": "ampere+", "SAME_COMPUTE_CAPABILITY": "same-compute-capability"}
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_INTERNAL = "(foreignNode) Converting conv"  # tensorrt_rtx of FP16 scales, two lines a layer
_ECHO = "checkMacros.cpp"  # said once more for every error that follows one of CUDA
_TRT_LOGGER = logging.getLogger("reptrt.tensorrt")


@dataclass(frozen=True, slots=True)
class Features:
    """What one TensorRT can do."""

    targets: tuple[str, ...]  # compute capabilities to build for, () if only the local GPU's
    builds_without_gpu: bool
    hardware_compatibility: tuple[str, ...]  # levels with an effect
    version_compatible: bool
    timing_cache: bool
    pinned_tactics: bool  # an editable timing cache, and an error when it lacks a layer
    optimization_level: bool  # False: accepted, without effect
    engine_validity: bool  # Runtime.get_engine_validity
    cuda_graph_strategy: bool  # IRuntimeConfig.cuda_graph_strategy


@dataclass(frozen=True, slots=True)
class Backend:
    """A loaded TensorRT."""

    name: str  # "tensorrt" or "tensorrt-rtx"
    version: tuple[int, ...]
    trt: Any  # the module
    features: Features

    @property
    def label(self) -> str:
        """Name and version, for messages."""
        return f"{self.name} {'.'.join(map(str, self.version))}"


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first GPU that the NVIDIA driver shows."""

    name: str
    target: str  # its compute capability: "sm89"
    driver: tuple[int, int]  # the newest CUDA version that the driver takes
    bus_id: str = ""  # "0000:01:00.0"; "" if the driver does not say


class Messages:
    """What TensorRT says while the block runs: to the log ``reptrt.tensorrt``, errors kept.

    Errors are logged at DEBUG only, because the one that matters is quoted in an EngineError.
    TensorRT takes one logger per process and ignores every later one, so all Messages share it:
    a build in another thread is heard here too.
    """

    def __init__(self, backend: Backend) -> None:
        self.errors: deque[str] = deque(maxlen=16)
        self._relay = _relay(backend.trt)
        self.logger = self._relay.logger

    def __enter__(self) -> "Messages":
        self._relay.listeners.append(self.errors)
        return self

    def __exit__(self, *exc: object) -> None:
        self._relay.listeners[:] = [e for e in self._relay.listeners if e is not self.errors]

    def reason(self) -> str:
        """Return the last error in one line, echoes of a CUDA error left out."""
        said = [error for error in self.errors if _ECHO not in error] or list(self.errors)
        return one_line(said[-1]) if said else "it gave no reason"


def load(backend: BackendName = "auto") -> Backend:
    """Import a TensorRT and say what it can do.

    ``auto`` is ``tensorrt`` where there is a GPU, else ``tensorrt_rtx``, which builds without one;
    the other of the two if that is not installed.

    Raises:
        ConfigError: there is no backend of that name.
        MissingDependencyError: nothing usable is installed: what is wrong, and what to install.
    """
    if backend not in get_args(BackendName):
        raise ConfigError(
            f"--backend: got {backend!r}, expected one of {', '.join(get_args(BackendName))}"
        )
    problems = []
    for name in _candidates(backend):
        loaded = _load_one(name)
        if isinstance(loaded, Backend):
            return loaded
        problems.append(loaded)
    raise MissingDependencyError(
        f"no TensorRT ({'; '.join(problems)}): pip install 'reptrt[gpu]' on a machine with an "
        "NVIDIA GPU, or pip install 'reptrt[rtx]' to build engines without one"
    )


def load_pycuda() -> Any:
    """Import ``pycuda.driver``.

    Raises:
        MissingDependencyError: it is not installed, or finds no driver library.
    """
    try:
        return importlib.import_module("pycuda.driver")
    except (ImportError, OSError) as err:
        raise MissingDependencyError(
            f"pycuda cannot be imported ({one_line(str(err))}); running an engine needs it: "
            "pip install 'reptrt[gpu]'"
        ) from err


def find_gpu() -> Gpu | str:
    """Return the first GPU, or in one line why there is none.

    It asks the driver library itself: TensorRT and CUDA answer the same question by an abort.
    """
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return f"no NVIDIA driver on this machine ({library} not found)"
    status = int(cuda.cuInit(0))
    if status == _NO_DEVICE:
        return "the NVIDIA driver shows no GPU (check CUDA_VISIBLE_DEVICES)"
    if status:
        return f"the NVIDIA driver does not start (cuInit gives error {status})"
    return _first_gpu(cuda)


def create_builder(backend: Backend, messages: Messages) -> Any:
    """Return a trt.Builder.

    Raises:
        EngineError: TensorRT cannot start here, mostly for want of a GPU or a newer driver.
    """
    try:
        return backend.trt.Builder(messages.logger)
    except TypeError as err:  # what pybind11 makes of a null pointer
        gpu = find_gpu()
        there = isinstance(gpu, Gpu)
        raise EngineError(
            f"{backend.label} does not start: {messages.reason() if there else gpu}; "
            f"{'update the NVIDIA driver, or ' if there else ''}build with --backend tensorrt-rtx, "
            "which needs no GPU"
        ) from err


def create_network(backend: Backend, builder: Any) -> Any:
    """Return an empty strongly typed network: the only kind since 11.0, a flag before."""
    flag = backend.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    return builder.create_network(1 << int(flag))


def make_monitor(backend: Backend, cancelled: threading.Event) -> Any:
    """Return a progress monitor that ends the build at its next step once ``cancelled`` is set."""
    base: Any = backend.trt.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()


def set_targets(backend: Backend, config: Any, targets: tuple[str, ...]) -> None:
    """Ask for engines for these compute capabilities, all in one file; none: the default.

    Raises:
        EngineError: TensorRT refused one of them.
    """
    if not targets:
        return
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        capability = getattr(backend.trt.ComputeCapability, target.upper())
        if not config.set_compute_capability(capability, index):
            raise EngineError(f"--target {target}: refused by {backend.label}")


def set_hardware_compatibility(backend: Backend, config: Any, level: str) -> None:
    """Ask for an engine that runs on other GPUs too: ``ampere+``, ``same-compute-capability``."""
    names = {value: key for key, value in _COMPATIBILITY.items()}
    if level in names:
        levels = backend.trt.HardwareCompatibilityLevel
        config.hardware_compatibility_level = getattr(levels, names[level])


def set_flags(backend: Backend, config: Any, names: Iterable[str]) -> None:
    """Set builder flags by name."""
    for name in names:
        config.set_flag(getattr(backend.trt.BuilderFlag, name))


def capability(target: str) -> tuple[int, int]:
    """Return the compute capability of a target.

    >>> capability("sm120")
    (12, 0)
    """
    return int(target[2:-1]), int(target[-1])


def one_line(text: str) -> str:
    """Return a text of TensorRT without its line breaks."""
    return re.sub(r"\s+", " ", text).strip()


def _candidates(backend: BackendName) -> tuple[str, ...]:
    if backend != "auto":
        return (backend,)
    return tuple(_MODULES) if isinstance(find_gpu(), Gpu) else tuple(reversed(_MODULES))


def _load_one(name: str) -> Backend | str:
    """Return the backend, or in a few words why it cannot be used."""
    module = _MODULES[name]
    try:
        trt = importlib.import_module(module)
    except ModuleNotFoundError as err:
        return f"{err.name or module} is not installed"
    except (ImportError, OSError) as err:
        return f"{module} is installed, its libraries are not: {one_line(str(err))}"
    if not all(hasattr(trt, needed) for needed in _NEEDED):
        return f"{module} is not a complete TensorRT"
    version = tuple(int(part) for part in re.findall(r"\d+", trt.__version__)[:4])
    if version < _OLDEST[name]:
        oldest = ".".join(map(str, _OLDEST[name]))
        return f"{module} {trt.__version__} is too old, expected {oldest} or newer"
    return Backend(name, version, trt, _features(name, trt))


def _features(name: str, trt: Any) -> Features:
    full = name == "tensorrt"
    capabilities = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    targets = sorted((key.lower() for key in capabilities if key[:2] == "SM"), key=capability)
    levels = trt.HardwareCompatibilityLevel.__members__
    flags = trt.BuilderFlag.__members__
    pinning = {"EDITABLE_TIMING_CACHE", "ERROR_ON_TIMING_CACHE_MISS"}
    return Features(
        targets=tuple(targets) if hasattr(trt.IBuilderConfig, "set_compute_capability") else (),
        builds_without_gpu=not full,
        hardware_compatibility=tuple(v for k, v in _COMPATIBILITY.items() if full and k in levels),
        version_compatible=full and "VERSION_COMPATIBLE" in flags,
        timing_cache=full,
        pinned_tactics=full and pinning <= set(flags),
        optimization_level=full,
        engine_validity=hasattr(trt.Runtime, "get_engine_validity"),
        cuda_graph_strategy=hasattr(trt, "CudaGraphStrategy"),
    )


@dataclass(frozen=True, slots=True)
class _Relay:
    """The process's logger for one TensorRT module, and who keeps its errors."""

    logger: Any
    listeners: list[deque[str]]


@functools.cache
def _relay(trt: Any) -> _Relay:
    base: Any = trt.ILogger
    severity = base.Severity
    failures = (severity.INTERNAL_ERROR, severity.ERROR)
    listeners: list[deque[str]] = []

    class Logger(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, level: Any, message: str) -> None:
            if level in failures:
                for errors in listeners:
                    errors.append(message)
            matters = level == severity.WARNING and not message.lstrip().startswith(_INTERNAL)
            to_log = logging.WARNING if matters else logging.DEBUG
            _TRT_LOGGER.log(to_log, "%s", message.strip())

    return _Relay(Logger(), listeners)


def _first_gpu(cuda: Any) -> Gpu | str:
    device, number, driver = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(128)
    status = cuda.cuDeviceGet(ctypes.byref(device), 0)
    status = status or cuda.cuDeviceGetName(name, len(name), device)
    status = status or cuda.cuDriverGetVersion(ctypes.byref(driver))
    numbers = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        status = status or cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        numbers.append(number.value)
    if status:
        return f"the NVIDIA driver does not answer (error {int(status)})"
    version = (driver.value // 1000, driver.value % 1000 // 10)
    return Gpu(
        name.value.decode(errors="replace"),
        f"sm{numbers[0]}{numbers[1]}",
        version,
        _bus_id(cuda, device),
    )


def _bus_id(cuda: Any, device: Any) -> str:
    text = ctypes.create_string_buffer(32)
    status = cuda.cuDeviceGetPCIBusId(text, len(text), device)
    return "" if status else text.value.decode(errors="replace")
