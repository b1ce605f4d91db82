"""95 % intervals: of percentiles of samples, and of a change that is measured on the same items."""

import math
from dataclasses import dataclass

import numpy as np

from reptrt.core.arrays import AnyArray, Float64Array

RESAMPLES = 10_000
Z = 1.96  # standard deviations on each side of a 95 % interval


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def percentile_interval(
    samples: Float64Array, percent: float, rng: np.random.Generator
) -> Interval:
    """Return the ``percent``-th percentile (0..100) of samples (n,) and its 95 % interval."""
    low, high = np.percentile(resampled_percentiles(samples, percent, rng), (2.5, 97.5))
    return Interval(float(np.percentile(samples, percent)), float(low), float(high))


def paired_interval(before: AnyArray, after: AnyArray) -> Interval:
    """Return the mean of ``after - before`` and its 95 % interval, by normal approximation.

    The difference is taken item by item, so what is hard for both does not widen the interval:
    with hits 0 or 1 it is the interval behind McNemar's test (McNemar 1947, doi
    10.1007/BF02295996).

    Args:
        before: (n,), of one network, item by item.
        after: (n,), of the other network, for the same items.
    """
    differences = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    value = float(differences.mean())
    half = Z * float(differences.std()) / math.sqrt(len(differences))
    return Interval(value, value - half, value + half)


def resampled_percentiles(
    samples: Float64Array, percent: float, rng: np.random.Generator
) -> Float64Array:
    """Return the percentiles of `RESAMPLES` bootstrap resamples of samples (n,), (RESAMPLES,).

    The resamples are not drawn; the distribution of their percentile is sampled directly. The
    percentile lies between the k-th smallest value of a resample and the next one. To draw n of n
    sorted samples with replacement is to take the samples with the indices floor(n U) for n uniform
    numbers U. The k-th smallest of them, U_k, has the distribution Beta(k, n + 1 - k); the smallest
    of the n - k numbers above it is U_k + (1 - U_k) (1 - R^(1 / (n - k))) with R uniform.
    """
    ordered = np.sort(samples)
    n = len(ordered)
    position = (n - 1) * percent / 100.0
    k = math.floor(position) + 1
    part = position - (k - 1)
    lower = rng.beta(k, n + 1 - k, RESAMPLES)
    values: Float64Array = ordered[np.minimum((n * lower).astype(int), n - 1)]
    if part > 0.0:
        upper = lower + (1 - lower) * (1 - rng.random(RESAMPLES) ** (1 / (n - k)))
        following = ordered[np.minimum((n * upper).astype(int), n - 1)]
        values = values + part * (following - values)
    return values
