"""Options of an engine build, and whether the installed TensorRT can follow them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from reptrt.core.choices import HighPrecision
from reptrt.core.errors import ConfigError, option
from reptrt.core.nms_options import NmsOptions
from reptrt.core.option_fields import described
from reptrt.trt import driver
from reptrt.trt.driver import Gpu
from reptrt.trt.versions import CURRENT, Backend, BackendName, capability, no_nms

HardwareCompatibility = Literal["none", "ampere+", "same-compute-capability"]
Platform = Literal["auto", "onnxruntime", "tensorrt", "tensorrt-rtx"]
Shape = tuple[int, ...]

_AMPERE = (8, 0)
_DEFAULT_LEVEL = 3  # TensorRT's own


@dataclass(frozen=True, slots=True)
class ShapeRange:
    """The smallest, the most common and the largest shape of an input.

    One number each is a batch size, the other dimensions as in the graph: ``(1,), (8,), (64,)``.
    """

    minimum: Shape
    optimum: Shape
    maximum: Shape

    def __post_init__(self) -> None:
        rows = (self.minimum, self.optimum, self.maximum)
        if len({len(row) for row in rows}) != 1 or not self.minimum:
            raise ConfigError(
                f"{option('shapes', str(self))}: expected three shapes of the same rank"
            )
        for low, best, high in zip(*rows, strict=True):
            if not 1 <= low <= best <= high:
                raise ConfigError(f"{option('shapes', str(self))}: expected 1 <= MIN <= OPT <= MAX")

    @classmethod
    def from_text(cls, text: str) -> "ShapeRange":
        """Return the range of ``MIN:OPT:MAX``, see `parse_shapes`."""
        return parse_shapes(text)

    def __str__(self) -> str:
        rows = (self.minimum, self.optimum, self.maximum)
        return ":".join("x".join(map(str, row)) for row in rows)


DEFAULT_BATCHES = ShapeRange((1,), (8,), (64,))


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Options of an engine build; the defaults build for the local GPU, or portably without one."""

    backend: BackendName = described(
        "auto", "TensorRT to build with; auto is tensorrt where there is a GPU, else tensorrt-rtx."
    )
    targets: tuple[str, ...] = described(
        (),
        "Compute capabilities to build for, e.g. sm80,sm89; current is the GPU of this machine; "
        "default: as the backend chooses.",
        flag="--target",
        parse=lambda text: parse_targets(text),
    )
    shapes: ShapeRange | None = described(
        None,
        "Batch sizes MIN:OPT:MAX, or full shapes; default: 1:8:64 where the batch is dynamic.",
        parse=lambda text: parse_shapes(text),
    )
    workspace_mib: int | None = described(
        None,
        "Scratch memory that one layer may use, in MiB; default: as TensorRT chooses.",
        flag="--workspace",
    )
    timing_cache: Path | None = described(
        None, "File of measured kernel times, read and extended; many builds can share it."
    )
    pinned_tactics: bool = described(False, "Use only kernels that are in the timing cache.")
    version_compatible: bool = described(
        False, "Build an engine that later TensorRT of the same major version can run."
    )
    hardware_compatible: HardwareCompatibility = described(
        "none", "Other GPUs that can run the engine."
    )
    refit: bool = described(False, "Build an engine whose weights can be replaced.")
    strip_plan: bool = described(
        False, "Leave the weights out of the engine, which must be refitted before use."
    )
    optimization_level: int = described(
        _DEFAULT_LEVEL, "Effort of the build: 0 builds fastest, 5 gives the fastest engine."
    )
    high_precision: HighPrecision = described(
        "fp16",
        "Type of everything that is not INT8; a file that has FP16 types keeps its types.",
    )
    nms: NmsOptions = field(default_factory=NmsOptions)

    def __post_init__(self) -> None:
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise ConfigError(
                f"{option('workspace_mib')}: got {self.workspace_mib}, expected MiB, 1 or more"
            )
        if not 0 <= self.optimization_level <= 5:
            raise ConfigError(
                f"{option('optimization_level')}: got {self.optimization_level}, expected 0..5"
            )
        if self.pinned_tactics and self.timing_cache is None:
            needed = option("timing_cache")
            raise ConfigError(
                f"{option('pinned_tactics')}: needs {needed}, which holds the tactics"
            )


@dataclass(frozen=True, slots=True)
class PackageOptions:
    """Options of `package`."""

    platform: Platform = described(
        "auto",
        "Runtime that serves the network; auto is tensorrt for an engine and onnxruntime for an "
        "ONNX file.",
    )
    name: str | None = described(None, "Name of the model; default: that of the file.")
    labels: Path | None = described(
        None,
        "Names of the classes: a text file with one a line, in the order of the outputs, or a COCO "
        "file.",
    )
    instances: int = described(1, "Execution contexts on each GPU.")
    max_queue_delay_us: int = described(
        100,
        "Microseconds that a request may wait for others to share its batch.",
        flag="--max-queue-delay",
    )
    nms: NmsOptions = field(default_factory=NmsOptions)

    def __post_init__(self) -> None:
        if self.instances < 1:
            raise ConfigError(f"{option('instances')}: got {self.instances}, expected 1 or more")
        if self.max_queue_delay_us < 0:
            raise ConfigError(
                f"{option('max_queue_delay_us')}: got {self.max_queue_delay_us}, expected 0 or more"
            )
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", self.name):
            raise ConfigError(
                f"{option('name')}: got {self.name!r}, expected letters, digits, _ - and ."
            )


def parse_shapes(text: str) -> ShapeRange:
    """Return the range of ``MIN:OPT:MAX``, each a batch size or a full shape.

    >>> parse_shapes("1x3x32x32:8x3x32x32:64x3x32x32").optimum
    (8, 3, 32, 32)
    >>> str(parse_shapes("16"))
    '16:16:16'

    Raises:
        ConfigError: anything else.
    """
    parts = text.replace(" ", "").split(":")
    shape = re.compile(r"[0-9]{1,9}(x[0-9]{1,9})*", re.IGNORECASE)
    if len(parts) not in (1, 3) or not all(shape.fullmatch(part) for part in parts):
        raise ConfigError(
            f"{option('shapes')}: got {text!r}, expected MIN:OPT:MAX as batch sizes (1:8:64) or "
            "full shapes (1x3x32x32:8x3x32x32:64x3x32x32)"
        )
    rows = [tuple(int(size) for size in part.lower().split("x")) for part in parts]
    return ShapeRange(rows[0], rows[len(rows) // 2], rows[-1])


def parse_targets(text: str) -> tuple[str, ...]:
    """Return compute capabilities, sorted and once each: ``sm89, sm_80, 8.6``; or ``current``.

    >>> parse_targets("sm89,8.0")
    ('sm80', 'sm89')
    >>> parse_targets("current")
    ('current',)

    Raises:
        ConfigError: something that is no compute capability.
    """
    if text.strip().lower() == CURRENT:
        return (CURRENT,)
    targets = set()
    for part in text.split(","):
        match = re.fullmatch(r"(?:sm_?)?([0-9]{1,2})\.?([0-9])", part.strip().lower())
        if match is None:
            raise ConfigError(
                f"{option('targets')}: got {part.strip()!r}, expected compute capabilities such as "
                "sm80,sm86,sm89,sm120, or current alone"
            )
        targets.add(f"sm{int(match[1])}{match[2]}")
    return tuple(sorted(targets, key=capability))


def check_options(backend: Backend, options: BuildOptions) -> tuple[str, ...]:
    """Check options against a backend; return the names of those it accepts but ignores.

    Raises:
        ConfigError: an option that the backend or the GPU of this machine cannot follow.
    """
    features = backend.features
    gpu = driver.find_gpu()
    if options.nms.append and not features.plugins:
        raise ConfigError(f"{option('nms')}: {no_nms(backend.label)}")
    if features.targets:
        _check_portable(backend, options, gpu)
    elif isinstance(gpu, Gpu):
        _check_local(backend, options, gpu)
    if options.pinned_tactics and not features.pinned_tactics:
        raise ConfigError(
            f"{option('pinned_tactics')}: {backend.label} measures no tactics; leave it out"
        )
    without_effect = []
    if options.timing_cache is not None and not features.timing_cache:
        without_effect.append("timing_cache")
    if options.optimization_level != _DEFAULT_LEVEL and not features.optimization_level:
        without_effect.append("optimization_level")
    return tuple(without_effect)


def profile_shapes(name: str, dims: Sequence[int], shapes: ShapeRange | None) -> ShapeRange | None:
    """Return the full shapes that an engine is optimised for; None if the shape is fixed.

    Args:
        name: the input, for messages.
        dims: its shape in the graph, -1 where it may change.
        shapes: the requested range; None is batch 1:8:64.

    Raises:
        ConfigError: the range does not fit the graph.
    """
    graph = "x".join("?" if size < 0 else str(size) for size in dims)
    full = DEFAULT_BATCHES if shapes is None else shapes
    if shapes is None and all(size >= 0 for size in dims):
        return None
    if len(full.minimum) == 1 and len(dims) != 1:
        if any(size < 0 for size in dims[1:]):
            raise ConfigError(
                f"input {name}: its shape is {graph}; give full shapes in {option('shapes')}, for "
                "example 1x3x224x224:8x3x224x224:64x3x224x224"
            )
        rest = tuple(dims[1:])
        rows = (full.minimum, full.optimum, full.maximum)
        full = ShapeRange(*(row + rest for row in rows))
    fits = len(full.minimum) == len(dims) and all(
        size < 0 or low == high == size
        for size, low, high in zip(dims, full.minimum, full.maximum, strict=True)
    )
    if not fits:
        raise ConfigError(
            f"{option('shapes', str(full))}: does not fit input {name}, whose shape is {graph}; "
            "only dimensions shown as ? can change (to change the batch, export it as dynamic)"
        )
    return None if all(size >= 0 for size in dims) else full


def _check_portable(backend: Backend, options: BuildOptions, gpu: Gpu | str) -> None:
    """Check against a backend that builds for any GPU (tensorrt-rtx)."""
    supported = ", ".join(backend.features.targets)
    if CURRENT in options.targets:
        _check_current(backend, gpu)
    for target in options.targets:
        if target not in (CURRENT, *backend.features.targets):
            raise ConfigError(
                f"{option('targets', target)}: {backend.label} builds for {supported} only"
            )
    if options.hardware_compatible != "none":
        raise ConfigError(
            f"{option('hardware_compatible')}: {backend.label} takes {option('targets')} instead "
            f"(any of {supported}); its default runs on those from sm80 on"
        )
    if options.version_compatible:
        raise ConfigError(
            f"{option('version_compatible')}: {backend.label} comes without the lean runtime that "
            f"such an engine contains; use {option('backend', 'tensorrt')}"
        )
    if (options.refit or options.strip_plan) and not isinstance(gpu, Gpu):
        raise ConfigError(
            f"{option('refit')}, {option('strip_plan')}: {backend.label} builds such engines only "
            f"on a machine with an NVIDIA driver ({gpu})"
        )


def _check_current(backend: Backend, gpu: Gpu | str) -> None:
    """Refuse the target ``current`` where the backend would build an engine that does not run.

    tensorrt_rtx builds for a GPU that it does not support without a word, and refuses the engine
    when it is loaded (seen on SM90).
    """
    current = option("targets", CURRENT)
    if not isinstance(gpu, Gpu):
        raise ConfigError(f"{current}: there is no GPU to build for ({gpu})")
    if gpu.target not in backend.features.targets:
        raise ConfigError(
            f"{current}: {backend.label} does not run on this GPU ({gpu.name}, {gpu.target}), only "
            f"on {', '.join(backend.features.targets)}; use {option('backend', 'tensorrt')} here, "
            "or name the GPU that will run the engine"
        )


def _check_local(backend: Backend, options: BuildOptions, gpu: Gpu) -> None:
    """Check against a backend that builds for the GPU of this machine (tensorrt)."""
    ampere = options.hardware_compatible == "ampere+"
    if ampere and capability(gpu.target) < _AMPERE:
        raise ConfigError(
            f"{option('hardware_compatible', 'ampere+')}: {gpu.name} is {gpu.target}, before sm80"
        )
    for target in options.targets:
        if target in (CURRENT, gpu.target) or (ampere and capability(target) >= _AMPERE):
            continue
        raise ConfigError(
            f"{option('targets', target)}: {backend.label} builds for the GPU of this machine "
            f"({gpu.name}, {gpu.target}) only; use {option('backend', 'tensorrt-rtx')}, or "
            f"{option('hardware_compatible', 'ampere+')} for every GPU from sm80 on"
        )
