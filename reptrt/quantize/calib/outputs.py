"""What quantization does to the outputs of a net, on a few images: the judge of choices.

Choices that theory leaves open (a threshold rule and its margin, whether biases are corrected) are
made by the least sum of (quantized output - float output)^2. On images that the ranges are from
nothing lies beyond them, so a judge of thresholds has to make them as narrow as they would be
without its images.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from reptrt.data.dataset import Dataset
from reptrt.execute.torchgraph import Override, TorchGraph
from reptrt.quantize.calib.collect import compute_batch

_JUDGED = 64  # images, of hundreds
_NOTHING: Mapping[str, Tensor] = MappingProxyType({})
_NO_OVERRIDES: Mapping[str, Override] = MappingProxyType({})


def stride_of(length: int) -> int:
    """Return which images judge: every so many-th of ``length``, at least 2.

    An eighth of the images, but no more than 64 of them; of fewer than 64 images 8, at most half.
    """
    return max(2, min(8, length // 8), length // _JUDGED)


def parts(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """Return the images that do not judge and those that do; a single one does both."""
    if dataset.length == 1:
        return dataset, dataset
    return dataset.parted(stride_of(dataset.length))


class Outputs:
    """The outputs of a float net on images, or what stands in for those that cannot be compared.

    Args:
        graph: the float graph.
        dataset: images.
    """

    def __init__(self, graph: TorchGraph, dataset: Dataset) -> None:
        self._graph = graph
        self._dataset = dataset

    @functools.cached_property
    def _exact(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Images and outputs, made when they are asked for."""
        batches = self._dataset.batches(compute_batch(self._graph))
        images = [torch.from_numpy(batch) for batch in batches]
        return [(x, self._run(self._graph, x)) for x in images]

    def error(
        self,
        graph: TorchGraph,
        given: Mapping[str, Tensor] = _NOTHING,
        overrides: Mapping[str, Override] = _NO_OVERRIDES,
    ) -> float:
        """Return the squared error of another graph's outputs, summed over images and outputs.

        `TorchGraph.comparable_names` says what is compared.

        Args:
            graph: one with the same input and outputs.
            given: constants to replace, by name.
            overrides: tensor name -> function of the tensor, in the other graph.
        """
        total = 0.0
        for x, exact in self._exact:
            found = self._run(graph, x, given, overrides)
            total += sum(
                float((found[name] - value).square().sum())
                for name, value in exact.items()
                if value.is_floating_point()
            )
        return total

    def _run(
        self,
        graph: TorchGraph,
        x: Tensor,
        given: Mapping[str, Tensor] = _NOTHING,
        overrides: Mapping[str, Override] = _NO_OVERRIDES,
    ) -> dict[str, Tensor]:
        inputs = {graph.input_names[0]: x, **given}
        return graph.run(inputs, self._graph.comparable_names, overrides=overrides)
