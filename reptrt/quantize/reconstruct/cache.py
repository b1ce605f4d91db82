"""Activations of all calibration images at the boundaries between units, in bounded memory.

Activations are stored in float32 if they fit the memory budget, else in float16 in memory, else in
float16 on disk. The budget is for the whole process: `working_bytes` estimates what everything else
takes. It is an estimate, not a measurement, so that a calibration gives the same result on every
machine.
"""

import mmap
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from reptrt.data.dataset import Dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.quantize.calib.collect import COMPUTE_BATCH
from reptrt.quantize.reconstruct.units import Layout

Storage = Literal["float32", "float16", "disk"]
Hooks = Mapping[str, Callable[..., Tensor]]  # node name -> function that replaces the node

_LARGEST = 65504.0  # of float16
_PROGRAM = 1 << 30  # bytes of the interpreter, torch and a net
_COPIES = 8  # copies of a unit's activations while it is learned: values, gradients, saved tensors


class Store:
    """One tensor for all images, (N, *shape)."""

    def __init__(
        self, count: int, shape: Sequence[int], storage: Storage, device: torch.device, folder: Path
    ) -> None:
        self._device = device
        # On a CPU, images lie in memory as `spatial_layout` wants them: (n, H, W, C).
        is_last = len(shape) == 3 and device.type == "cpu"
        self._axes = (0, 3, 1, 2) if is_last else None
        stored = (*shape[1:], shape[0]) if is_last else tuple(shape)
        self._half = storage != "float32"
        dtype = torch.float16 if self._half else torch.float32
        self._mapping: mmap.mmap | None = None
        if storage == "disk":
            with tempfile.TemporaryFile(dir=folder) as file:  # deleted with its last mapping
                size = 2 * count * int(np.prod(shape))
                file.truncate(max(size, 1))
                self._mapping = mmap.mmap(file.fileno(), max(size, 1))
            array = np.frombuffer(self._mapping, np.float16, size // 2)
            self._values = torch.from_numpy(array.reshape(count, *stored))
        else:
            self._values = torch.empty((count, *stored), dtype=dtype, device=device)

    def to_host(self) -> None:
        """Move the values to CPU memory; `read` still returns tensors on the computing device."""
        self._values = self._values.cpu()

    def write(self, start: int, values: Tensor) -> None:
        """Store the values of the images ``start``, ``start + 1``, ..."""
        if self._half:
            values = values.clamp(-_LARGEST, _LARGEST)
        self._as_read(self._values[start : start + len(values)]).copy_(values.detach())
        self._release_pages()

    def read(self, index: Tensor | slice) -> Tensor:
        """Return the values of the indexed images, float32 on the computing device."""
        if isinstance(index, Tensor):
            index = index.to(self._values.device)
        values = self._values[index].to(self._device, torch.float32)
        self._release_pages()
        return self._as_read(values)

    def _as_read(self, values: Tensor) -> Tensor:
        """Return stored images as a view (n, C, H, W)."""
        return values if self._axes is None else values.permute(self._axes)

    def _release_pages(self) -> None:
        """Return the pages of a file to the system; they would count as this process's memory."""
        if self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)


class Activations:
    """Both nets' tensors at the boundary that the run has reached, for all images.

    Attributes:
        quantized: tensor name -> values in the quantized net.
        float: tensor name -> values in the float net.
    """

    def __init__(
        self, dataset: Dataset, layout: Layout, storage: Storage, device: torch.device, folder: Path
    ) -> None:
        self.quantized: dict[str, Store] = {}
        self.float: dict[str, Store] = {}
        self._dataset, self._layout = dataset, layout
        self._storage, self._device, self._folder = storage, device, folder

    def load_images(self, name: str) -> None:
        """Start at the first boundary: the images, one store for both nets."""
        images = self._new_store(name)
        start = 0
        for batch in self._dataset.batches(COMPUTE_BATCH):
            images.write(start, torch.from_numpy(batch))
            start += len(batch)
        self.quantized[name] = self.float[name] = images

    def propagate(
        self,
        graph: TorchGraph,
        inputs: Sequence[str],
        outputs: Sequence[str],
        source: Mapping[str, Store],
        constants: Mapping[str, Tensor],
        hooks: Hooks,
    ) -> dict[str, Store]:
        """Run all images from the inputs to the outputs; return new stores of the outputs."""
        stores = {name: self._new_store(name) for name in outputs}
        with torch.no_grad():
            for part in batches(self._dataset.length, COMPUTE_BATCH):
                values = graph.run(
                    {**read(source, inputs, part), **constants}, outputs, replace=hooks
                )
                for name in outputs:
                    stores[name].write(part.start, values[name])
        return stores

    def keep_only(self, names: Sequence[str]) -> None:
        """Drop all tensors but the named ones."""
        for stores in (self.quantized, self.float):
            for name in stores.keys() - set(names):
                del stores[name]

    def to_host(self) -> None:
        """Move all values to CPU memory."""
        for store in (*self.quantized.values(), *self.float.values()):
            store.to_host()

    def _new_store(self, name: str) -> Store:
        shape = self._layout.shapes[name]
        return Store(self._dataset.length, shape, self._storage, self._device, self._folder)


def read(
    stores: Mapping[str, Store], names: Sequence[str], index: Tensor | slice
) -> dict[str, Tensor]:
    """Return the values of the indexed images by tensor name."""
    return {name: stores[name].read(index) for name in names}


def batches(count: int, size: int) -> Iterator[slice]:
    """Yield slices of at most ``size`` that cover ``count`` images."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def peak_bytes(layout: Layout, inputs: Sequence[str], count: int) -> int:
    """Return the largest number of bytes that activations take at once in float32.

    That is, for some unit, both nets' tensors at the two boundaries of the unit; the images are
    stored once for both nets.
    """
    peak, before = 0, tuple(inputs)
    for unit, after in zip(layout.units, layout.alive, strict=True):
        held = {*before, *after, *unit.outputs}
        values = sum(
            (1 if name in inputs else 2) * int(np.prod(layout.shapes[name])) for name in held
        )
        peak = max(peak, 4 * count * values)
        before = after
    return peak


def working_bytes(layout: Layout, batch: int) -> int:
    """Return an estimate of the bytes that learning takes beside the stored activations."""
    sizes = (
        sum(int(np.prod(layout.shapes[name])) for name in (*unit.inputs, *unit.outputs))
        for unit in layout.units
    )
    return _PROGRAM + 4 * _COPIES * batch * max(sizes, default=0)


def choose_storage(peak: int, budget: int) -> Storage:
    """Return where to store activations of ``peak`` bytes in float32 under a budget in bytes."""
    if peak <= budget:
        return "float32"
    return "float16" if peak // 2 <= budget else "disk"
