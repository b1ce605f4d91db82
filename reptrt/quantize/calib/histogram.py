"""A streaming histogram of |x| in bounded memory that does not depend on the order of values.

Bins have equal width 2^e and start at 0. When a larger value arrives, neighbouring bins are merged
and e grows: floor(x / 2^(e+1)) = floor(floor(x / 2^e) / 2), so merging the counts gives exactly the
same result as counting all values again. The final e depends only on the largest value, and all
counts are integers; hence the result does not depend on batch size or order. Method: ours.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

NUM_BINS = 8192  # more than half of them lie below the largest value
_EXACT_FLOAT32 = 1 << 24  # torch.histc counts in float32, which is exact up to here
LARGEST = 2.0**100  # values must be smaller: torch.histc computes the bin in float32


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Counts of |x| in bins [i * width, (i + 1) * width); exact zeros are counted separately."""

    counts: npt.NDArray[np.int64]  # (NUM_BINS,), without exact zeros
    width: float  # a power of two
    zeros: int  # number of exact zeros
    minimum: float  # smallest x, with its sign
    maximum: float  # largest |x|

    def merged(self, other: "Histogram") -> "Histogram":
        """Return the histogram of the values of both."""
        width = max(self.width, other.width)
        return Histogram(
            _widened(self.counts, self.width, width) + _widened(other.counts, other.width, width),
            width,
            self.zeros + other.zeros,
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
        )

    def below(self, limit: float) -> "Histogram":
        """Return the histogram without the values above a limit, which is rounded up to a bin."""
        if limit >= self.maximum or not self.width:
            return self
        kept = np.where(np.arange(NUM_BINS) * self.width < limit, self.counts, 0)
        return replace(self, counts=kept, minimum=max(self.minimum, -limit), maximum=limit)


def histogram_of(x: torch.Tensor) -> Histogram:
    """Return the histogram of all values of a tensor, on the tensor's device.

    If the tensor holds NaN, Inf or a value of 2^100 or more, the maximum is infinite and all counts
    are 0.
    """
    low, high = (float(bound) for bound in x.aminmax())
    maximum = max(abs(low), abs(high))
    if not maximum < LARGEST:
        return Histogram(np.zeros(NUM_BINS, dtype=np.int64), 0.0, 0, low, math.inf)
    width = _width_for(maximum)
    flat = _flat(x).float()
    magnitude = flat if low >= 0 else flat.abs()
    counts = np.zeros(NUM_BINS, dtype=np.int64)
    for part in torch.split(magnitude, _EXACT_FLOAT32):
        binned = torch.histc(part, bins=NUM_BINS, min=0.0, max=NUM_BINS * width)
        counts += binned.cpu().numpy().astype(np.int64)
    zeros = int(magnitude.numel() - torch.count_nonzero(magnitude))
    counts[0] -= zeros
    return Histogram(counts, width, zeros, low, maximum)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """Return all values in memory order, without a copy if the tensor is dense."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).reshape(-1)
    return x.reshape(-1)


def _width_for(maximum: float) -> float:
    """Return the smallest power of two whose NUM_BINS bins reach past the maximum."""
    if maximum == 0:
        return math.ldexp(1.0, -120)
    exponent = math.frexp(maximum)[1]  # maximum < 2^exponent
    return math.ldexp(1.0, max(exponent, -100) - int(math.log2(NUM_BINS)))


def _widened(counts: npt.NDArray[np.int64], width: float, target: float) -> npt.NDArray[np.int64]:
    while width < target:
        pairs = counts.reshape(-1, 2).sum(axis=1)
        counts = np.concatenate([pairs, np.zeros_like(pairs)])
        width *= 2
    return counts
