"""Percentiles of samples, and how sure they are: bootstrap intervals."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

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
    """Return a percentile of samples (n,), 0..100, and its 95 % bootstrap interval."""
    low, high = np.percentile(resampled_percentiles(samples, percent, rng), (2.5, 97.5))
    return Interval(float(np.percentile(samples, percent)), float(low), float(high))


def resampled_percentiles(
    samples: Float64Array, percent: float, rng: np.random.Generator
) -> Float64Array:
    """Return a percentile of `RESAMPLES` resamples of samples (n,), without making the resamples.

    A percentile lies between the k-th smallest value and the next. Drawing n of n sorted samples
    with replacement takes the indices floor(n U) of n uniform numbers U. The k-th smallest U is
    Beta(k, n + 1 - k) distributed, and the smallest of the n - k above it is
    U_k + (1 - U_k) (1 - R^(1 / (n - k))) with R uniform.
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
