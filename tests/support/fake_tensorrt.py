"""Fake TensorRT modules with exactly the names of a real release, which record all calls.

``tensorrt_api.json`` contains the names of classes and enums in the bindings wheels of each
release. To read or set another name raises AttributeError.
"""

import enum
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

API = json.loads((Path(__file__).parent / "tensorrt_api.json").read_text())
FULL_RELEASES = [release for release in API if not release.startswith("tensorrt-rtx")]
_ENUMS = (
    "BuilderFlag",
    "NetworkDefinitionCreationFlag",
    "HardwareCompatibilityLevel",
    "ProfilingVerbosity",
    "MemoryPoolType",
    "LayerInformationFormat",
    "DataType",
    "TensorIOMode",
    "CudaGraphStrategy",
    "EngineValidity",
    "ErrorCode",
    "ComputeCapability",
)


class Strict:
    """An object with the recorded names of one class only; calls and settings go to ``calls``."""

    def __init__(self, module: "FakeTensorrt", kind: str, **values: Any) -> None:
        unknown = set(values) - module.names(kind)
        assert not unknown, f"the fake gives {kind} names it does not have: {unknown}"
        self.__dict__.update(_module=module, _kind=kind, _values=values)

    def __getattr__(self, name: str) -> Any:
        self._module.check(self._kind, name)
        value = self._values.get(name, lambda *args: None)
        return self._module.recording(f"{self._kind}.{name}", value) if callable(value) else value

    def __setattr__(self, name: str, value: Any) -> None:
        self._module.check(self._kind, name)
        self._module.calls.append((f"{self._kind}.{name}", value))
        self._values[name] = value


class FakeTensorrt(types.ModuleType):
    """The module of one release, for a machine with one GPU."""

    def __init__(self, release: str) -> None:
        super().__init__("tensorrt_rtx" if "rtx" in release else "tensorrt")
        self.release = release
        self.__version__ = release.rsplit("-", 1)[1]
        self.calls: list[tuple[Any, ...]] = []
        self.gpu = "gpu0"  # the device that timing caches belong to
        self.cuda = FakeCuda()
        self.refuses_engine = ""  # what Runtime.deserialize_cuda_engine says
        self.validity = ("VALID", 0)
        self.inspector_text = ""
        self.input_dtype = "FLOAT"
        self.batches = (1, 8, 64)  # of the engine: input (N, 3, 4, 4) -> sums (N, 2)
        for name in _ENUMS:
            if name in API[release]:
                setattr(self, name, enum.IntEnum(name, API[release][name].split(), start=0))
        self.ILogger = type("ILogger", (), {"Severity": _SEVERITY, "__init__": lambda self: None})
        self.IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda self: None})
        self.IBuilderConfig = self._class("IBuilderConfig", None)
        self.init_libnvinfer_plugins = self.recording("init_libnvinfer_plugins", lambda *args: True)
        self.nptype = lambda dtype: {"FLOAT": np.float32, "HALF": np.float16}[dtype.name]
        self.Builder = self._class("Builder", self._builder)
        self.OnnxParser = self._class("OnnxParser", self._parser)
        self.Runtime = self._class("Runtime", self._runtime)

    def names(self, kind: str) -> set[str]:
        return set(API[self.release][kind].split())

    def check(self, kind: str, name: str) -> None:
        if name not in self.names(kind):
            raise AttributeError(f"{kind} of {self.release} has no {name!r}")

    def recording(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.calls.append((name, *args))
            return function(*args)

        return call

    def called(self, name: str) -> list[tuple[Any, ...]]:
        """Return the arguments of every call (or setting) of ``Class.name``."""
        return [call[1:] for call in self.calls if call[0] == name]

    def flags(self) -> set[str]:
        """Return the builder flags that were set on the last config."""
        names = [call[0] for call in self.calls]
        last = len(names) - names[::-1].index("Builder.create_builder_config")
        return {call[1].name for call in self.calls[last:] if call[0] == "IBuilderConfig.set_flag"}

    def _class(self, name: str, make: Callable[..., Any] | None) -> type:
        body: dict[str, Any] = dict.fromkeys(self.names(name))
        if make is not None:
            body["__new__"] = lambda cls, *args: make(*args)
        return type(name, (), body)

    def _builder(self, logger: Any) -> Strict:
        self.log = lambda message: logger.log(_SEVERITY.ERROR, message)
        return Strict(
            self,
            "Builder",
            create_network=lambda flags: Strict(self, "INetworkDefinition", name="net"),
            create_builder_config=self._config,
            create_optimization_profile=lambda: Strict(
                self, "IOptimizationProfile", set_shape=lambda *args: None
            ),
            build_serialized_network=self._build,
        )

    def _config(self) -> Strict:
        caches: list[FakeTimingCache] = []

        def set_timing_cache(cache: FakeTimingCache, ignore_mismatch: bool) -> bool:
            caches[:] = [cache]
            return ignore_mismatch or cache.gpu == self.gpu

        targets: dict[str, Any] = {}
        if "set_compute_capability" in self.names("IBuilderConfig"):
            targets["set_compute_capability"] = lambda capability, index: True
        return Strict(
            self,
            "IBuilderConfig",
            **targets,
            add_optimization_profile=lambda profile: 0,
            create_timing_cache=lambda content: FakeTimingCache.parse(content, self.gpu),
            set_timing_cache=set_timing_cache,
            get_timing_cache=lambda: caches[0] if caches else None,
            progress_monitor=None,
        )

    def _parser(self, network: Strict, logger: Any) -> Strict:
        def parse(content: bytes) -> bool:
            graph = onnx.load_from_string(content).graph
            inputs, outputs = self._tensors(graph.input), self._tensors(graph.output)
            network._values.update(
                num_inputs=len(inputs),
                num_outputs=len(outputs),
                num_layers=len(graph.node),
                get_input=inputs.__getitem__,
                get_output=outputs.__getitem__,
            )
            return True

        return Strict(self, "OnnxParser", parse=parse, num_errors=0)

    def _tensors(self, infos: Any) -> list[Strict]:
        return [
            Strict(
                self,
                "ITensor",
                name=info.name,
                shape=[d.dim_value or -1 for d in info.type.tensor_type.shape.dim],
                dtype=self.DataType.FLOAT,
            )
            for info in infos
        ]

    def _build(self, network: Strict, config: Strict) -> bytes | None:
        monitor = config.progress_monitor
        for step in range(3):
            if not monitor.step_complete("Building engine", step):
                self.log("BuildCanceled (Build canceled by user)")
                return None
        cache = config._values["get_timing_cache"]()
        missing = cache is not None and "conv" not in cache.keys
        if missing and "ERROR_ON_TIMING_CACHE_MISS" in self.flags():
            self.log("Error Code 4: no timing of conv in the timing cache")
            return None
        if cache is not None:
            cache.keys.add("conv")
        return plan_of(self)

    def _runtime(self, logger: Any) -> Strict:
        def deserialize(plan: bytes) -> Strict | None:
            if self.refuses_engine:
                logger.log(_SEVERITY.ERROR, self.refuses_engine)
                return None
            return self._engine()

        answers: dict[str, Any] = {"deserialize_cuda_engine": deserialize}
        if "get_engine_validity" in self.names("Runtime"):
            validity, bits = self.validity
            answers["get_engine_validity"] = lambda plan: (self.EngineValidity[validity], bits)
        return Strict(self, "Runtime", **answers)

    def _engine(self) -> Strict:
        mode = {"input": self.TensorIOMode.INPUT, "sums": self.TensorIOMode.OUTPUT}
        shapes = {"input": (-1, 3, 4, 4), "sums": (-1, 2)}
        dtypes = {"input": self.DataType[self.input_dtype], "sums": self.DataType.FLOAT}
        answers: dict[str, Any] = {
            "device_memory_size_v2": 4096,
            "num_io_tensors": 2,
            "get_tensor_name": list(shapes).__getitem__,
            "get_tensor_mode": mode.__getitem__,
            "get_tensor_shape": shapes.__getitem__,
            "get_tensor_dtype": dtypes.__getitem__,
            "get_tensor_profile_shape": lambda name, index: [(n, 3, 4, 4) for n in self.batches],
            "create_execution_context": lambda *config: self._context(),
            "create_engine_inspector": lambda: Strict(
                self, "EngineInspector", get_engine_information=lambda form: self.inspector_text
            ),
        }
        if "create_runtime_config" in self.names("ICudaEngine"):
            answers["create_runtime_config"] = lambda: Strict(self, "IRuntimeConfig")
        return Strict(self, "ICudaEngine", **answers)

    def _context(self) -> Strict:
        shape: list[int] = []
        addresses: dict[str, int] = {}

        def set_input_shape(name: str, new_shape: tuple[int, ...]) -> bool:
            shape[:] = new_shape
            return True

        def execute(stream: int) -> bool:
            batch = np.frombuffer(self.cuda.memory[addresses["input"]], self._input_type())
            rows = batch.reshape(shape[0], -1).astype(np.float32)
            sums = np.stack([rows.sum(axis=1), rows.max(axis=1)], axis=1)
            self.cuda.memory[addresses["sums"]][:] = sums.tobytes()
            return True

        return Strict(
            self,
            "IExecutionContext",
            set_input_shape=set_input_shape,
            get_tensor_shape=lambda name: shape if name == "input" else [shape[0], 2],
            set_tensor_address=addresses.__setitem__,
            execute_async_v3=execute,
        )

    def _input_type(self) -> type:
        return self.nptype(self.DataType[self.input_dtype])


class FakeCuda(types.ModuleType):
    """``pycuda.driver`` with memory in a dictionary; all allocated memory must be freed."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pycuda.driver")
        self.memory: dict[int, bytearray] = {}
        self.contexts: list[str] = []  # what happened to the primary context
        self.limit = 1 << 30
        self.clock = 0.0

    def init(self) -> None:
        self.contexts.append("init")

    def Device(self, number: int) -> Any:  # noqa: N802
        says = self.contexts.append
        context = types.SimpleNamespace(
            push=lambda: says("push"), pop=lambda: says("pop"), detach=lambda: says("detach")
        )
        return types.SimpleNamespace(retain_primary_context=lambda: context)

    def Stream(self) -> Any:  # noqa: N802
        return types.SimpleNamespace(handle=7, synchronize=lambda: None)

    def Event(self) -> Any:  # noqa: N802
        event = types.SimpleNamespace(at=None)

        def record(stream: Any) -> None:
            self.clock += 0.5
            event.at = self.clock

        event.record = record
        event.time_till = lambda other: other.at - event.at
        return event

    def mem_alloc(self, size: int) -> "FakeMemory":
        if size > self.limit:
            raise self.Error("cuMemAlloc failed: out of memory")
        memory = FakeMemory(self, 4096 * (1 + len(self.memory)))
        while int(memory) in self.memory:
            memory = FakeMemory(self, int(memory) + 4096)
        self.memory[int(memory)] = bytearray(size)
        return memory

    def pagelocked_empty(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        return np.empty(shape, dtype)

    def memcpy_htod_async(self, device: "FakeMemory", host: np.ndarray, stream: Any) -> None:
        self.memory[int(device)][:] = host.tobytes()
        self.clock += 0.125

    def memcpy_dtoh_async(self, host: np.ndarray, device: "FakeMemory", stream: Any) -> None:
        host[...] = np.frombuffer(self.memory[int(device)], host.dtype).reshape(host.shape)
        self.clock += 0.125


class FakeMemory:
    """A piece of device memory."""

    def __init__(self, cuda: FakeCuda, address: int) -> None:
        self.cuda, self.address = cuda, address

    def __int__(self) -> int:
        return self.address

    def free(self) -> None:
        del self.cuda.memory[self.address]


def plan_of(fake: FakeTensorrt) -> bytes:
    """Return the bytes of an engine of this release."""
    tag = b"vtrt" if fake.__name__ == "tensorrt_rtx" else b"ftrt"
    version = bytes(int(part) for part in fake.__version__.split("."))
    return tag + bytes(12) + (64).to_bytes(8, "little") + version + bytes(36)


class FakeTimingCache:
    """A set of measured layers on one GPU; its file is JSON."""

    def __init__(self, gpu: str, keys: set[str]) -> None:
        self.gpu, self.keys = gpu, keys

    @classmethod
    def parse(cls, content: bytes, gpu: str) -> "FakeTimingCache":
        if not content:
            return cls(gpu, set())
        try:
            read = json.loads(content)
        except ValueError:
            raise TypeError("factory function returned nullptr") from None
        return cls(read["gpu"], set(read["keys"]))

    def combine(self, other: "FakeTimingCache", ignore_mismatch: bool) -> bool:
        if other.gpu != self.gpu and not ignore_mismatch:
            return False
        self.keys |= other.keys
        return True

    def serialize(self) -> bytes:
        return json.dumps({"gpu": self.gpu, "keys": sorted(self.keys)}).encode()


_SEVERITY = enum.IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)
