"""The algebra of shift-invariant linear maps: what a convolution, batch norm or average pool *is*.

A `LinearMap` takes a tensor x (N, I, *spatial) to

    y[n, o, p] = bias[o] + sum_{i, u} kernel[o, i, u] * x0[n, i, stride * p + dilation * u - begin]

where x0 is x extended by zeros, p and u run over the spatial axes (none for a matrix product, two
for images) and ``begin`` is the padding in front. A transposed map is the adjoint in its geometry:

    y[n, o, stride * p + dilation * u - begin] += kernel[o, i, u] * x[n, i, p],   plus bias[o]

Compositions and sums of such maps are such maps again, under conditions at the border that this
file checks; then a whole rep block is one convolution. All values are float64.

Functions return a reason (a string) instead of a map when there is no exact result.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import Any

import numpy as np
import numpy.typing as npt

from reptrt.core.arrays import Float64Array

Ints = tuple[int, ...]  # one value per spatial axis

PADDED_SHIFT = "a convolution pads with zeros where the bias before it would have to continue"


@dataclass(frozen=True, slots=True)
class LinearMap:
    """A grouped convolution with zero padding, or the transpose of one.

    Geometry that is left out means: stride and dilation 1, no padding.
    """

    kernel: Float64Array  # (O, I / groups, *taps)
    bias: Float64Array  # (O,)
    stride: Ints = ()
    begin: Ints = ()  # zero padding in front (of a transposed map: what is cut off the output)
    end: Ints = ()  # zero padding behind; of a transposed map less its output padding
    dilation: Ints = ()
    groups: int = 1
    transposed: bool = False

    def __post_init__(self) -> None:
        for name, neutral in (("stride", 1), ("begin", 0), ("end", 0), ("dilation", 1)):
            if not getattr(self, name):
                object.__setattr__(self, name, (neutral,) * self.axes)

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return self.kernel.ndim - 2

    @property
    def size(self) -> Ints:
        """Taps along each spatial axis."""
        return tuple(self.kernel.shape[2:])

    @property
    def in_channels(self) -> int:
        """I."""
        return int(self.kernel.shape[1] * self.groups)

    @property
    def out_channels(self) -> int:
        """O."""
        return int(self.kernel.shape[0])

    @property
    def macs(self) -> float:
        """Multiply-accumulates per output position."""
        return self.kernel.size / prod(self.stride) if self.transposed else self.kernel.size

    @property
    def inputs_per_output(self) -> float:
        """Input positions for each output position."""
        return 1 / prod(self.stride) if self.transposed else prod(self.stride)

    @property
    def is_padded(self) -> bool:
        """Whether it pads its input (of a transposed map: cuts or extends its output)."""
        return any(self.begin) or any(self.end)

    @property
    def is_pointwise(self) -> bool:
        """Whether each output position depends on the same input position only."""
        return set(self.size) <= {1} and set(self.stride) <= {1} and not self.is_padded

    @property
    def is_per_channel(self) -> bool:
        """Whether it is y[c] = kernel[c] * x[c] + bias[c]."""
        return self.is_pointwise and self.groups == self.in_channels == self.out_channels


def per_channel(scale: Float64Array, bias: Float64Array, axes: int = 2) -> LinearMap:
    """Return y[c] = scale[c] * x[c] + bias[c]; ones and zeros give the identity."""
    return LinearMap(scale.reshape(-1, 1, *[1] * axes), bias, groups=scale.size)


def identity(channels: int, axes: int = 2) -> LinearMap:
    """Return y = x."""
    return per_channel(np.ones(channels), np.zeros(channels), axes)


def average_pool(channels: int, size: Ints, stride: Ints, pads: Sequence[int]) -> LinearMap:
    """Return the mean over a window, padding counted: a depthwise conv with equal taps."""
    kernel = np.full((channels, 1, *size), 1.0 / prod(size))
    begin, end = tuple(pads[: len(size)]), tuple(pads[len(size) :])
    return LinearMap(kernel, np.zeros(channels), stride, begin, end, groups=channels)


def diagonal(linear: LinearMap) -> Float64Array | None:
    """Return d of a map that is y[c] = d[c] * x[c] + bias, or None if it is anything more."""
    if linear.is_per_channel:
        return np.array(linear.kernel).reshape(-1)
    if not linear.is_pointwise or linear.in_channels != linear.out_channels:
        return None
    dense = regroup(linear, 1).kernel.reshape(linear.out_channels, -1)
    values = np.diagonal(dense)
    return values.copy() if np.count_nonzero(dense) == np.count_nonzero(values) else None


def regroup(linear: LinearMap, groups: int) -> LinearMap:
    """Return the same map with fewer groups (a divisor): zeros where groups did not mix."""
    if groups == linear.groups:
        return linear
    merged = linear.groups // groups  # old groups in each new one
    out_old = linear.out_channels // linear.groups
    in_old = linear.kernel.shape[1]
    kernel = np.zeros((linear.out_channels, merged * in_old, *linear.size))
    for old in range(linear.groups):
        rows = slice(old * out_old, (old + 1) * out_old)
        columns = slice(old % merged * in_old, (old % merged + 1) * in_old)
        kernel[rows, columns] = linear.kernel[rows]
    return replace(linear, kernel=kernel, groups=groups)


def undilate(linear: LinearMap) -> LinearMap:
    """Return the same map with dilation 1: zeros between the taps."""
    if set(linear.dilation) <= {1}:
        return linear
    spread = zip(linear.size, linear.dilation, strict=True)
    kernel = np.zeros((*linear.kernel.shape[:2], *((taps - 1) * step + 1 for taps, step in spread)))
    kernel[_at(slice(None, None, step) for step in linear.dilation)] = linear.kernel
    return replace(linear, kernel=kernel, dilation=(1,) * linear.axes)


def compose(first: LinearMap, second: LinearMap) -> LinearMap | str:
    """Return x -> second(first(x)).

    The second map pads the *result* of the first with zeros. That equals padding x only where the
    first has one tap and no padding of its own, and only if the first adds no bias; without
    padding in the second there is no condition. A transposed map composes with pointwise maps
    only, and where it comes second, with those that add no bias: each of its output positions
    sums another set of taps.
    """
    if second.is_per_channel:
        scale = second.kernel.reshape(-1)
        kernel = first.kernel * scale.reshape(-1, *[1] * (first.kernel.ndim - 1))
        return replace(first, kernel=kernel, bias=first.bias * scale + second.bias)
    reason = _reason_against_composition(first, second)
    if reason is not None:
        return reason
    taps = tuple(range(2, second.kernel.ndim))
    spread = second.kernel.sum(axis=taps) * _over(second, first.bias)[_at([0] * second.axes)]
    bias = second.bias + spread.sum(axis=1)
    if first.is_per_channel:
        return replace(
            second, kernel=second.kernel * _over(second, first.kernel.reshape(-1)), bias=bias
        )
    first, second = undilate(first), undilate(second)
    groups = gcd(first.groups, second.groups)
    kernel = _convolve(regroup(first, groups), regroup(second, groups))
    if first.transposed or second.transposed:
        return replace(
            first if first.transposed else second, kernel=kernel, bias=bias, groups=groups
        )
    along = range(first.axes)
    return LinearMap(
        kernel,
        bias,
        stride=tuple(first.stride[a] * second.stride[a] for a in along),
        begin=tuple(first.begin[a] + first.stride[a] * second.begin[a] for a in along),
        end=tuple(first.end[a] + first.stride[a] * second.end[a] for a in along),
        groups=groups,
    )


def _reason_against_composition(first: LinearMap, second: LinearMap) -> str | None:
    if second.transposed and np.any(first.bias):
        return "a transposed convolution spreads the shift before it unevenly"
    if (first.transposed and not second.is_pointwise) or (
        second.transposed and not first.is_pointwise
    ):
        return "a transposed convolution in series with another convolution"
    if second.transposed:
        return None
    padded = [bool(second.begin[a] or second.end[a]) for a in range(second.axes)]
    for axis in range(second.axes):
        if padded[axis] and (first.size[axis] > 1 or first.begin[axis] or first.end[axis]):
            return "the second of two convolutions in series pads what the first has already padded"
    return PADDED_SHIFT if any(padded) and np.any(first.bias) else None


def add(maps: Sequence[LinearMap], *, equal_sizes: bool = False) -> LinearMap | str:
    """Return x -> sum of all maps of the same x.

    Args:
        maps: the branches.
        equal_sizes: the outputs are known to have one size. With stride 2 that can depend on the
            size of x, which the maps alone do not know.
    """
    head = maps[0]
    if any((m.in_channels, m.out_channels) != (head.in_channels, head.out_channels) for m in maps):
        return "the branches differ in channels"
    if any((m.stride, m.transposed) != (head.stride, head.transposed) for m in maps):
        return "the branches differ in stride"
    window_of = (head.dilation, head.size, head.begin)
    if any((m.dilation, m.size, m.begin) != window_of for m in maps):
        maps = [undilate(m) for m in maps]
    groups = 0
    for m in maps:
        groups = gcd(groups, m.groups)
    along = range(head.axes)
    begin = tuple(max(m.begin[a] for m in maps) for a in along)
    dilation = maps[0].dilation
    reach = tuple(max(_reach(m, a) for m in maps) for a in along)  # furthest tap below the origin
    ends = {tuple(m.end[a] + reach[a] - _reach(m, a) for a in along) for m in maps}
    if len(ends) > 1 and not equal_sizes:
        return "the branches differ in output size"
    size = tuple((begin[a] + reach[a]) // dilation[a] + 1 for a in along)
    kernel = np.zeros((head.out_channels, head.in_channels // groups, *size))
    for m in maps:
        offsets = ((begin[a] - m.begin[a]) // dilation[a] for a in along)
        window = kernel[_windows(offsets, m.size)]
        window += regroup(m, groups).kernel
    bias = np.sum([m.bias for m in maps], axis=0)
    end = max(ends)
    return LinearMap(kernel, bias, head.stride, begin, end, dilation, groups, head.transposed)


def _reach(linear: LinearMap, axis: int) -> int:
    return (linear.size[axis] - 1) * linear.dilation[axis] - linear.begin[axis]


def _at(taps: Iterable[int | slice]) -> tuple[Any, ...]:
    """Return the index of some taps in all output and input channels."""
    return (..., *taps)


def _windows(offsets: Iterable[int], sizes: Iterable[int]) -> tuple[Any, ...]:
    return _at(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))


def _over(linear: LinearMap, values: Float64Array) -> Float64Array:
    return spread_over_kernel(values, linear.kernel, linear.groups)


def spread_over_kernel(
    values: Float64Array, kernel: npt.NDArray[np.floating], groups: int
) -> Float64Array:
    """Return one value per input channel, shaped to broadcast over a grouped kernel.

    Args:
        values: (I,).
        kernel: (O, I / groups, ...); only its shape counts.
        groups: of the convolution.

    Returns:
        (O, I / groups, 1, ...): row o holds the values of the input channels that it reads.
    """
    rows = np.repeat(values.reshape(groups, -1), kernel.shape[0] // groups, axis=0)
    return np.asarray(rows.reshape(*rows.shape, *[1] * (kernel.ndim - 2)))


def _convolve(first: LinearMap, second: LinearMap) -> Float64Array:
    """Return the taps of second(first(x)); both have the same groups and dilation 1.

    K[o, i, stride1 * v + u] += sum_m second[o, m, v] * first[m, i, u]
    """
    groups = first.groups
    inner = first.kernel.reshape(groups, -1, *first.kernel.shape[1:])  # (g, M, I, *taps1)
    outer = second.kernel.reshape(groups, -1, *second.kernel.shape[1:])  # (g, O, M, *taps2)
    steps = (1,) * first.axes if first.transposed else first.stride
    along = range(first.axes)
    size = (steps[a] * (second.size[a] - 1) + first.size[a] for a in along)
    out = np.zeros((groups, outer.shape[1], inner.shape[2], *size))
    for tap in np.ndindex(*second.size):
        term = np.einsum("gom,gmi...->goi...", outer[_at(tap)], inner, optimize=True)
        offsets = (steps[a] * tap[a] for a in along)
        out[_windows(offsets, first.size)] += term
    return out.reshape(second.out_channels, *out.shape[2:])
