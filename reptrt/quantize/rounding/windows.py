"""What the outputs of a layer are products of: rows of its input (im2col)."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from reptrt.execute.torchops.window import pad_with, same_pads
from reptrt.graph.net import constant_value


@dataclass(frozen=True, slots=True)
class Window:
    """How a layer reads its input; an empty kernel is that of a matrix product."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]  # before each axis, then after each; empty if ``auto`` decides
    auto: str  # SAME_UPPER, SAME_LOWER or ""
    groups: int

    def rows(self, x: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Return the inputs of outputs at random positions, (rows, groups, inputs of an output).

        Args:
            x: input of the layer, (N, C, ...), or (..., C) of a matrix product.
            count: of rows; at most all.
            rng: draws the positions.
        """
        if not self.kernel:
            flat = x.reshape(-1, 1, x.shape[-1])
            return flat[_drawn(len(flat), count, rng)]
        before, after = self._pads(x.shape[2:])
        x = pad_with(x, before, after, 0.0)
        sizes = self._outputs(x.shape[2:])
        batch, channel, *axes = x.stride()
        moves = [a * stride for a, stride in zip(axes, self.strides, strict=True)]
        taps = [a * dilation for a, dilation in zip(axes, self.dilations, strict=True)]
        # A view: nothing is copied but the rows that are drawn. Channels are the last axis, since
        # that is how activations lie in memory.
        shape = (len(x), *sizes, *self.kernel, x.shape[1])
        windows = x.as_strided(shape, (batch, *moves, *taps, channel), x.storage_offset())
        drawn = _drawn(len(x) * math.prod(sizes), count, rng).numpy()
        places = np.unravel_index(drawn, (len(x), *sizes))
        rows = windows[tuple(torch.from_numpy(p) for p in places)]
        return rows.movedim(-1, 1).reshape(len(drawn), self.groups, -1)

    @property
    def taps(self) -> int:
        """Taps of the kernel; 1 of a matrix product."""
        return math.prod(self.kernel)

    @property
    def overlaps(self) -> bool:
        """Whether outputs share inputs as in a convolution of stride 1."""
        return self.taps > 1 and set(self.strides) == {1}

    @property
    def displacements(self) -> list[tuple[int, ...]]:
        """How far apart, in taps, two taps of the kernel can lie; one of each two opposite ones."""
        every = itertools.product(*(range(1 - taps, taps) for taps in self.kernel))
        return [by for by in every if by >= (0,) * len(by)]

    def pair(self, tap: Sequence[int], displacement: Sequence[int]) -> tuple[int, int]:
        """Return the places in a flattened kernel of a tap, and of the one that is displaced."""
        first = second = 0
        for at, by, taps in zip(tap, displacement, self.kernel, strict=True):
            first, second = first * taps + at, second * taps + at + by
        return first, second

    def positions(self, sizes: Sequence[int]) -> int:
        """Return the number of outputs of a convolution along all axes.

        Args:
            sizes: of the axes of its input.
        """
        before, after = self._pads(sizes)
        padded = [sum(of_axis) for of_axis in zip(sizes, before, after, strict=True)]
        return math.prod(self._outputs(padded))

    def spans(self, sizes: Sequence[int], axis: int, displacement: int) -> list[range | None]:
        """Return where each tap lies while a tap further on lies inside too, with stride 1.

        Args:
            sizes: of the axes of the input.
            axis: of the kernel.
            displacement: between the two taps.

        Returns:
            Positions of each tap over all outputs; None where there is no such other tap.
        """
        size, taps, dilation = sizes[axis], self.kernel[axis], self.dilations[axis]
        before, after = (pads[axis] for pads in self._pads(sizes))
        outputs = size + before + after - (taps - 1) * dilation
        found: list[range | None] = []
        for tap in range(taps):
            first, second = (t * dilation - before for t in (tap, tap + displacement))
            low = max(0, -first, -second)
            high = min(outputs, size - first, size - second)
            there_is = 0 <= tap + displacement < taps
            found.append(range(low + first, high + first) if there_is else None)
        return found

    def _outputs(self, padded: Sequence[int]) -> list[int]:
        """Return the number of outputs along each axis."""
        return [
            (size - (taps - 1) * dilation - 1) // stride + 1
            for size, taps, stride, dilation in zip(
                padded, self.kernel, self.strides, self.dilations, strict=True
            )
        ]

    def _pads(self, sizes: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        if self.auto:
            return same_pads(sizes, self.kernel, self.strides, self.dilations, self.auto)
        half = len(self.kernel)
        return self.pads[:half], self.pads[half:]


def window_of(node: gs.Node) -> Window | None:
    """Return how a node reads its input; None for a kind of layer that has no such rows.

    Args:
        node: a Conv, Gemm or MatMul with a constant weight.
    """
    weight = constant_value(node.inputs[1]) if len(node.inputs) > 1 else None
    if weight is None:
        return None
    if node.op == "Conv":
        rank = weight.ndim - 2
        auto = node.attrs.get("auto_pad", "NOTSET")
        pads = () if auto == "VALID" else node.attrs.get("pads") or ()
        return Window(
            kernel=weight.shape[2:],
            strides=tuple(node.attrs.get("strides") or (1,) * rank),
            dilations=tuple(node.attrs.get("dilations") or (1,) * rank),
            pads=tuple(pads) or (0,) * (2 * rank),
            auto=auto if auto.startswith("SAME") else "",
            groups=int(node.attrs.get("group", 1)),
        )
    is_gemm = node.op == "Gemm" and not node.attrs.get("transA", 0)
    if (is_gemm or node.op == "MatMul") and weight.ndim == 2:
        return Window((), (), (), (), "", 1)
    return None


def matrix_of(weight: npt.NDArray[np.floating], axis: int, groups: int) -> npt.NDArray[np.float64]:
    """Return a weight as (groups, outputs of a group, inputs of an output).

    Args:
        weight: of a layer that has a window.
        axis: of the output channels.
        groups: of the layer.
    """
    first = np.moveaxis(weight.astype(np.float64), axis, 0)
    return first.reshape(groups, len(first) // groups, -1)


def weight_of(
    matrix: npt.NDArray[np.floating], shape: Sequence[int], axis: int
) -> npt.NDArray[np.floating]:
    """Return a matrix as a weight of a shape: the inverse of `matrix_of`."""
    outputs_first = (shape[axis], *(size for i, size in enumerate(shape) if i != axis))
    return np.moveaxis(matrix.reshape(outputs_first), 0, axis)


def _drawn(total: int, count: int, rng: np.random.Generator) -> Tensor:
    if count >= total:
        return torch.arange(total)
    return torch.from_numpy(np.sort(rng.choice(total, count, replace=False)))
