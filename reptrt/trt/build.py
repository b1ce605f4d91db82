"""Build an engine from ONNX: strongly typed, with one optimisation profile and a sidecar.

Strongly typed means that TensorRT takes the type of every tensor from the graph: INT8 is where the
graph has Q/DQ, FP16 where it has FP16, and no builder option changes that. `reptrt.trt.input` gives
the graph those types.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import onnx
from rich.table import Table

from reptrt.core.artifacts import (
    ENGINE_SUFFIXES,
    refuse_overwriting,
    require_folder,
    require_suffix,
)
from reptrt.core.errors import ConfigError, EngineError, option
from reptrt.core.options_json import json_from_options
from reptrt.core.result import Result
from reptrt.graph.intent import planned_int8
from reptrt.graph.model import Network, label_of
from reptrt.graph.net import bytes_from_model, net_from_model
from reptrt.graph.preprocess import stored_preprocess
from reptrt.rewrite.append_nms import nms_classes
from reptrt.trt import binding, driver, timing_cache, versions
from reptrt.trt.details import EngineDetails, TensorInfo, write_engine
from reptrt.trt.driver import Gpu
from reptrt.trt.input import read_buildable, with_rest
from reptrt.trt.messages import Messages, one_line
from reptrt.trt.nms import with_nms
from reptrt.trt.options import (
    BuildOptions,
    ShapeRange,
    check_options,
    profile_shapes,
)
from reptrt.trt.versions import CURRENT, Backend

_LOG = logging.getLogger(__name__)
_MIB = 1 << 20
_SIGNAL_SECONDS = 0.1
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, repr=False)
class EngineSummary(Result):
    """What was built."""

    path: Path
    sha256: str  # of the engine, hex
    details: EngineDetails
    seconds: float  # of the build

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as JSON values, those of ``details`` beside the others."""
        own: dict[str, Any] = json_from_options(self)
        details: dict[str, Any] = own.pop("details")
        return own | details

    def to_table(self) -> Table:
        """Return what was built, one row each."""
        details = self.details
        table = Table(box=None, pad_edge=False, show_header=False)
        rows = {
            "file": str(self.path),
            "made by": f"{details.backend} {details.backend_version}",
            "for": ", ".join(details.targets) or "compute capability 8.0 and later",
            "layers": f"{details.num_layers}, {len(details.int8_layers)} of them planned INT8",
            "rest": str(details.rest).removeprefix("rest "),
            "shapes": "; ".join(f"{k}: {v}" for k, v in details.profile.items()) or "fixed",
            "size": f"{details.size_bytes / _MIB:.1f} MiB",
            "seconds": f"{self.seconds:.1f}",
        }
        for name, value in rows.items():
            table.add_row(name, value)
        return table

    def __str__(self) -> str:
        details = self.details
        return (
            f"build-engine  {self.path}  {details.backend} {details.backend_version}  "
            f"{', '.join(details.targets) or 'portable'}  {details.num_layers} layers, "
            f"{len(details.int8_layers)} planned INT8, {details.rest}  "
            f"{details.size_bytes / _MIB:.2f} MiB  {self.seconds:.1f} s"
        )


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
    """The TensorRT objects of a build, kept alive together because they refer to each other."""

    backend: Backend
    messages: Messages
    builder: Any
    network: Any
    parser: Any
    config: Any
    monitor: Any


def build_engine(source: Network, output: Path, options: BuildOptions) -> EngineSummary:
    """Build an engine from an ONNX model and write it with its sidecar, whole or not at all.

    Ctrl-C cancels the build at TensorRT's next step and leaves no file.

    Args:
        source: an ONNX file, or a model in memory.
        output: the engine to write.
        options: of the build.

    Raises:
        MissingDependencyError: no TensorRT is installed.
        ConfigError: this TensorRT, this GPU or this graph cannot follow an option.
        ArtifactError: the ONNX file cannot be read, or the engine cannot be written.
        EngineError: TensorRT refused the graph; the message quotes its reason.
        RewriteError: the part of the graph that is not INT8 cannot be FP16.
    """
    backend = binding.load(options.backend)
    without_effect = check_options(backend, options)
    for name in without_effect:
        _LOG.warning("option %s has no effect: %s ignores it", name, backend.label)
    _check_paths(source, output, options)
    buildable = read_buildable(source)
    model, rest = with_rest(buildable.proto, options.high_precision)
    where = label_of(source)
    model = with_nms(backend, where, model, options.nms)
    net = net_from_model(model)
    parents = {buildable.name: buildable.sha256}
    started = time.perf_counter()
    built = _run_cancellable(lambda stop: _build(backend, where, model, options, stop))
    seconds = time.perf_counter() - started
    details = EngineDetails(
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
        preprocess=stored_preprocess(net),
        num_classes=nms_classes(net),
    )
    record = write_engine(output, built.plan, parents=parents, options=options, details=details)
    summary = EngineSummary(output, record.sha256, details, seconds)
    _LOG.info("%s", summary)
    return summary


def _targets(backend: Backend, options: BuildOptions) -> tuple[str, ...]:
    """Return the compute capabilities of an engine, () for the default of tensorrt-rtx."""
    if backend.features.builds_without_gpu and options.targets != (CURRENT,):
        return options.targets
    gpu = driver.find_gpu()
    return (gpu.target,) if isinstance(gpu, Gpu) else options.targets


def _check_paths(source: Network, output: Path, options: BuildOptions) -> None:
    """Check before the build what would otherwise make it fail only at its end."""
    for path in (output, options.timing_cache):
        if path is not None:
            require_folder(path)
    read = [source if isinstance(source, Path) else source.path, options.timing_cache]
    refuse_overwriting(output, [path for path in read if path is not None])
    require_suffix(output, ENGINE_SUFFIXES, "an engine")
    if isinstance(source, Path) and options.timing_cache is not None:
        refuse_overwriting(options.timing_cache, [source])


def _run_cancellable(work: Callable[[threading.Event], _T]) -> _T:
    """Run work in a thread, so that Ctrl-C reaches Python and not a callback inside TensorRT.

    The work starts only after the pool has returned its future: from then on Ctrl-C stops it and
    waits for it.
    """
    submitted, stop = threading.Event(), threading.Event()

    def begin() -> _T:
        submitted.wait()
        return work(stop)

    future: Future[_T] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="build-engine") as pool:
        try:
            future = pool.submit(begin)
            submitted.set()
            while not future.done():  # a signal just before a wait is only seen after it
                wait([future], timeout=_SIGNAL_SECONDS)
            return future.result()
        except KeyboardInterrupt:
            stop.set()
            raise
        finally:
            submitted.set()
            future = None  # its exception would keep this frame, and TensorRT's objects, alive


def _build(
    backend: Backend,
    where: str,
    model: onnx.ModelProto,
    options: BuildOptions,
    stop: threading.Event,
) -> _Built:
    with Messages(backend) as messages:
        session = _open(backend, messages, where, model, stop)
        profile = _add_profile(session, options.shapes)
        _configure(session, options)
        plan = _serialize(session, where, options)
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
    where: str,
    model: onnx.ModelProto,
    stop: threading.Event,
) -> _Session:
    """Parse the model into a strongly typed network."""
    versions.register_plugins(backend, messages.logger)
    builder = binding.create_builder(backend, messages)
    network = versions.create_network(backend, builder)
    parser = backend.trt.OnnxParser(network, messages.logger)
    if not parser.parse(bytes_from_model(model)) or parser.num_errors:
        raise EngineError(f"{where}: {backend.label} cannot take {_parser_error(parser, messages)}")
    config = builder.create_builder_config()
    monitor = binding.make_monitor(backend, stop)
    config.progress_monitor = monitor
    return _Session(backend, messages, builder, network, parser, config, monitor)


def _serialize(session: _Session, where: str, options: BuildOptions) -> bytes:
    """Build the engine; read the timing cache before, and extend it afterwards."""
    backend, messages, config = session.backend, session.messages, session.config
    cache = options.timing_cache if backend.features.timing_cache else None
    if cache is not None:
        timing_cache.attach(backend, messages, config, cache)
    messages.errors.clear()
    memory = session.builder.build_serialized_network(session.network, config)
    if memory is None:
        reason = messages.reason()
        raise EngineError(f"{where}: {backend.label} built no engine: {reason}{_hint(options)}")
    if cache is not None and not options.pinned_tactics:
        timing_cache.merge(config, cache)
    return bytes(memory)


def _parser_error(parser: Any, messages: Messages) -> str:
    """Return the parser's first error in one line: node, operator, reason."""
    if not parser.num_errors:
        return f"the graph: {messages.reason()}"
    error = parser.get_error(0)
    reason = one_line(error.desc())
    if reason in ("", "false"):  # all that it says of an operator it does not know
        reason = f"the operator is not supported ({error.code().name})"
    more = f" (and {parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
    return f"node {error.node_name() or error.node()} ({error.node_operator()}): {reason}{more}"


def _add_profile(session: _Session, shapes: ShapeRange | None) -> dict[str, ShapeRange]:
    """Give every input whose shape can change its range; return the ranges by name."""
    network = session.network
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    ranges = {tensor.name: profile_shapes(tensor.name, tensor.shape, shapes) for tensor in inputs}
    profile = {name: shapes for name, shapes in ranges.items() if shapes is not None}
    if not profile:
        return {}
    optimisation = session.builder.create_optimization_profile()
    for name, full in profile.items():
        optimisation.set_shape(name, full.minimum, full.optimum, full.maximum)
    if session.config.add_optimization_profile(optimisation) < 0:
        raise ConfigError(f"{option('shapes')}: refused by TensorRT ({session.messages.reason()})")
    return profile


def _configure(session: _Session, options: BuildOptions) -> None:
    trt, config, features = session.backend.trt, session.config, session.backend.features
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = options.optimization_level
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * _MIB)
    if features.targets:
        versions.set_targets(session.backend, config, options.targets)
    versions.set_hardware_compatibility(session.backend, config, options.hardware_compatible)
    flags = {
        "VERSION_COMPATIBLE": options.version_compatible,
        "REFIT": options.refit,
        "STRIP_PLAN": options.strip_plan,
        "EDITABLE_TIMING_CACHE": features.timing_cache and options.timing_cache is not None,
        "ERROR_ON_TIMING_CACHE_MISS": options.pinned_tactics,
    }
    versions.set_flags(session.backend, config, [name for name, on in flags.items() if on])


def _hint(options: BuildOptions) -> str:
    """Return the option that may have made a build fail."""
    if options.pinned_tactics:
        return (
            f"; {option('pinned_tactics')}: build once without it, so that the timing cache is "
            "complete"
        )
    if options.workspace_mib is not None:
        return f"; {option('workspace_mib')}: {options.workspace_mib} MiB may be too small"
    return ""


def _tensor_infos(get: Callable[[int], Any], count: int) -> tuple[TensorInfo, ...]:
    tensors = [get(index) for index in range(count)]
    return tuple(TensorInfo(t.name, tuple(t.shape), t.dtype.name) for t in tensors)


def _device_memory(session: _Session, plan: bytes) -> int | None:
    """Return the device memory of one context; None with a backend that may not load its engine."""
    if session.backend.features.builds_without_gpu:
        return None
    runtime = session.backend.trt.Runtime(session.messages.logger)
    runtime.engine_host_code_allowed = True  # this process has built what a plan may carry
    engine = runtime.deserialize_cuda_engine(plan)
    return None if engine is None else int(engine.device_memory_size_v2)
