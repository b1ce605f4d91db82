"""The error that quantization makes in the outputs of a net, on held-out images.

It judges choices that theory leaves open (a threshold rule and its margin, whether biases are
corrected): the choice with the least squared error is made, measured as `calib.measure` says.
Images that were used to measure ranges never exceed them, so a comparison of thresholds has to clip
activations to the ranges that were measured without the held-out images.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor

from reptrt.data.dataset import Dataset
from reptrt.execute.torchgraph import Override, TorchGraph
from reptrt.quantize.calib.collect import COMPUTE_BATCH, rows_that_count
from reptrt.quantize.calib.measure import Measure, Sums, added, relative

Replacement = Callable[..., Tensor]
Candidate = TypeVar("Candidate")

_MOST_HELD_OUT = 64  # images
_FAR = 1.5  # an error this many times as large on some of the images is larger on all of them
_NOTHING: Mapping[str, Tensor] = MappingProxyType({})
_NO_OVERRIDES: Mapping[str, Override] = MappingProxyType({})
_NO_REPLACEMENTS: Mapping[str, Replacement] = MappingProxyType({})


def stride_of(length: int) -> int:
    """Return s, at least 2: every s-th of ``length`` images is held out to judge.

    An eighth of the images is held out, but at most 64; if there are fewer than 64 images, 8 are
    held out, but at most half of them.
    """
    return max(2, min(8, length // 8), length // (_MOST_HELD_OUT + 1) + 1)


def parts(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """Return the images that are not held out, and the held-out images; a single image is both."""
    if dataset.length == 1:
        return dataset, dataset
    return dataset.parted(stride_of(dataset.length))


def least(
    candidates: Sequence[Candidate], error: Callable[[Candidate, float], float]
) -> tuple[Candidate, float]:
    """Return the first candidate with the least error, and its error.

    Args:
        candidates: at least one.
        error: of a candidate, as a function of the least error so far; from that on, it may return
            anything as large.
    """
    best, smallest = candidates[0], math.inf
    for candidate in candidates:
        if (now := error(candidate, smallest)) < smallest:
            best, smallest = candidate, now
    return best, smallest


def _single(sums: Sums) -> float:
    return sum(float(error) for _, error in sums.values())


class Outputs:
    """The outputs of a float net on images, to be compared with those of other graphs.

    Of a detector they are its raw heads. Outputs that cannot be compared are replaced: see
    `TorchGraph.comparable_names`.

    Args:
        graph: the float graph.
        dataset: the images.
    """

    def __init__(self, graph: TorchGraph, dataset: Dataset) -> None:
        self._graph = graph
        self._dataset = dataset
        self._measure = Measure(graph)
        self._seen: dict[str, list[Tensor]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that are compared."""
        return tuple(self._measure.names)

    def record(self, name: str, count: int, value: Tensor) -> None:
        """Take a compared tensor of the float net from a pass over all images (`watch`).

        One that has no rows for the images, such as a number for the batch, is not taken.
        """
        if value.dim() and len(value) % COMPUTE_BATCH == 0:
            self._seen.setdefault(name, []).append(value[: rows_that_count(count, value)])

    @functools.cached_property
    def _exact(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Images and float outputs, batch by batch; what was not recorded is computed."""
        images = [torch.from_numpy(x) for x in self._dataset.batches(COMPUTE_BATCH)]
        if all(len(self._seen.get(name, ())) == len(images) for name in self.names):
            return [(x, {n: self._seen[n][i] for n in self.names}) for i, x in enumerate(images)]
        return [(x, self._run(self._graph, x)) for x in images]

    def error(
        self,
        graph: TorchGraph,
        constants: Mapping[str, Tensor] = _NOTHING,
        overrides: Mapping[str, Override] = _NO_OVERRIDES,
        replace: Mapping[str, Replacement] = _NO_REPLACEMENTS,
        *,
        most: float = math.inf,
    ) -> float:
        """Return the squared error of another graph's outputs, summed over images and outputs.

        Several outputs count each in units of its own power, a single one as it is.

        Args:
            graph: a graph with the same input and outputs.
            constants: name -> value, for constants of that graph to replace.
            overrides: tensor name -> function of the tensor, applied in that graph.
            replace: node name -> function of its inputs that runs in its place.
            most: an error at which nobody asks how large it is exactly: if some of the images
                reach it, or promise to exceed it by half, the others are not run, and the result
                is at least ``most``.
        """
        sums: Sums = {}
        done = 0
        for x, exact in self._exact:
            outputs = self._run(graph, x, constants, overrides, replace)
            sums = added(sums, self._measure.sums(exact, outputs))
            done += len(x)
            error = self._error(sums)
            of_all = error * self._dataset.length / done if self._is_single(sums) else error
            if of_all >= _FAR * most or (self._is_single(sums) and error >= most):
                return max(error, most)
        return self._error(sums)

    def _error(self, sums: Sums) -> float:
        if self._is_single(sums):
            return _single(sums)
        return sum(float(relative(*pair)) for pair in sums.values())

    def _is_single(self, sums: Sums) -> bool:
        """Whether a single output counts as it is; the error then grows with every image."""
        return len(sums) == 1 and not self._measure.is_detector

    def _run(
        self,
        graph: TorchGraph,
        x: Tensor,
        constants: Mapping[str, Tensor] = _NOTHING,
        overrides: Mapping[str, Override] = _NO_OVERRIDES,
        replace: Mapping[str, Replacement] = _NO_REPLACEMENTS,
    ) -> dict[str, Tensor]:
        inputs = {graph.input_names[0]: x, **constants}
        return graph.run(inputs, self._measure.names, overrides=overrides, replace=replace)
