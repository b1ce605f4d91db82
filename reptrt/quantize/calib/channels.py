"""Statistics of each channel of activations, for equalization and the choice of splits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch

from reptrt.core.arrays import Float64Array
from reptrt.data.dataset import Dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.quantize.calib.collect import Kept, Record, not_finite, watch
from reptrt.quantize.calib.histogram import LARGEST


@dataclass(frozen=True, slots=True, eq=False)
class ChannelStats:
    """Statistics of each channel over all images and positions, (C,) each."""

    maximum: Float64Array  # largest |x|
    mean_square: Float64Array  # E[x^2]
    mean: Float64Array  # E[x]

    @property
    def variance(self) -> Float64Array:
        """E[x^2] - E[x]^2 of each channel."""
        return np.maximum(self.mean_square - np.square(self.mean), 0.0)

    def merged(self, other: "ChannelStats", share: float) -> "ChannelStats":
        """Return the statistics over both sets of images; a fraction ``share`` is in ``other``."""
        return ChannelStats(
            np.maximum(self.maximum, other.maximum),
            (1 - share) * self.mean_square + share * other.mean_square,
            (1 - share) * self.mean + share * other.mean,
        )

    def scaled(self, factors: npt.NDArray[np.floating]) -> "ChannelStats":
        """Return the statistics of the tensor with each channel multiplied by its factor."""
        return ChannelStats(
            self.maximum * factors, self.mean_square * np.square(factors), self.mean * factors
        )


def collect_channels(
    graph: TorchGraph,
    dataset: Dataset,
    tensors: Sequence[str],
    kept: Kept | None = None,
    also: Mapping[str, Record] = MappingProxyType({}),
) -> dict[str, ChannelStats]:
    """Return the statistics of each named tensor (N, C, ...) over all images.

    The values are recorded in ``kept``, and ``also`` tensor -> function gets those of its tensors.

    The maxima do not depend on the order of images. The means, summed in float32 within an image
    and in float64 over images, depend on it by about one part in 1e12.

    Raises:
        CalibrationError: a tensor holds NaN or Inf.
    """
    maxima: dict[str, torch.Tensor] = {}
    squares: dict[str, torch.Tensor] = {}
    sums: dict[str, torch.Tensor] = {}

    def record(name: str, count: int, value: torch.Tensor) -> None:
        value = value[:count].flatten(2) if value.dim() > 2 else value[:count].unsqueeze(2)
        # Channels lie last in memory: so this is ten times as fast as over axes 0 and 2.
        largest = value.movedim(1, 2).reshape(-1, value.shape[1]).abs().amax(0)
        if not bool((largest < LARGEST).all()):
            raise not_finite(name)
        before = maxima.get(name)
        maxima[name] = largest if before is None else torch.maximum(before, largest)
        for totals, moment in ((squares, value.square()), (sums, value)):
            total = moment.mean(2).double().sum(0)
            totals[name] = total if name not in totals else totals[name] + total

    records: dict[str, list[Record]] = {
        name: [record] if kept is None else [record, kept.record] for name in tensors
    }
    for name, other in also.items():
        records.setdefault(name, []).append(other)
    watch(graph, dataset, records, "ranges")
    return {
        name: ChannelStats(
            maxima[name].double().cpu().numpy(),
            squares[name].cpu().numpy() / dataset.length,
            sums[name].cpu().numpy() / dataset.length,
        )
        for name in tensors
    }
