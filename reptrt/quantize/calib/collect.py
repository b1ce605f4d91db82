"""Run images through a float graph and collect statistics of its tensors, all in one pass."""

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reptrt.core.errors import CalibrationError
from reptrt.core.progress import track
from reptrt.data.dataset import Dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.placement import Activation
from reptrt.quantize.calib.histogram import Histogram, histogram_of

COMPUTE_BATCH = 32

Record = Callable[[str, int, Tensor], None]  # a tensor's name, images that count, its values


@dataclass(frozen=True, slots=True)
class Statistics:
    """What was seen of the tensors of a graph."""

    histograms: Mapping[str, Histogram]  # of |x|
    means: Mapping[str, Tensor]  # E[x] over the images, (1, C, H, W), summed in float64


def collect(
    graph: TorchGraph, dataset: Dataset, histograms: Collection[str], means: Collection[str] = ()
) -> Statistics:
    """Return the histogram of |x| of some tensors, and the mean over all images of others.

    Memory: one batch of activations, 64 KiB per histogram, one image per mean in float64.

    Raises:
        CalibrationError: a tensor with a histogram holds NaN or Inf.
    """
    found: dict[str, Histogram] = {}
    sums: dict[str, Tensor] = {}

    def count_values(name: str, count: int, value: Tensor) -> None:
        rows = len(value) * count // COMPUTE_BATCH or len(value)  # batch x windows, or no batch
        histogram = histogram_of(value[:rows])
        if math.isinf(histogram.maximum):
            raise not_finite(name)
        found[name] = histogram if name not in found else found[name].merged(histogram)

    def add_up(name: str, count: int, value: Tensor) -> None:
        if len(value) == 1:  # of a net for one image: a Reshape to [1, -1] folds the batch
            value = value.reshape(COMPUTE_BATCH, -1)
        total = value[:count].sum(0, keepdim=True, dtype=torch.float64)
        sums[name] = total if name not in sums else sums[name] + total

    records: dict[str, list[Record]] = {name: [] for name in sorted({*histograms, *means})}
    for record, names in ((count_values, histograms), (add_up, means)):
        for name in names:
            records[name].append(record)
    watch(graph, dataset, records, "calibrate")
    return Statistics(found, {n: (total / dataset.length).float() for n, total in sums.items()})


def watch(
    graph: TorchGraph, dataset: Dataset, records: Mapping[str, Collection[Record]], label: str
) -> None:
    """Run all images and hand the values of tensors to their records.

    Images always run ``COMPUTE_BATCH`` at a time, the last batch filled up with repetitions that
    do not count: a convolution library may round differently for another batch size, and the
    result must not depend on one.
    """

    def show(name: str, count: int, value: Tensor) -> None:
        for record in records[name]:
            record(name, count, value)

    num_batches = math.ceil(dataset.length / COMPUTE_BATCH)
    for batch in track(dataset.batches(COMPUTE_BATCH), num_batches, label):
        observers = {name: functools.partial(show, name, len(batch)) for name in records}
        x = torch.from_numpy(filled(batch))
        graph.run({graph.input_names[0]: x}, [], observe=observers)


def compute_batch(graph: TorchGraph) -> int:
    """Return how many images a graph may run at a time: one, if it was exported for one."""
    for_one = graph.input_shapes[graph.input_names[0]][:1] == (1,)
    return 1 if for_one else COMPUTE_BATCH


def filled(batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return a batch of exactly ``COMPUTE_BATCH`` images: the last one repeats its own."""
    if len(batch) == COMPUTE_BATCH:
        return batch
    return np.resize(batch, (COMPUTE_BATCH, *batch.shape[1:]))


def not_finite(name: str) -> CalibrationError:
    """Return the error for a tensor from which no statistics follow."""
    return CalibrationError(
        f"{name}: holds NaN, Inf or values past 1e30; check the weights before it"
    )


def merge_groups(
    activations: Iterable[Activation], histograms: Mapping[str, Histogram]
) -> dict[int, Histogram]:
    """Return one histogram per scale group: what tensors with a common scale hold together.

    Raises:
        CalibrationError: a tensor is zero on all images, so no scale follows from it.
    """
    merged: dict[int, Histogram] = {}
    for activation in activations:
        histogram = histograms[activation.tensor]
        if histogram.maximum == 0.0:
            readers = ", ".join(name for name, _ in activation.readers)
            raise CalibrationError(
                f"{activation.tensor}: amax is 0 over {histogram.zeros} values: it is dead; "
                f"check the weights before it, or leave {readers} in float with --exclude"
            )
        known = merged.get(activation.group)
        merged[activation.group] = histogram if known is None else known.merged(histogram)
    return merged
