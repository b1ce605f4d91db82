"""The only module that imports ``tensorrt`` or ``tensorrt_rtx``, and not before `load` is called.

The differences between their versions are in `reptrt.trt.versions`.
"""

import importlib
import re
import threading
from typing import Any, get_args

from reptrt.core.errors import ConfigError, EngineError, MissingDependencyError, option
from reptrt.trt import driver
from reptrt.trt.driver import Gpu
from reptrt.trt.messages import Messages, one_line
from reptrt.trt.versions import OLDEST, Backend, BackendName, features_of

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_NEEDED = ("Builder", "OnnxParser", "Runtime", "ILogger", "IProgressMonitor")


def load(backend: BackendName = "auto") -> Backend:
    """Import TensorRT and return it with its features.

    ``auto`` is ``tensorrt`` where there is a GPU, else ``tensorrt_rtx``, which builds without one.
    If that one is not installed, ``auto`` is the other.

    Raises:
        ConfigError: there is no backend of that name.
        MissingDependencyError: no usable TensorRT is installed; the message says what to install.
    """
    if backend not in get_args(BackendName):
        raise ConfigError(
            f"{option('backend')}: got {backend!r}, expected one of "
            f"{', '.join(get_args(BackendName))}"
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


def create_builder(backend: Backend, messages: Messages) -> Any:
    """Return a trt.Builder.

    Raises:
        EngineError: TensorRT cannot start here, mostly for want of a GPU or a newer driver.
    """
    try:
        return backend.trt.Builder(messages.logger)
    except TypeError as err:  # what pybind11 makes of a null pointer
        gpu = driver.find_gpu()
        has_gpu = isinstance(gpu, Gpu)
        raise EngineError(
            f"{backend.label} does not start: {messages.reason() if has_gpu else gpu}; "
            f"{'update the NVIDIA driver, or ' if has_gpu else ''}build with "
            f"{option('backend', 'tensorrt-rtx')}, which needs no GPU"
        ) from err


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


def _candidates(backend: BackendName) -> tuple[str, ...]:
    if backend != "auto":
        return (backend,)
    return tuple(_MODULES) if isinstance(driver.find_gpu(), Gpu) else tuple(reversed(_MODULES))


def _load_one(name: str) -> Backend | str:
    """Return the backend, or a few words that say why it cannot be used."""
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
    if version < OLDEST[name]:
        oldest = ".".join(map(str, OLDEST[name]))
        return f"{module} {trt.__version__} is too old, expected {oldest} or newer"
    return Backend(name, version, trt, features_of(name, trt))
