"""Choose amax, the largest |x| to keep, from a histogram: one pure function per rule.

All rules see a histogram as a density that is constant within a bin. A threshold t cuts [0, max]
into cells whose values share one code of the grid: cell k is [(k - 1/2) s, (k + 1/2) s) with
s = t / qmax. The last cell extends to the maximum, because everything beyond t saturates to qmax.
Exact zeros are represented exactly under every threshold and do not count.

- ``max``         t = max |x|
- ``percentile``  the given percentile of |x|, zeros included
- ``mse``         min over t of sum (x - x_dq)^2
- ``mae``         min over t of sum |x - x_dq|
- ``entropy``     min over t of KL(p || q) as in TensorRT's calibrator: 128 levels, p with the
                  clipped mass added to its last bin, q without it
- ``kl``          min over t of KL(p || q_t), where q_t is the density that the codes alone imply

The last rule is ours, after the idea of CFWS (arXiv 2312.10588) that many large activations can be
clipped and that the similarity of distributions should decide. q_t spreads the mass P_k of each
cell evenly over its length L_k. Values of the last cell can lie anywhere beyond its border b: for
them q_t falls off as P_last / s (1 + (x - b) / s)^-2. With e their mean distance from b, which
bounds the mean of the logarithm,

    KL(p || q_t) = sum_bins p log p  -  sum_k P_k log(P_k width / L_k)
                   - P_last log(P_last width / s)  +  2 P_last log(1 + e / s)

It is finite for every t, the penalty for clipping is smooth and grows with the distance, and t is
continuous, not a multiple of 128 bins.

No rule is best on every net: a histogram does not show how much a clipped value matters to the
outputs. ``auto`` compares max, percentile, mse and kl by the outputs on held-out images, takes one
of them for the whole net, and widens its thresholds as far as that brings the outputs closer
(`calib.outputs`; ours). It does not try entropy, which takes 60 times as long and is no better, or
mae, which clips too much.
"""

from collections.abc import Callable, Mapping

import numpy as np

from reptrt.core.arrays import Float64Array
from reptrt.core.grid import Grid
from reptrt.quantize.calib.histogram import Histogram
from reptrt.quantize.calib.options import ThresholdOptions

_SMALLEST = 2.0**-10  # of the maximum: the smallest threshold that is tried
_COARSE, _FINE, _ZOOMS = 160, 17, 3


def amax_from_histogram(histogram: Histogram, options: ThresholdOptions, grid: Grid) -> float:
    """Return the largest |x| to keep, 0 < amax <= histogram.maximum (0 if all values are 0).

    Args:
        histogram: of |x|.
        options: a rule other than auto, which needs the net.
        grid: codes of the activation.
    """
    if histogram.maximum == 0.0 or not histogram.counts.any():
        return histogram.maximum
    if options.rule == "max":
        return histogram.maximum
    if options.rule == "percentile":
        return _percentile(histogram, options.percentile)
    if options.rule == "entropy":
        return _entropy(histogram, num_levels=grid.qmax + 1)
    assert options.rule is not None
    loss = _LOSSES[options.rule]
    density = _Density(histogram)
    return _minimize(lambda amax: loss(density, amax, grid.qmax), histogram.maximum)


class _Density:
    """Cumulative moments of a histogram at any point: integrals of x^n p(x) over [0, x]."""

    def __init__(self, histogram: Histogram) -> None:
        self.width = histogram.width
        self.maximum = histogram.maximum
        self.counts = histogram.counts.astype(np.float64)
        self.edges = np.arange(len(self.counts) + 1) * self.width
        self._height = self.counts / self.width
        powers = self.edges[None, :] ** np.arange(1, 4)[:, None]
        steps = self._height * np.diff(powers, axis=1) / np.arange(1, 4)[:, None]
        self._below = np.concatenate([np.zeros((3, 1)), np.cumsum(steps, axis=1)], axis=1)

    def moments(self, points: Float64Array) -> Float64Array:
        """Return the integrals of p, x p, x^2 p from 0 to each point, shape (3, *points)."""
        index = np.minimum((points / self.width).astype(np.int64), len(self.counts) - 1)
        order = np.arange(1, 4).reshape(3, *[1] * points.ndim)
        partial = self._height[index] * (points**order - self.edges[index] ** order) / order
        moments: Float64Array = self._below[:, index] + partial
        return moments


def _cells(density: _Density, amax: Float64Array, qmax: int, at: Float64Array) -> Float64Array:
    """Return the cell borders, at the multiples ``at`` of each step; the last is the maximum."""
    step = amax[:, None] / qmax
    borders = at[None, :] * step
    borders[:, -1] = density.edges[-1]
    return np.asarray(np.minimum(borders, density.edges[-1]))


def _mse(density: _Density, amax: Float64Array, qmax: int) -> Float64Array:
    """Return sum (x - k s)^2 for each threshold, from the moments of each cell."""
    codes = np.arange(qmax + 1.0)
    borders = _cells(density, amax, qmax, np.concatenate([[0.0], codes + 0.5]))
    m0, m1, m2 = np.diff(density.moments(borders), axis=-1)
    values = codes[None, :] * amax[:, None] / qmax
    return np.asarray((m2 - 2 * values * m1 + values**2 * m0).sum(axis=1))


def _mae(density: _Density, amax: Float64Array, qmax: int) -> Float64Array:
    """Return sum |x - k s| for each threshold; the sign differs below and above each code."""
    halves = np.arange(2 * qmax + 2) / 2.0  # 0, 1/2, 1, ..., qmax + 1/2
    borders = _cells(density, amax, qmax, halves)
    m0, m1, _ = np.diff(density.moments(borders), axis=-1)
    index = np.arange(2 * qmax + 1)
    values = ((index + 1) // 2)[None, :] * amax[:, None] / qmax
    sign = np.where(index % 2 == 0, 1.0, -1.0)  # above its code, then below the next
    return np.asarray((sign * (m1 - values * m0)).sum(axis=1))


def _kl(density: _Density, amax: Float64Array, qmax: int) -> Float64Array:
    """Return KL(p || q_t) in nats, times the number of values and up to a constant."""
    at = np.concatenate([[0.0], np.arange(qmax + 1.0) + 0.5])
    borders = _cells(density, amax, qmax, at)
    mass, first_moment, _ = np.diff(density.moments(borders), axis=-1)
    step = amax / qmax
    length = np.diff(borders, axis=-1)
    length[:, -1] = step
    ratio = np.divide(mass, length, out=np.ones_like(mass), where=mass > 0)
    clipped, total = mass[:, -1], first_moment[:, -1]
    mean = np.divide(total, clipped, out=borders[:, -2].copy(), where=clipped > 0)
    distance = np.maximum(mean - borders[:, -2], 0.0)  # not below 0 by rounding
    tail = 2.0 * clipped * np.log1p(distance / step)
    return np.asarray(tail - (mass * np.log(ratio)).sum(axis=1))


_LOSSES: Mapping[str, Callable[[_Density, Float64Array, int], Float64Array]] = {
    "mse": _mse,
    "mae": _mae,
    "kl": _kl,
}


def _minimize(loss: Callable[[Float64Array], Float64Array], maximum: float) -> float:
    """Return the best threshold: a geometric search, then finer searches around the best."""
    candidates = maximum * np.geomspace(_SMALLEST, 1.0, _COARSE)
    for zoom in range(_ZOOMS + 1):
        best = int(np.argmin(loss(candidates)))
        low, high = candidates[max(best - 1, 0)], candidates[min(best + 1, len(candidates) - 1)]
        if zoom < _ZOOMS:
            candidates = np.linspace(low, high, _FINE)
    return float(candidates[best])


def _percentile(histogram: Histogram, percentile: float) -> float:
    """Return the percentile of |x|, zeros included, interpolated within its bin.

    If the percentile is 0, because so many values are exact zeros, the maximum is returned: nothing
    else bounds the other values.
    """
    below = percentile / 100.0 * (histogram.counts.sum() + histogram.zeros)
    if below <= histogram.zeros:
        return histogram.maximum
    cumulative = histogram.zeros + np.cumsum(histogram.counts)
    index = int(np.searchsorted(cumulative, below))
    inside = 1.0 - (cumulative[index] - below) / histogram.counts[index]
    return float(min((index + inside) * histogram.width, histogram.maximum))


def _entropy(histogram: Histogram, num_levels: int) -> float:
    """Return the entropy threshold as TensorRT's calibrator was described to compute it.

    For each number i of kept bins, ``num_levels`` or more: p is the first i bins, with all clipped
    mass added to the last of them; q is the first i bins without that mass, merged into
    ``num_levels`` levels, each spread evenly over those of its bins that are not empty. The i with
    the least KL(p || q) is taken.
    """
    used = int(np.flatnonzero(histogram.counts)[-1]) + 1
    merge = max(1, used // 2048)  # about 2048 bins, as described
    counts = np.pad(histogram.counts[:used], (0, -used % merge)).reshape(-1, merge).sum(axis=1)
    counts = counts.astype(np.float64)
    stops = range(min(num_levels, len(counts)), len(counts) + 1)
    losses = [_entropy_loss(counts, stop, num_levels) for stop in stops]
    best = stops[int(np.argmin(losses))]
    return float(min((best + 0.5) * merge * histogram.width, histogram.maximum))


def _entropy_loss(counts: Float64Array, stop: int, num_levels: int) -> float:
    kept = counts[:stop]
    p = kept.copy()
    p[-1] += counts[stop:].sum()
    starts = np.unique(np.arange(num_levels) * stop // num_levels)
    filled = (kept > 0).astype(np.float64)
    per_level = np.add.reduceat(filled, starts)
    mean = np.divide(
        np.add.reduceat(kept, starts), per_level, out=np.zeros(len(starts)), where=per_level > 0
    )
    q = np.repeat(mean, np.diff(np.append(starts, stop))) * filled
    if p[-1] > 0 and q[-1] == 0:
        return float("inf")
    both = p > 0
    p, q = p[both] / p.sum(), q[both] / q.sum()
    return float((p * np.log(p / q)).sum())
