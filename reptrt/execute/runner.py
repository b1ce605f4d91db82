"""Run a network on real inputs: ONNX in onnxruntime here, engines in `reptrt.trt.runner`.

The only file that imports onnxruntime. A runner is a context manager; every runner has the
attributes of `Runner`, so that judging and timing take .onnx and .engine files alike.
"""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx_graphsurgeon.logger import G_LOGGER

from reptrt.core.arrays import AnyArray
from reptrt.core.artifacts import is_engine_file
from reptrt.core.choices import Device, RunnerKind
from reptrt.core.errors import ArtifactError, ConfigError, DataError, MissingDependencyError, option
from reptrt.execute.code_sums import SUMS
from reptrt.execute.lowering import lower
from reptrt.graph.input_form import cast_for_input
from reptrt.graph.model import Model, label_of, proto_of
from reptrt.graph.net import bytes_from_model, used_inputs
from reptrt.trt.machine import may_saturate

_PROVIDERS: dict[Device, list[str]] = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
}
# Would multiply the integer weights of `reptrt.execute.code_sums` by their scales.
_INEXACT = ["ConvMulFusion"]
# Drops a ReLU before a Q of FP8, as if its codes could not be negative (onnxruntime 1.32).
_INEXACT_FP8 = ["ReluQuantRewrite"]
_FP8 = (onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT8E5M2)
_CAST_INPUTS = {"tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
_LOG_FATAL = 4  # errors are raised as exceptions; logging them would print them twice


class Runner(Protocol):
    """What every runner offers."""

    @property
    def name(self) -> str:
        """The runtime: "onnxruntime", "tensorrt"..."""

    @property
    def device(self) -> str:
        """Where it runs."""

    @property
    def threads(self) -> int | None:
        """CPU threads; None if the runtime does not run on CPU threads of its own."""

    @property
    def input_name(self) -> str:
        """Name of the only input."""

    @property
    def input_shape(self) -> Sequence[int | None]:
        """Shape of the input; None for each axis of any size."""

    @property
    def output_names(self) -> Sequence[str]:
        """Names of the outputs, in the model's order."""

    def run(self, batch: AnyArray) -> dict[str, AnyArray]:
        """Return every output for a batch of images (N, C, H, W), by name.

        Raises:
            DataError: the runtime rejects the batch, or fails on it.
        """

    def __enter__(self) -> "Runner": ...

    def __exit__(self, *raised: object) -> None: ...


@runtime_checkable
class EventTimer(Protocol):
    """A runner on a GPU that can time its runs there."""

    def time_ms(self, batch: AnyArray, repeats: int, *, host_copies: bool = False) -> AnyArray:
        """Return how long each of ``repeats`` runs took on the GPU, in ms, float64 (repeats,)."""


class OrtRunner:
    """A network in onnxruntime.

    Worker threads stop spinning when a run ends, so that sessions that are open at the same time do
    not occupy each other's cores.

    Args:
        model: an ONNX file, a model in memory, or the bytes of a file.
        threads: CPU threads for one operator; None: as many as this process may use cores.
        device: "cuda" and "tensorrt" need onnxruntime-gpu.

    Raises:
        ArtifactError: the model is not an ONNX file, or onnxruntime rejects it.
        ConfigError: the device is not available.
        MissingDependencyError: onnxruntime is not installed.
    """

    name = "onnxruntime"

    def __init__(
        self, model: bytes | Path | Model, *, threads: int | None = None, device: Device = "cpu"
    ) -> None:
        if threads is not None and threads < 1:
            raise ConfigError(f"threads: got {threads}, expected at least 1")
        self.device = device
        self.threads = threads or usable_cores()
        self._where = _label(model)
        options = _session_options(self.threads)
        self._session = _session(self._where, _runnable(model, self._where), options, device)
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise ArtifactError(f"{self._where}: {len(inputs)} inputs, expected one image batch")
        self.input_name: str = inputs[0].name
        self._dtype = _CAST_INPUTS.get(inputs[0].type)
        self.input_shape = [size if isinstance(size, int) else None for size in inputs[0].shape]
        self.output_names: list[str] = [output.name for output in self._session.get_outputs()]

    def run(self, batch: AnyArray) -> dict[str, AnyArray]:
        """Return every output for a float32 batch (n, C, H, W), by name; float16 ones as float32.

        Raises:
            DataError: onnxruntime rejects the batch, or fails on it.
        """
        cast = batch if self._dtype is None else cast_for_input(batch, self._dtype)
        try:
            outputs = self._session.run(self.output_names, {self.input_name: cast})
        except _ort_failures() as err:
            raise DataError(
                f"{self._where}: onnxruntime failed on a {batch.dtype} batch {batch.shape}, "
                f"input {self.input_name} is {self.input_shape} ({_reason(err)})"
            ) from err
        wide = (o.astype(np.float32) if o.dtype == np.float16 else o for o in outputs)
        return dict(zip(self.output_names, wide, strict=True))

    def __enter__(self) -> "OrtRunner":
        return self

    def __exit__(self, *raised: object) -> None:
        self._session = None


def open_runner(
    model: Path | Model,
    *,
    runner: RunnerKind = "auto",
    threads: int | None = None,
    device: Device = "cpu",
) -> Runner:
    """Open an .onnx file or a model in memory in onnxruntime, or an engine in TensorRT.

    Args:
        model: a file, whose suffix selects the runtime; or a model in memory.
        runner: "ort" accepts ONNX models only, "tensorrt" engines only.
        threads: CPU threads of onnxruntime.
        device: device of onnxruntime.

    Raises:
        ConfigError: ``runner`` does not accept this kind of model.
        ArtifactError: the file cannot be used.
        MissingDependencyError: the runtime is not installed.
    """
    engine = model if isinstance(model, Path) and is_engine_file(model) else None
    if engine is not None and runner == "ort":
        raise ConfigError(f"{engine}: an engine cannot run in onnxruntime; give the .onnx file")
    if engine is None and runner == "tensorrt":
        where = label_of(model)
        raise ConfigError(f"{where}: not an .engine or .plan file; build an engine from it first")
    if engine is not None:
        from reptrt.trt.runner import TrtRunner

        return TrtRunner(engine)
    return OrtRunner(model, threads=threads, device=device)


def outputs_in_parts(runner: Runner, batch: AnyArray) -> Iterator[dict[str, AnyArray]]:
    """Yield all outputs for a batch (n, C, H, W), in parts if the network has a fixed batch size.

    The last part is padded with copies of the last image, whose outputs are dropped.
    """
    size = runner.input_shape[0] or len(batch)
    for start in range(0, len(batch), size):
        images = batch[start : start + size]
        missing = size - len(images)
        if missing:
            images = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])
        outputs = runner.run(images)
        yield {
            name: output[: size - missing] if missing and output.ndim else output
            for name, output in outputs.items()
        }


def optimized_nodes(model: bytes | Path | Model) -> list[tuple[str, str]]:
    """Return the name and operator of every node that onnxruntime runs on the CPU, in order.

    Raises:
        ArtifactError: the model is not an ONNX file, or onnxruntime rejects it.
        MissingDependencyError: onnxruntime is not installed.
    """
    where = _label(model)
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = _session_options(threads=1)
        options.optimized_model_filepath = str(optimized)
        _session(where, _runnable(model, where), options, "cpu")
        graph = onnx.load(str(optimized)).graph
    return [(_layer_name(node.name), node.op_type) for node in graph.node]


def _layer_name(name: str) -> str:
    """Return the model's own name of a node: without the suffixes that rewriting adds."""
    return name.removesuffix("_nchwc").removesuffix(SUMS)


def ort_version() -> str:
    """Return the version of onnxruntime."""
    return str(_onnxruntime().__version__)


def usable_cores() -> int:
    """Return how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _runnable(model: bytes | Path | Model, where: str) -> onnx.ModelProto:
    """Return the lowered model, which is the form that onnxruntime runs.

    Lowering assumes a valid graph. If it fails, onnxruntime loads the original model first: if
    onnxruntime rejects that too, its error names the defect.
    """
    proto = _model_proto(model)
    try:
        # Scales of 0 or 1e38: onnxruntime judges them. Of FP8 constants onnx-graphsurgeon warns on
        # stdout, where results belong.
        with np.errstate(all="ignore"), G_LOGGER.suppress(G_LOGGER.ERROR):
            return _without_unused_inputs(lower(proto))
    except (ValueError, LookupError, TypeError) as err:
        _session(where, proto, _session_options(threads=1), "cpu")
        raise ArtifactError(
            f"{where}: the constants of a layer do not fit each other ({err}); export it anew"
        ) from err


def _without_unused_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model without the inputs that no node reads, for which there are no images."""
    if len(model.graph.input) == 1:
        return model
    pruned = onnx.ModelProto()
    pruned.CopyFrom(model)
    del pruned.graph.input[:]
    pruned.graph.input.extend(used_inputs(model.graph))
    return pruned


def refuse_unrunnable(model: onnx.ModelProto, where: str, source: onnx.ModelProto) -> None:
    """Open a model in onnxruntime exactly as it will be written, and close it again.

    Args:
        model: what a stage made.
        where: what messages call it.
        source: what it was made from. If onnxruntime refuses that too, because its operators are
            those of another runtime, nothing can be said and nothing is refused.

    Raises:
        ArtifactError: onnxruntime refuses the model, but not its source.
    """
    options = _session_options(threads=1)
    options.graph_optimization_level = _onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        _session(where, model, options, "cpu")
    except ArtifactError as refusal:
        try:
            _session(where, source, options, "cpu")
        except ArtifactError:
            return
        raise ArtifactError(f"{refusal}, but not its source; nothing was written") from refusal


def _label(model: bytes | Path | Model) -> str:
    return "model" if isinstance(model, bytes) else label_of(model)


def _model_proto(model: bytes | Path | Model) -> onnx.ModelProto:
    if not isinstance(model, bytes):
        return proto_of(model)
    try:
        return onnx.load_model_from_string(model)
    except DecodeError as err:
        raise ArtifactError(f"model: {len(model)} bytes are not an ONNX model ({err})") from err


def _session_options(threads: int) -> Any:
    options = _onnxruntime().SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if may_saturate():  # with UINT8 weights no CPU saturates, but kernels are half as fast
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def _session(where: str, model: onnx.ModelProto, options: Any, device: Device) -> Any:
    ort = _onnxruntime()
    providers = _PROVIDERS[device]
    available = ort.get_available_providers()
    if providers[0] not in available:
        raise ConfigError(
            f"{option('device')}: got {device}, this onnxruntime has no {providers[0]}, only "
            f"{', '.join(available)}; install onnxruntime-gpu in place of onnxruntime, or use the "
            "cpu"
        )
    has_fp8 = any(tensor.data_type in _FP8 for tensor in model.graph.initializer)
    inexact = [*_INEXACT, *_INEXACT_FP8 * has_fp8]
    content = bytes_from_model(model)
    try:
        session = ort.InferenceSession(
            content, options, providers=providers, disabled_optimizers=inexact
        )
    except _ort_failures() as err:
        raise ArtifactError(
            f"{where}: onnxruntime {ort.__version__} refuses this model ({_reason(err)})"
        ) from err
    if providers[0] not in session.get_providers():
        raise ConfigError(
            f"{option('device')}: got {device}, {providers[0]} could not start on this machine; "
            "check the driver and the CUDA libraries, or use the cpu"
        )
    return session


def _onnxruntime() -> ModuleType:
    try:
        with _quiet_stderr() if "onnxruntime" not in sys.modules else contextlib.nullcontext():
            import onnxruntime  # noqa: TID251
    except ImportError as err:
        raise MissingDependencyError(
            f"onnxruntime cannot be imported ({err}); install it with: pip install onnxruntime "
            "(or onnxruntime-gpu)"
        ) from err
    onnxruntime.set_default_logger_severity(_LOG_FATAL)
    module: ModuleType = onnxruntime
    return module


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Discard what C++ code writes to stderr.

    On machines whose first display card is not on the PCI bus (WSL, cloud machines) onnxruntime
    prints a harmless warning when it is imported, before its log level can be set.
    """
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _ort_failures() -> tuple[type[Exception], ...]:
    """Return the exception types that onnxruntime raises; they have no common base class."""
    state = _onnxruntime().capi.onnxruntime_pybind11_state
    own = [kind for kind in vars(state).values() if isinstance(kind, type)]
    return (*(k for k in own if issubclass(k, Exception)), RuntimeError, ValueError, TypeError)


def _reason(err: Exception) -> str:
    """Return an onnxruntime message in one line, without its prefix and source paths."""
    text = " ".join(str(err).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    return re.sub(r"/\S*onnxruntime\S*:\d+ .*?\)(?: const)? (?=\S)", "", text)
