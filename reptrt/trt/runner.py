"""Run an engine, with pycuda for memory, streams and events."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from reptrt.core.arrays import AnyArray
from reptrt.core.errors import ConfigError, DataError, EngineError
from reptrt.graph.input_form import cast_for_input
from reptrt.trt import binding, versions
from reptrt.trt.file import OpenEngine, open_engine
from reptrt.trt.messages import one_line


class TrtRunner:
    """An engine on the first GPU, with the contract of `reptrt.execute.runner.Runner`.

    Host buffers are pinned. They and the device buffers are kept until a batch has another shape.

    Args:
        path: the engine.
        cuda_graph: replay launches as one CUDA graph, where TensorRT offers it (tensorrt_rtx does;
            the bindings of tensorrt leave capturing to the caller, and pycuda cannot).

    Raises:
        ArtifactError: the file cannot be read.
        MissingDependencyError: TensorRT or pycuda is not installed.
        EngineError: no GPU, or an engine that cannot be used here.
    """

    name = "tensorrt"
    threads = None

    def __init__(self, path: Path, *, cuda_graph: bool = True) -> None:
        self._path = path
        self._shape: tuple[int, ...] | None = None
        self._host: dict[str, AnyArray] = {}
        self._device: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            self._opened = stack.enter_context(open_engine(path))
            self._cuda = binding.load_pycuda()
            stack.enter_context(self._primary_context())
            self._stream = self._cuda.Stream()
            self._context = _execution_context(self._opened, cuda_graph)
            stack.callback(self._release)
            self._stack = stack.pop_all()
        trt, engine = self._opened.backend.trt, self._opened.engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        inputs = [name for name in names if modes[name] == trt.TensorIOMode.INPUT]
        if len(inputs) != 1:
            self._stack.close()
            raise EngineError(f"{path}: {len(inputs)} inputs, expected one image batch")
        self.device: str = self._opened.gpu.name
        self.input_name: str = inputs[0]
        self.output_names: list[str] = [name for name in names if name != self.input_name]
        self._dims = tuple(engine.get_tensor_shape(self.input_name))
        self.input_shape = [size if size >= 0 else None for size in self._dims]

    def run(self, batch: AnyArray) -> dict[str, AnyArray]:
        """Return every output for a float32 batch (N, C, H, W), by name.

        Raises:
            DataError: a shape that the engine was not built for.
            EngineError: TensorRT or CUDA failed.
        """
        with self._cuda_errors():
            self._prepare(batch)
            self._copy_in()
            self._execute()
            self._copy_out()
            self._stream.synchronize()
        return {name: self._host[name].copy() for name in self.output_names}

    def time_ms(self, batch: AnyArray, repeats: int, *, host_copies: bool = False) -> AnyArray:
        """Return how long each of ``repeats`` runs took on the GPU, in ms, float64 (repeats,).

        The runs are queued one after the other, each between two CUDA events.

        Args:
            batch: the input.
            repeats: number of runs.
            host_copies: count the copies from and to the host.

        Raises:
            ConfigError: ``repeats`` is not positive.
            DataError: a shape that the engine was not built for.
            EngineError: TensorRT or CUDA failed.
        """
        if repeats < 1:
            raise ConfigError(f"repeats: got {repeats}, expected 1 or more")
        with self._cuda_errors():
            self._prepare(batch)
            self._copy_in()
            events = [(self._cuda.Event(), self._cuda.Event()) for _ in range(repeats)]
            for start, stop in events:
                start.record(self._stream)
                if host_copies:
                    self._copy_in()
                self._execute()
                if host_copies:
                    self._copy_out()
                stop.record(self._stream)
            self._stream.synchronize()
            return np.array([start.time_till(stop) for start, stop in events], dtype=np.float64)

    def __enter__(self) -> "TrtRunner":
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def _primary_context(self) -> Iterator[None]:
        """Make the primary CUDA context current, which TensorRT and torch use too."""
        self._cuda.init()
        context = self._cuda.Device(0).retain_primary_context()
        context.push()
        try:
            yield
        finally:
            context.pop()
            context.detach()

    def _release(self) -> None:
        """Free buffers and execution context while the CUDA context still exists."""
        self._stream.synchronize()
        for memory in self._device.values():
            memory.free()
        self._device, self._host, self._shape = {}, {}, None
        del self._context, self._opened

    def _prepare(self, batch: AnyArray) -> None:
        """Set the input's shape, allocate buffers if it changed, and copy the batch into one."""
        if batch.shape != self._shape:
            self._check_shape(batch.shape)
            self._allocate(batch.shape)
        host = self._host[self.input_name]
        np.copyto(host, cast_for_input(batch, host.dtype))

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        low = high = self._dims
        if -1 in self._dims:
            ranges = self._opened.engine.get_tensor_profile_shape(self.input_name, 0)
            low, high = tuple(ranges[0]), tuple(ranges[2])
        fits = len(shape) == len(low) and all(
            smallest <= size <= largest
            for smallest, size, largest in zip(low, shape, high, strict=True)
        )
        if not fits:
            raise DataError(
                f"{self._path}: batch {shape}, the engine takes {low} to {high}; build it again "
                "for shapes that include this one"
            )

    def _allocate(self, shape: tuple[int, ...]) -> None:
        """Replace all buffers by ones for an input of this shape."""
        opened, context = self._opened, self._context
        for memory in self._device.values():
            memory.free()
        self._device, self._host, self._shape = {}, {}, None
        if not context.set_input_shape(self.input_name, shape):
            raise EngineError(f"{self._path}: shape {shape} refused: {opened.messages.reason()}")
        for name in (self.input_name, *self.output_names):
            dims = tuple(context.get_tensor_shape(name))
            if min(dims, default=0) < 0:
                raise EngineError(f"{self._path}: the shape of {name} depends on the data: {dims}")
            dtype = opened.backend.trt.nptype(opened.engine.get_tensor_dtype(name))
            self._host[name] = self._cuda.pagelocked_empty(dims, dtype)
            self._device[name] = self._cuda.mem_alloc(max(1, self._host[name].nbytes))
            context.set_tensor_address(name, int(self._device[name]))
        self._shape = shape

    def _copy_in(self) -> None:
        name = self.input_name
        self._cuda.memcpy_htod_async(self._device[name], self._host[name], self._stream)

    def _copy_out(self) -> None:
        for name in self.output_names:
            self._cuda.memcpy_dtoh_async(self._host[name], self._device[name], self._stream)

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise EngineError(f"{self._path}: the run failed: {self._opened.messages.reason()}")

    @contextlib.contextmanager
    def _cuda_errors(self) -> Iterator[None]:
        """Turn errors of CUDA, such as out of memory, into an EngineError of one line."""
        try:
            yield
        except self._cuda.Error as err:
            raise EngineError(
                f"{self._path}: CUDA failed on {self.device}: {one_line(str(err))}; "
                "try a smaller batch"
            ) from err


def _execution_context(opened: OpenEngine, cuda_graph: bool) -> Any:
    context = versions.create_context(opened.backend, opened.engine, cuda_graph=cuda_graph)
    if context is None:
        raise EngineError(
            f"{opened.path}: no execution context on {opened.gpu.name}: {opened.messages.reason()}"
        )
    return context
