"""ONNX to engine: strongly typed, one optimisation profile, a sidecar that says what was built.

Strongly typed means that TensorRT takes every tensor's type from the graph: INT8 is where the graph
has Q/DQ, FP16 where it has FP16, and no builder option changes that. `reptrt.trt.input` gives
the graph those types.
"""

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import onnx

from reptrt.core.artifacts import require_folder, sha256_of, write_artifact
from reptrt.core.errors import ConfigError, EngineError
from reptrt.graph.intent import planned_int8
from reptrt.graph.net import bytes_from_model
from reptrt.trt import binding, timing_cache
from reptrt.trt.binding import CURRENT, Backend, Gpu, Messages
from reptrt.trt.input import Rest, metadata_of, read_buildable, with_rest
from reptrt.trt.options import (
    BuildOptions,
    ShapeRange,
    check_options,
    profile_shapes,
)

_LOG = logging.getLogger(__name__)
_MIB = 1 << 20
_SIGNAL_SECONDS = 0.1
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or output of an engine; -1 is a dimension that changes from call to call."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # TensorRT's name: "FLOAT", "HALF", "INT8", ...


@dataclass(frozen=True, slots=True)
class EngineSummary:
    """What was built."""

    path: Path
    sha256: str
    backend: str  # "tensorrt" or "tensorrt-rtx"
    backend_version: str
    targets: tuple[str, ...]  # compute capabilities; (): tensorrt-rtx's default, sm80 and later
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    profile: dict[str, ShapeRange]  # per input with dimensions that change
    num_layers: int  # of the parsed network, before TensorRT fuses
    int8_layers: tuple[str, ...]  # planned INT8: names of the graph's nodes
    size_bytes: int
    device_memory_bytes: int | None  # activations of one execution context; None: not known here
    without_effect: tuple[str, ...]  # options that this backend takes but does not follow
    rest: Rest  # what was done to the part that is not INT8
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        profile = {name: str(wanted) for name, wanted in self.profile.items()}
        return asdict(self) | {"path": str(self.path), "profile": profile}


@dataclass(frozen=True, slots=True)
class _Built:
    plan: bytes
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    profile: dict[str, ShapeRange]
    num_layers: int
    device_memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class _Session:
    """The TensorRT objects of one build; each lives as long as the others need it."""

    backend: Backend
    messages: Messages
    builder: Any
    network: Any
    parser: Any
    config: Any
    monitor: Any


def build_engine(onnx_path: Path, output: Path, options: BuildOptions) -> EngineSummary:
    """Build an engine from an ONNX file and write it with its sidecar, whole or not at all.

    Ctrl-C ends the build at TensorRT's next step and leaves no file.

    Raises:
        MissingDependencyError: no TensorRT is installed.
        ConfigError: an option that this TensorRT, this GPU or this graph cannot follow.
        ArtifactError: the ONNX file cannot be read, or the engine cannot be written.
        EngineError: TensorRT refused the graph; the message quotes its reason.
        RewriteError: the rest of the graph cannot be FP16.
    """
    backend = binding.load(options.backend)
    without_effect = check_options(backend, options)
    for name in without_effect:
        _LOG.warning("--%s: %s has no use for it", name.replace("_", "-"), backend.label)
    _check_paths(onnx_path, output, options)
    model, rest = with_rest(read_buildable(onnx_path), options.high_precision)
    parents = {onnx_path.name: sha256_of(onnx_path)}
    started = time.perf_counter()
    built = _run_cancellable(lambda stop: _build(backend, onnx_path, model, options, stop))
    seconds = time.perf_counter() - started
    summary = EngineSummary(
        path=output,
        sha256=hashlib.sha256(built.plan).hexdigest(),
        backend=backend.name,
        backend_version=".".join(map(str, backend.version)),
        targets=_targets(backend, options),
        inputs=built.inputs,
        outputs=built.outputs,
        profile=built.profile,
        num_layers=built.num_layers,
        int8_layers=planned_int8(model),
        size_bytes=len(built.plan),
        device_memory_bytes=built.device_memory_bytes,
        without_effect=without_effect,
        rest=rest,
        seconds=seconds,
    )
    _write(summary, built.plan, parents, model, options)
    _log(summary)
    return summary


def _targets(backend: Backend, options: BuildOptions) -> tuple[str, ...]:
    """Return the compute capabilities that an engine was built for, () for the default of rtx."""
    if backend.features.builds_without_gpu and options.targets != (CURRENT,):
        return options.targets
    gpu = binding.find_gpu()
    return (gpu.target,) if isinstance(gpu, Gpu) else options.targets


def _check_paths(onnx_path: Path, output: Path, options: BuildOptions) -> None:
    """Find out before the build what would fail after it."""
    for path in (output, options.timing_cache):
        if path is not None:
            require_folder(path)
    if output.resolve() == onnx_path.resolve():
        raise ConfigError(f"-o {output}: is the ONNX file itself; name another file")


def _run_cancellable(work: Callable[[threading.Event], _T]) -> _T:
    """Run work in a thread, so that Ctrl-C reaches Python and not a callback inside TensorRT.

    The thread waits until it is known to the pool: from then on Ctrl-C stops it and waits for it.
    """
    known, stop = threading.Event(), threading.Event()

    def begin() -> _T:
        known.wait()
        return work(stop)

    future: Future[_T] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="build-engine") as pool:
        try:
            future = pool.submit(begin)
            known.set()
            while not future.done():  # a signal just before a wait is only seen after it
                wait([future], timeout=_SIGNAL_SECONDS)
            return future.result()
        except KeyboardInterrupt:
            stop.set()
            raise
        finally:
            known.set()
            future = None  # its exception would keep this frame, and TensorRT's objects, alive


def _build(
    backend: Backend,
    path: Path,
    model: onnx.ModelProto,
    options: BuildOptions,
    stop: threading.Event,
) -> _Built:
    with Messages(backend) as messages:
        session = _open(backend, messages, path, model, stop)
        profile = _add_profile(session, options.shapes)
        _configure(session, options)
        plan = _serialize(session, path, options)
        network = session.network
        return _Built(
            plan=plan,
            inputs=_tensor_infos(network.get_input, network.num_inputs),
            outputs=_tensor_infos(network.get_output, network.num_outputs),
            profile=profile,
            num_layers=network.num_layers,
            device_memory_bytes=_device_memory(session, plan),
        )


def _open(
    backend: Backend,
    messages: Messages,
    path: Path,
    model: onnx.ModelProto,
    stop: threading.Event,
) -> _Session:
    """Parse the model into a strongly typed network."""
    builder = binding.create_builder(backend, messages)
    network = binding.create_network(backend, builder)
    parser = backend.trt.OnnxParser(network, messages.logger)
    if not parser.parse(bytes_from_model(model)) or parser.num_errors:
        raise EngineError(f"{path}: {backend.label} cannot take {_parser_error(parser, messages)}")
    config = builder.create_builder_config()
    monitor = binding.make_monitor(backend, stop)
    config.progress_monitor = monitor
    return _Session(backend, messages, builder, network, parser, config, monitor)


def _serialize(session: _Session, path: Path, options: BuildOptions) -> bytes:
    """Build; read the timing cache before and extend it after, where there is one."""
    backend, messages, config = session.backend, session.messages, session.config
    cache = options.timing_cache if backend.features.timing_cache else None
    if cache is not None:
        timing_cache.attach(backend, messages, config, cache)
    messages.errors.clear()
    memory = session.builder.build_serialized_network(session.network, config)
    if memory is None:
        reason = messages.reason()
        raise EngineError(f"{path}: {backend.label} built no engine: {reason}{_hint(options)}")
    if cache is not None and not options.pinned_tactics:
        timing_cache.merge(config, cache)
    return bytes(memory)


def _parser_error(parser: Any, messages: Messages) -> str:
    """Return the parser's first error in one line: node, operator, reason."""
    if not parser.num_errors:
        return f"the graph: {messages.reason()}"
    error = parser.get_error(0)
    reason = binding.one_line(error.desc())
    if reason in ("", "false"):  # all that it says of an operator it does not know
        reason = f"the operator is not supported ({error.code().name})"
    more = f" (and {parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
    return f"node {error.node_name() or error.node()} ({error.node_operator()}): {reason}{more}"


def _add_profile(session: _Session, shapes: ShapeRange | None) -> dict[str, ShapeRange]:
    """Give every input whose shape can change its range; return the ranges by name."""
    network = session.network
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    ranges = {tensor.name: profile_shapes(tensor.name, tensor.shape, shapes) for tensor in inputs}
    profile = {name: wanted for name, wanted in ranges.items() if wanted is not None}
    if not profile:
        return {}
    optimisation = session.builder.create_optimization_profile()
    for name, wanted in profile.items():
        optimisation.set_shape(name, wanted.minimum, wanted.optimum, wanted.maximum)
    if session.config.add_optimization_profile(optimisation) < 0:
        raise ConfigError(f"--shapes: refused by TensorRT ({session.messages.reason()})")
    return profile


def _configure(session: _Session, options: BuildOptions) -> None:
    trt, config, features = session.backend.trt, session.config, session.backend.features
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = options.optimization_level
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * _MIB)
    if features.targets:
        binding.set_targets(session.backend, config, options.targets)
    binding.set_hardware_compatibility(session.backend, config, options.hardware_compatible)
    wanted = {
        "VERSION_COMPATIBLE": options.version_compatible,
        "REFIT": options.refit,
        "STRIP_PLAN": options.strip_plan,
        "EDITABLE_TIMING_CACHE": features.timing_cache and options.timing_cache is not None,
        "ERROR_ON_TIMING_CACHE_MISS": options.pinned_tactics,
    }
    binding.set_flags(session.backend, config, [name for name, on in wanted.items() if on])


def _hint(options: BuildOptions) -> str:
    """Return what the user may have caused a failed build with."""
    if options.pinned_tactics:
        return "; --pinned-tactics: build once without it, so that the timing cache is complete"
    if options.workspace_mib is not None:
        return f"; --workspace {options.workspace_mib} MiB may be too small"
    return ""


def _tensor_infos(get: Callable[[int], Any], count: int) -> tuple[TensorInfo, ...]:
    tensors = [get(index) for index in range(count)]
    return tuple(TensorInfo(t.name, tuple(t.shape), t.dtype.name) for t in tensors)


def _device_memory(session: _Session, plan: bytes) -> int | None:
    """Load the engine where that is possible for sure; return what a context of it takes."""
    if session.backend.features.builds_without_gpu:
        return None
    runtime = session.backend.trt.Runtime(session.messages.logger)
    runtime.engine_host_code_allowed = True  # this process has built what a plan may carry
    engine = runtime.deserialize_cuda_engine(plan)
    return None if engine is None else int(engine.device_memory_size_v2)


def _write(
    summary: EngineSummary,
    plan: bytes,
    parents: dict[str, str],
    model: onnx.ModelProto,
    options: BuildOptions,
) -> None:
    """Write engine and sidecar; equal builds give equal sidecars, so no seconds in it."""
    asked = asdict(options)
    asked["shapes"] = None if options.shapes is None else str(options.shapes)
    asked["timing_cache"] = None if options.timing_cache is None else str(options.timing_cache)
    found = summary.to_dict()
    for name in ("path", "sha256", "seconds"):
        del found[name]
    preprocess = metadata_of(model).get("reptrt.preprocess")
    found["preprocess"] = None if preprocess is None else json.loads(preprocess)
    write_artifact(
        summary.path,
        plan,
        artifact="engine",
        parents=parents,
        options=asked,
        details=found,
    )


def _log(summary: EngineSummary) -> None:
    _LOG.info(
        "build-engine  %s %s  %s  %d layers  %d planned int8  %s  %.2f MiB  %.1f s",
        summary.backend,
        summary.backend_version,
        ",".join(summary.targets) or "portable",
        summary.num_layers,
        len(summary.int8_layers),
        summary.rest,
        summary.size_bytes / _MIB,
        summary.seconds,
    )
