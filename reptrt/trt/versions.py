"""Every difference between TensorRT versions: ``tensorrt`` 10.12+ and 11.x, and ``tensorrt_rtx``.

The differences, by the names in the Python bindings:

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
    | Runtime.get_engine_validity  | -             | -     | works                       |
    | plugins: EfficientNMS_TRT    | works         | works | none                        |
    | runs on SM90 (Hopper)        | yes           | yes   | no: on its targets only     |

Other modules read `Backend.features` or call the functions below, and check no version themselves.
Two formats that differ are handled by their parsers: the first bytes of an engine in
`reptrt.trt.file`, the engine inspector's JSON in `reptrt.trt.inspector`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from reptrt.core.errors import EngineError, option
from reptrt.core.nms_options import PLUGIN

BackendName = Literal["auto", "tensorrt", "tensorrt-rtx"]
CURRENT = "current"  # a target: the GPU of this machine
OLDEST = {"tensorrt": (10, 12), "tensorrt-rtx": (1, 4)}

_INVALID = {  # trt.EngineInvalidityDiagnostics of tensorrt_rtx, bits
    1: "it is of another version",
    2: "it was not built for this GPU",
    4: "the NVIDIA driver is too old",
    8: "the CUDA runtime is too old",
    16: "the GPU has too little memory",
    32: "it is damaged",
    64: "CUDA fails",
}
_COMPATIBILITY = {"AMPERE_PLUS": "ampere+", "SAME_COMPUTE_CAPABILITY": "same-compute-capability"}


@dataclass(frozen=True, slots=True)
class Features:
    """What an installed TensorRT can do."""

    targets: tuple[str, ...]  # compute capabilities to build for; (): the local GPU only
    builds_without_gpu: bool
    hardware_compatibility: tuple[str, ...]  # levels with an effect
    version_compatible: bool
    timing_cache: bool
    pinned_tactics: bool  # an editable timing cache, and an error when it lacks a layer
    optimization_level: bool  # False: accepted, without effect
    engine_validity: bool  # Runtime.get_engine_validity
    cuda_graph_strategy: bool  # IRuntimeConfig.cuda_graph_strategy
    plugins: bool  # EfficientNMS_TRT and the others of its own plugin library


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


def features_of(name: str, trt: Any) -> Features:
    """Return what a TensorRT module can do, by the names that its bindings have."""
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
        plugins=full,
    )


def create_network(backend: Backend, builder: Any) -> Any:
    """Return an empty strongly typed network: the only kind since 11.0, a flag before."""
    flag = backend.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    return builder.create_network(1 << int(flag))


def no_nms(label: str) -> str:
    """Return why NMS cannot be part of an engine of tensorrt-rtx.

    Tried with 1.7.1: its parser finds no plugin of that name, and takes a NonMaxSuppression for
    which its builder then has no kernel.
    """
    return (
        f"{label} has neither {PLUGIN} nor a kernel for NonMaxSuppression; build the file without "
        f"{option('nms')} (reptrt eval and predict do NMS themselves), or with "
        f"{option('backend', 'tensorrt')}"
    )


def register_plugins(backend: Backend, logger: Any) -> None:
    """Make TensorRT's own plugins known to parsers and runtimes of this process."""
    if backend.features.plugins:
        backend.trt.init_libnvinfer_plugins(logger, "")


def set_targets(backend: Backend, config: Any, targets: tuple[str, ...]) -> None:
    """Let an engine file contain code for these compute capabilities; (): the default.

    Raises:
        EngineError: TensorRT refused one of them.
    """
    if not targets:
        return
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        capability = getattr(backend.trt.ComputeCapability, target.upper())
        if not config.set_compute_capability(capability, index):
            raise EngineError(f"{option('targets', target)}: refused by {backend.label}")


def set_hardware_compatibility(backend: Backend, config: Any, level: str) -> None:
    """Let an engine run on other GPUs too: ``ampere+`` or ``same-compute-capability``."""
    names = {value: key for key, value in _COMPATIBILITY.items()}
    if level in names:
        levels = backend.trt.HardwareCompatibilityLevel
        config.hardware_compatibility_level = getattr(levels, names[level])


def set_flags(backend: Backend, config: Any, names: Iterable[str]) -> None:
    """Set builder flags by name."""
    for name in names:
        config.set_flag(getattr(backend.trt.BuilderFlag, name))


def create_context(backend: Backend, engine: Any, *, cuda_graph: bool) -> Any:
    """Return an execution context, None if TensorRT makes none.

    Args:
        backend: the TensorRT that deserialized the engine.
        engine: the engine.
        cuda_graph: replay launches as one CUDA graph, where TensorRT offers it.
    """
    if not (cuda_graph and backend.features.cuda_graph_strategy):
        return engine.create_execution_context()
    config = engine.create_runtime_config()
    config.cuda_graph_strategy = backend.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return engine.create_execution_context(config)


def why_invalid(backend: Backend, runtime: Any, plan: bytes) -> str | None:
    """Return why TensorRT calls an engine invalid here; None if it does not, or cannot say."""
    if not backend.features.engine_validity:
        return None
    validity, bits = runtime.get_engine_validity(plan)
    if validity != backend.trt.EngineValidity.INVALID:
        return None
    reasons = [reason for bit, reason in _INVALID.items() if int(bits) & bit]
    return ", ".join(reasons) or "it gave no reason"


def capability(target: str) -> tuple[int, int]:
    """Return the compute capability of a target.

    >>> capability("sm120")
    (12, 0)
    """
    return int(target[2:-1]), int(target[-1])
