"""Max and average pooling."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from reptrt.core.errors import RewriteError
from reptrt.execute.torchops.node import Builder, NodeView, Operator
from reptrt.execute.torchops.window import (
    Ints,
    each,
    pad_with,
    padding_of,
    same_pads,
    spatial_layout,
)

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@dataclass(frozen=True, slots=True)
class _Window:
    """The geometry of one pooling node; one number per spatial axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]  # pads before each axis; zero if ``auto`` determines them
    after: tuple[int, ...]
    auto: str  # "SAME_UPPER", "SAME_LOWER" or ""
    ceil: bool

    @property
    def simple(self) -> bool:
        """Whether torch's pooling functions can express the padding."""
        fits = all(2 * pad <= taps for pad, taps in zip(self.before, self.kernel, strict=True))
        return self.before == self.after and fits and not self.auto

    def pads(self, sizes: Ints) -> tuple[Ints, Ints]:
        """Return the pads before and after for these spatial sizes."""
        if self.auto:
            return same_pads(sizes, self.kernel, self.strides, self.dilations, self.auto)
        return self.before, self.after

    def overhang(self, sizes: Ints, before: Ints, after: Ints) -> list[int]:
        """Return how far the last window of each axis extends beyond the input; 0 if it does not.

        With ceil_mode, a last window that would start beyond the input is dropped.
        """
        ends = []
        for axis, size in enumerate(sizes):
            stride = self.strides[axis]
            reach = (self.kernel[axis] - 1) * self.dilations[axis] + 1
            room = size + before[axis] + after[axis] - reach
            last = -(-room // stride) if self.ceil else room // stride
            if self.ceil and last * stride >= size + before[axis]:
                last -= 1
            ends.append(max(last * stride + reach - size - before[axis], 0))
        return ends


def _window(node: NodeView) -> _Window:
    kernel = tuple(node.attr("kernel_shape", ()))
    rank = len(kernel)
    if rank not in _MAX:
        raise RewriteError(f"kernel_shape {list(kernel)}")
    before, after, auto = padding_of(node)
    return _Window(
        kernel=kernel,
        strides=tuple(each(node.attr("strides", 1), rank)),
        dilations=tuple(each(node.attr("dilations", 1), rank)),
        before=before or (0,) * rank,
        after=after or (0,) * rank,
        auto=auto,
        ceil=bool(node.attr("ceil_mode", 0)),
    )


def _max_pool(node: NodeView) -> Operator:
    node.single_output()
    window = _window(node)
    pool = _MAX[len(window.kernel)]

    def simple(x: Tensor) -> Tensor:
        x = spatial_layout(x)
        return pool(x, window.kernel, window.strides, window.before, window.dilations, window.ceil)

    def general(x: Tensor) -> Tensor:
        before, after = window.pads(x.shape[2:])
        end = window.overhang(x.shape[2:], before, after)
        x = pad_with(spatial_layout(x), before, end, -torch.inf)
        return pool(x, window.kernel, window.strides, 0, window.dilations)

    return simple if window.simple else general


def _average_pool(node: NodeView) -> Operator:
    window = _window(node)
    pool = _AVERAGE[len(window.kernel)]
    include = bool(node.attr("count_include_pad", 0))
    if set(window.dilations) != {1}:
        raise RewriteError(f"dilations {list(window.dilations)}")

    def simple(x: Tensor) -> Tensor:
        x = spatial_layout(x)
        return pool(x, window.kernel, window.strides, window.before, window.ceil, include)

    def general(x: Tensor) -> Tensor:
        sizes = x.shape[2:]
        before, after = window.pads(sizes)
        end = window.overhang(sizes, before, after)
        total = pool(pad_with(spatial_layout(x), before, end, 0.0), window.kernel, window.strides)
        counted = x.new_ones(1, 1, *sizes)
        if include:
            after = [min(pad, reach) for pad, reach in zip(after, end, strict=True)]
            counted = pad_with(counted, before, after, 1.0)
            before, end = [0] * len(end), [b - a for a, b in zip(after, end, strict=True)]
        return total / pool(pad_with(counted, before, end, 0.0), window.kernel, window.strides)

    return simple if window.simple else general


POOLING: Mapping[str, Builder] = {
    "AveragePool": _average_pool,
    "MaxPool": _max_pool,
}
