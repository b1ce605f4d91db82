"""Run all images through a float graph once and collect statistics of its tensors."""

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reptrt.core.arrays import Float32Array
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
    merged: dict[str, Histogram] = {}
    sums: dict[str, Tensor] = {}

    def count_values(name: str, count: int, value: Tensor) -> None:
        # Some tensors have several rows per image (windows), others have no batch axis.
        rows = len(value) * count // COMPUTE_BATCH or len(value)
        histogram = histogram_of(value[:rows])
        if math.isinf(histogram.maximum):
            raise not_finite(name)
        merged[name] = histogram if name not in merged else merged[name].merged(histogram)

    def add_up(name: str, count: int, value: Tensor) -> None:
        if name not in sums:
            sums[name] = torch.zeros_like(value[:1], dtype=torch.float64)
        for image in torch.split(value[:count], 1):  # without a copy of all of them in float64
            sums[name] += image

    first: list[Tensor] = []
    others: list[bool] = []

    def compare(name: str, count: int, value: Tensor) -> None:
        first.extend([] if first else [value[:1].clone()])
        others.append(not torch.equal(value[:count], first[0].expand_as(value[:count])))

    image = graph.input_names[0]
    records: dict[str, list[Record]] = {n: [] for n in sorted({*histograms, *means, image})}
    records[image].append(compare)
    for record, names in ((count_values, histograms), (add_up, means)):
        for name in names:
            records[name].append(record)
    watch(graph, dataset, records, "calibrate")
    averages = {n: (total / dataset.length).float() for n, total in sums.items()}
    return Statistics(merged, averages, dataset.length > 1 and not any(others))


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
