"""Run images through a float graph and collect one histogram per tensor."""

import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from reptrt.calib.histogram import Histogram, histogram_of
from reptrt.data import Dataset
from reptrt.errors import CalibrationError
from reptrt.placement import Activation
from reptrt.progress import track
from reptrt.torchgraph import TorchGraph

COMPUTE_BATCH = 32


def collect(graph: TorchGraph, dataset: Dataset, tensors: Sequence[str]) -> dict[str, Histogram]:
    """Return the histogram of |x| of each named tensor over all images.

    Images always run ``COMPUTE_BATCH`` at a time, the last batch filled up with repetitions that
    are not counted: a convolution library may round differently for another batch size, and the
    result must not depend on one. Memory: one batch of activations and 64 KiB per tensor.

    Raises:
        CalibrationError: a tensor holds NaN or Inf.
    """
    histograms: dict[str, Histogram] = {}
    num_batches = math.ceil(dataset.length / COMPUTE_BATCH)
    batches = track(dataset.batches(COMPUTE_BATCH), num_batches, "calibrate")
    for batch in batches:
        for name, histogram in _batch_histograms(graph, batch, tensors):
            previous = histograms.get(name)
            histograms[name] = histogram if previous is None else previous.merged(histogram)
    return histograms


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
    activations: Iterable[Activation], histograms: dict[str, Histogram]
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


def _batch_histograms(
    graph: TorchGraph, batch: npt.NDArray[np.float32], tensors: Sequence[str]
) -> list[tuple[str, Histogram]]:
    found: list[tuple[str, Histogram]] = []
    count = len(batch)

    def record(name: str, value: torch.Tensor) -> None:
        rows = len(value) * count // COMPUTE_BATCH or len(value)  # batch x windows, or no batch
        histogram = histogram_of(value[:rows])
        if math.isinf(histogram.maximum):
            raise not_finite(name)
        found.append((name, histogram))

    observers = {name: functools.partial(record, name) for name in tensors}
    graph.run({graph.input_names[0]: torch.from_numpy(filled(batch))}, [], observe=observers)
    return found
