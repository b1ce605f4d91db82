"""The error that quantization makes in the outputs of a net, on held-out images.

It judges choices that theory leaves open (a threshold rule and its margin, whether biases are
corrected): the choice with the least squared error is made, measured as `calib.measure` says.
Images that were used to measure ranges never exceed them, so a comparison of thresholds has to clip
activations to the ranges that were measured without the held-out images.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from reptrt.data.dataset import Dataset
from reptrt.execute.torchgraph import Override, TorchGraph
from reptrt.quantize.calib.collect import COMPUTE_BATCH
from reptrt.quantize.calib.measure import Measure, Sums, added, relative

Replacement = Callable[..., Tensor]

_MOST_HELD_OUT = 64  # images
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

    @functools.cached_property
    def _exact(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Images and float outputs, batch by batch; computed at the first use."""
        batches = self._dataset.batches(COMPUTE_BATCH)
        images = [torch.from_numpy(batch) for batch in batches]
        return [(x, self._run(self._graph, x)) for x in images]

    def error(
        self,
        graph: TorchGraph,
        constants: Mapping[str, Tensor] = _NOTHING,
        overrides: Mapping[str, Override] = _NO_OVERRIDES,
        replace: Mapping[str, Replacement] = _NO_REPLACEMENTS,
    ) -> float:
        """Return the squared error of another graph's outputs, summed over images and outputs.

        Several outputs count each in units of its own power, a single one as it is.

        Args:
            graph: a graph with the same input and outputs.
            constants: name -> value, for constants of that graph to replace.
            overrides: tensor name -> function of the tensor, applied in that graph.
            replace: node name -> function of its inputs that runs in its place.
        """
        sums: Sums = {}
        for x, exact in self._exact:
            outputs = self._run(graph, x, constants, overrides, replace)
            sums = added(sums, self._measure.sums(exact, outputs))
        if len(sums) == 1 and not self._measure.is_detector:
            return sum(float(error) for _, error in sums.values())
        return sum(float(relative(*pair)) for pair in sums.values())

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
