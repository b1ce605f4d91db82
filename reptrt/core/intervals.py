"""Percentiles of samples, with bootstrap intervals."""

import math
from dataclasses import dataclass

import numpy as np

from reptrt.core.arrays import Float64Array

RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A percentile and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def percentile_interval(
    samples: Float64Array, percent: float, rng: np.random.Generator
) -> Interval:
    """Return the ``percent``-th percentile (0..100) of samples (n,) and its 95 % interval."""
    low, high = np.percentile(resampled_percentiles(samples, percent, rng), (2.5, 97.5))
    return Interval(float(np.percentile(samples, percent)), float(low), float(high))


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
