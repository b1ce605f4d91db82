"""The algebra of shift-invariant linear maps: what a convolution, batch norm or average pool *is*.

A `LinearMap` takes a tensor x (N, I, H, W) to

    y[n, o, p] = bias[o] + sum_{i, u} kernel[o, i, u] * x0[n, i, stride * p + dilation * u - begin]

where x0 is x extended by zeros, p and u run over two spatial axes and ``begin`` is the padding at
the top left. Compositions and sums of such maps are such maps again, under conditions at the
border that this file checks; then a whole rep block is one convolution. All values are float64.

Functions return a reason (a string) instead of a map when there is no exact result.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import gcd

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LinearMap:
    """A grouped 2-D convolution with zero padding."""

    kernel: Float64Array  # (O, I / groups, kH, kW)
    bias: Float64Array  # (O,)
    stride: tuple[int, int] = (1, 1)
    begin: tuple[int, int] = (0, 0)  # zero padding at the top, left
    end: tuple[int, int] = (0, 0)  # zero padding at the bottom, right
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """Kernel height and width in taps."""
        return self.kernel.shape[2], self.kernel.shape[3]

    @property
    def in_channels(self) -> int:
        """I."""
        return int(self.kernel.shape[1] * self.groups)

    @property
    def out_channels(self) -> int:
        """O."""
        return int(self.kernel.shape[0])

    @property
    def macs(self) -> int:
        """Multiply-accumulates per output position."""
        return self.kernel.size

    @property
    def is_pointwise(self) -> bool:
        """Whether each output position depends on the same input position only."""
        return self.size == (1, 1) and self.stride == (1, 1) and not any(self.begin + self.end)

    @property
    def is_per_channel(self) -> bool:
        """Whether it is y[c] = kernel[c] * x[c] + bias[c]."""
        return self.is_pointwise and self.groups == self.in_channels == self.out_channels


def per_channel(scale: Float64Array, bias: Float64Array) -> LinearMap:
    """Return y[c] = scale[c] * x[c] + bias[c]; ones and zeros give the identity."""
    return LinearMap(scale.reshape(-1, 1, 1, 1), bias, groups=scale.size)


def identity(channels: int) -> LinearMap:
    """Return y = x."""
    return per_channel(np.ones(channels), np.zeros(channels))


def average_pool(
    channels: int, size: tuple[int, int], stride: tuple[int, int], pads: Sequence[int]
) -> LinearMap:
    """Return the mean over a window, padding counted: a depthwise conv with equal taps."""
    kernel = np.full((channels, 1, *size), 1.0 / (size[0] * size[1]))
    begin, end = (pads[0], pads[1]), (pads[2], pads[3])
    return LinearMap(kernel, np.zeros(channels), stride, begin, end, groups=channels)


def diagonal(linear: LinearMap) -> Float64Array | None:
    """Return d of a map that is y[c] = d[c] * x[c] + bias, or None if it is anything more."""
    if linear.is_per_channel:
        return np.array(linear.kernel).reshape(-1)
    if not linear.is_pointwise or linear.in_channels != linear.out_channels:
        return None
    dense = regroup(linear, 1).kernel[:, :, 0, 0]
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
    if linear.dilation == (1, 1):
        return linear
    (kh, kw), (dh, dw) = linear.size, linear.dilation
    kernel = np.zeros((*linear.kernel.shape[:2], (kh - 1) * dh + 1, (kw - 1) * dw + 1))
    kernel[:, :, ::dh, ::dw] = linear.kernel
    return replace(linear, kernel=kernel, dilation=(1, 1))


def compose(first: LinearMap, second: LinearMap) -> LinearMap | str:
    """Return x -> second(first(x)).

    The second map pads the *result* of the first with zeros. That equals padding x only where the
    first has one tap and no padding of its own, and only if the first adds no bias; without
    padding in the second there is no condition.
    """
    if second.is_per_channel:
        scale = second.kernel.reshape(-1)
        kernel = first.kernel * scale[:, None, None, None]
        return replace(first, kernel=kernel, bias=first.bias * scale + second.bias)
    padded = [bool(second.begin[a] or second.end[a]) for a in (0, 1)]
    for axis in (0, 1):
        if padded[axis] and (first.size[axis] > 1 or first.begin[axis] or first.end[axis]):
            return "the second of two convolutions in series pads what the first has already padded"
    if any(padded) and np.any(first.bias):
        return "a convolution pads with zeros where the bias before it would have to continue"
    spread = second.kernel.sum(axis=(2, 3)) * _over(second, first.bias)[:, :, 0, 0]
    bias = second.bias + spread.sum(axis=1)
    if first.is_per_channel:
        return replace(
            second, kernel=second.kernel * _over(second, first.kernel.reshape(-1)), bias=bias
        )
    first, second = undilate(first), undilate(second)
    groups = gcd(first.groups, second.groups)
    return LinearMap(
        _convolve(regroup(first, groups), regroup(second, groups)),
        bias,
        stride=_pair(first.stride[a] * second.stride[a] for a in (0, 1)),
        begin=_pair(first.begin[a] + first.stride[a] * second.begin[a] for a in (0, 1)),
        end=_pair(first.end[a] + first.stride[a] * second.end[a] for a in (0, 1)),
        groups=groups,
    )


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
    if any(m.stride != head.stride for m in maps):
        return "the branches differ in stride"
    window_of = (head.dilation, head.size, head.begin)
    if any((m.dilation, m.size, m.begin) != window_of for m in maps):
        maps = [undilate(m) for m in maps]
    groups = 0
    for m in maps:
        groups = gcd(groups, m.groups)
    begin = _pair(max(m.begin[a] for m in maps) for a in (0, 1))
    dilation = maps[0].dilation
    reach = _pair(max(_reach(m, a) for m in maps) for a in (0, 1))  # furthest tap below the origin
    ends = {_pair(m.end[a] + reach[a] - _reach(m, a) for a in (0, 1)) for m in maps}
    if len(ends) > 1 and not equal_sizes:
        return "the branches differ in output size"
    size = _pair((begin[a] + reach[a]) // dilation[a] + 1 for a in (0, 1))
    kernel = np.zeros((head.out_channels, head.in_channels // groups, *size))
    for m in maps:
        top, left = ((begin[a] - m.begin[a]) // dilation[a] for a in (0, 1))
        window = kernel[:, :, top : top + m.size[0], left : left + m.size[1]]
        window += regroup(m, groups).kernel
    bias = np.sum([m.bias for m in maps], axis=0)
    return LinearMap(kernel, bias, head.stride, begin, max(ends), dilation, groups)


def _reach(linear: LinearMap, axis: int) -> int:
    return (linear.size[axis] - 1) * linear.dilation[axis] - linear.begin[axis]


def _pair(values: Iterable[int]) -> tuple[int, int]:
    first, second = values
    return first, second


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
    (sh, sw), (h1, w1), (h2, w2) = first.stride, first.size, second.size
    inner = first.kernel.reshape(groups, -1, *first.kernel.shape[1:])  # (g, M, I, h1, w1)
    outer = second.kernel.reshape(groups, -1, *second.kernel.shape[1:])  # (g, O, M, h2, w2)
    out = np.zeros((groups, outer.shape[1], inner.shape[2], sh * (h2 - 1) + h1, sw * (w2 - 1) + w1))
    for row in range(h2):
        for column in range(w2):
            term = np.einsum("gom,gmihw->goihw", outer[..., row, column], inner, optimize=True)
            top, left = sh * row, sw * column
            out[..., top : top + h1, left : left + w1] += term
    return out.reshape(second.out_channels, *out.shape[2:])
