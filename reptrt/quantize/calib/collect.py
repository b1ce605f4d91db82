"""Run all images through a float graph once and collect statistics of its tensors."""

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reptrt.core.arrays import Float32Array, Float64Array
from reptrt.core.errors import CalibrationError
from reptrt.core.progress import track
from reptrt.data.dataset import Dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.placement import Activation
from reptrt.quantize.calib.histogram import Histogram, histogram_of

COMPUTE_BATCH = 32

Record = Callable[[str, int, Tensor], None]  # tensor name, number of images that count, values


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics of the tensors of a graph over all images."""

    histograms: Mapping[str, Histogram]  # of |x|
    means: Mapping[str, Tensor]  # E[x] over the images, (1, C, H, W), summed in float64
    same_images: bool = False  # whether several images were given, and all are equal


def collect(
    graph: TorchGraph, dataset: Dataset, histograms: Collection[str], means: Collection[str] = ()
) -> Statistics:
    """Return the histograms of |x| of some tensors and the mean over all images of others.

    Memory: one batch of activations, 64 KiB per histogram, one image per mean in float64.

    Raises:
        CalibrationError: a tensor with a histogram holds NaN or Inf.
    """
    totals = _Totals()
    records: dict[str, list[Record]] = {n: [] for n in sorted({*histograms, *means})}
    for record, names in ((totals.count_values, histograms), (totals.add_up, means)):
        for name in names:
            records[name].append(record)
    watch(graph, dataset, records, "calibrate")
    return totals.statistics(dataset)


def collect_kept(
    kept: "Kept", dataset: Dataset, histograms: Collection[str], means: Collection[str] = ()
) -> Statistics:
    """Return what `collect` does for the net with scaled channels, without running it.

    Args:
        kept: the values of all named tensors.
        dataset: the images that the values were computed from.
        histograms: as for `collect`.
        means: as for `collect`.

    Raises:
        CalibrationError: a tensor with a histogram holds NaN or Inf.
    """
    totals = _Totals()
    for name in sorted({*histograms, *means}):
        for count, value in track(kept.batches(name), kept.num_batches, name):
            if name in histograms:
                totals.count_values(name, count, value)
            if name in means:
                totals.add_up(name, count, value)
    return totals.statistics(dataset)


class _Totals:
    """Histograms and sums over the images seen so far."""

    def __init__(self) -> None:
        self._merged: dict[str, Histogram] = {}
        self._sums: dict[str, Tensor] = {}

    def count_values(self, name: str, count: int, value: Tensor) -> None:
        histogram = histogram_of(value[: rows_that_count(count, value)])
        if math.isinf(histogram.maximum):
            raise not_finite(name)
        before = self._merged.get(name)
        self._merged[name] = histogram if before is None else before.merged(histogram)

    def add_up(self, name: str, count: int, value: Tensor) -> None:
        if name not in self._sums:
            self._sums[name] = torch.zeros_like(value[:1], dtype=torch.float64)
        for image in torch.split(value[:count], 1):  # without a copy of all of them in float64
            self._sums[name] += image

    def statistics(self, dataset: Dataset) -> Statistics:
        averages = {n: (total / dataset.length).float() for n, total in self._sums.items()}
        return Statistics(self._merged, averages, _are_equal(dataset))


def rows_that_count(count: int, value: Tensor) -> int:
    """Return how many rows of a batch belong to the images that count.

    Some tensors have several rows per image (windows), others have no batch axis.
    """
    return len(value) * count // COMPUTE_BATCH or len(value)


def _are_equal(dataset: Dataset) -> bool:
    """Whether there are several images, and all are equal; looks no further than the first other.

    The images were decoded already.
    """
    first: Float32Array | None = None
    for batch in dataset.batches(COMPUTE_BATCH):
        first = batch[:1] if first is None else first
        if not (batch == first).all():
            return False
    return dataset.length > 1


class Kept:
    """Values of tensors over all images, in batches, as long as all of them fit into a limit.

    Channels are scaled after one pass over the images, and histograms and covariances need the
    scaled channels. Where the values fit, they are scaled, and further passes are saved.

    Args:
        limit: the most bytes.
        images: how many there will be.

    Attributes:
        factors: tensor -> factor of each channel, (C,), for those that were scaled since.
    """

    def __init__(self, limit: int, images: int) -> None:
        self._limit, self._images = limit, images
        self._expected = 0.0
        self._values: dict[str, list[tuple[int, Tensor]]] | None = {}
        self.factors: Mapping[str, Float64Array] = {}

    def record(self, name: str, count: int, value: Tensor) -> None:
        """Keep the values of one batch, of which ``count`` images count."""
        if self._values is None:
            return
        if name not in self._values:
            self._expected += value.nbytes / COMPUTE_BATCH * self._images
            if self._expected > self._limit:
                self._values = None
                return
        self._values.setdefault(name, []).append((count, value))

    def holds(self, names: Collection[str]) -> bool:
        """Whether the values of all these tensors are here."""
        return self._values is not None and self._values.keys() >= {*names}

    @property
    def num_batches(self) -> int:
        """Of each tensor."""
        return len(next(iter(self._values.values()))) if self._values else 0

    def batches(self, name: str, some: slice = slice(None)) -> Iterator[tuple[int, Tensor]]:
        """Yield the values of a tensor with scaled channels, and how many images count."""
        assert self._values is not None
        factor = torch.from_numpy(self.factors[name]) if name in self.factors else None
        for count, value in self._values[name][some]:
            if factor is None:
                yield count, value
            else:
                yield count, value * factor.to(value).reshape(-1, *[1] * (value.dim() - 2))

    def clear(self) -> None:
        """Give up all values."""
        self._values = None


def watch(
    graph: TorchGraph, dataset: Dataset, records: Mapping[str, Collection[Record]], label: str
) -> None:
    """Run all images and pass the values of tensors to their record functions.

    The batch size is always ``COMPUTE_BATCH``, because a convolution library may round differently
    for another one. The last batch is filled up with repeated images that do not count.

    Args:
        graph: the graph, with one input.
        dataset: the images.
        records: tensor name -> functions to call with its values.
        label: of the progress bar.
    """

    def record_all(name: str, count: int, value: Tensor) -> None:
        for record in records[name]:
            record(name, count, value)

    num_batches = math.ceil(dataset.length / COMPUTE_BATCH)
    for batch in track(prefetched(dataset.batches(COMPUTE_BATCH)), num_batches, label):
        observers = {name: functools.partial(record_all, name, len(batch)) for name in records}
        x = torch.from_numpy(filled(batch))
        graph.run({graph.input_names[0]: x}, [], observe=observers)


def prefetched(batches: Iterator[Float32Array]) -> Iterator[Float32Array]:
    """Yield batches; a thread decodes the next one while the caller computes."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


def filled(batch: Float32Array) -> Float32Array:
    """Return a batch of exactly ``COMPUTE_BATCH`` images: a shorter one repeats its images."""
    if len(batch) == COMPUTE_BATCH:
        return batch
    return np.resize(batch, (COMPUTE_BATCH, *batch.shape[1:]))


def not_finite(name: str) -> CalibrationError:
    """Return the error for a tensor whose values cannot be used."""
    return CalibrationError(
        f"{name}: holds NaN, Inf or values past 1e30; check the weights before it"
    )


def merge_groups(
    activations: Iterable[Activation], histograms: Mapping[str, Histogram]
) -> dict[int, Histogram]:
    """Return group -> histogram of all its tensors; the tensors of a group share one scale."""
    merged: dict[int, Histogram] = {}
    for activation in activations:
        histogram = histograms[activation.tensor]
        others = merged.get(activation.group)
        merged[activation.group] = histogram if others is None else others.merged(histogram)
    return merged
