"""Activations of all calibration images at the boundaries between units, in bounded memory.

What fits the budget is kept in float32; else in half the bytes, float16; else float16 on disk. The
budget is for the process: `working_bytes` of it are for everything else. That is an estimate and
not a measurement, so that the same calibration does the same on every machine.
"""

import mmap
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from reptrt.quantize.reconstruct.units import Layout

Storage = Literal["float32", "float16", "disk"]
_LARGEST = 65504.0  # of float16
_PROGRAM = 1 << 30  # bytes of the interpreter, torch and a net
_COPIES = 8  # of a unit's activations while it is learned: values, gradients, what rounding keeps


class Store:
    """One tensor for all images, (N, *shape)."""

    def __init__(
        self, count: int, shape: Sequence[int], storage: Storage, device: torch.device, folder: Path
    ) -> None:
        self._device = device
        self._half = storage != "float32"
        dtype = torch.float16 if self._half else torch.float32
        self._mapping: mmap.mmap | None = None
        if storage == "disk":
            with tempfile.TemporaryFile(dir=folder) as file:  # goes with its last mapping
                size = 2 * count * int(np.prod(shape))
                file.truncate(max(size, 1))
                self._mapping = mmap.mmap(file.fileno(), max(size, 1))
            array = np.frombuffer(self._mapping, np.float16, size // 2)
            self._values = torch.from_numpy(array.reshape(count, *shape))
        else:
            self._values = torch.empty((count, *shape), dtype=dtype, device=device)

    def __len__(self) -> int:
        return len(self._values)

    def to_host(self) -> None:
        """Move the values to the CPU's memory; reads stay on the device of the computation."""
        self._values = self._values.cpu()

    def write(self, start: int, values: Tensor) -> None:
        """Store images ``start`` and following."""
        if self._half:
            values = values.clamp(-_LARGEST, _LARGEST)
        self._values[start : start + len(values)] = values.detach()
        self._let_go()

    def read(self, index: Tensor | slice) -> Tensor:
        """Return the images of an index, float32 on the device of the computation."""
        if isinstance(index, Tensor):
            index = index.to(self._values.device)
        values = self._values[index].to(self._device, torch.float32)
        self._let_go()
        return values

    def _let_go(self) -> None:
        """Leave the pages of a file to the system, which else count as this process's memory."""
        if self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)


def batches(count: int, size: int) -> Iterator[slice]:
    """Yield slices that cover ``count`` images."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def peak_bytes(layout: Layout, inputs: Sequence[str], count: int) -> int:
    """Return the most bytes that are held at once in float32.

    Both nets' activations at the two boundaries of a unit, and the images, which stay to the end.
    """
    peak, before = 0, tuple(inputs)
    images = sum(int(np.prod(layout.shapes[name])) for name in inputs)
    for unit, after in zip(layout.units, layout.alive, strict=True):
        held = {*before, *after, *unit.outputs} - set(inputs)
        values = images + 2 * sum(int(np.prod(layout.shapes[name])) for name in held)
        peak = max(peak, 4 * count * values)
        before = after
    return peak


def working_bytes(layout: Layout, batch: int) -> int:
    """Return about how many bytes learning takes beside what is kept of all images."""
    sizes = (
        sum(int(np.prod(layout.shapes[name])) for name in (*unit.inputs, *unit.outputs))
        for unit in layout.units
    )
    return _PROGRAM + 4 * _COPIES * batch * max(sizes, default=0)


def choose_storage(peak: int, budget: int) -> Storage:
    """Return where activations of ``peak`` bytes in float32 are kept under a budget in bytes."""
    if peak <= budget:
        return "float32"
    return "float16" if peak // 2 <= budget else "disk"
