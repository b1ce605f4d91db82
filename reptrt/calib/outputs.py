"""What quantization does to the outputs of a net, on a few images: the judge of choices.

Choices that theory leaves open (a threshold rule and its margin, whether biases are corrected) are
made by the least sum of (quantized output - float output)^2. A judge of thresholds must not know
the images that the ranges are from: on those nothing lies beyond the largest value seen.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from reptrt.calib.collect import compute_batch
from reptrt.data import Dataset
from reptrt.torchgraph import TorchGraph

_JUDGED = 64  # images, of hundreds
_NOTHING: Mapping[str, Tensor] = MappingProxyType({})


def stride_of(length: int) -> int:
    """Return which images judge: every so many-th of ``length``, at least 2.

    An eighth of the images, but no more than 64 of them; of fewer than 64 images 8, at most half.
    """
    return max(2, min(8, length // 8), length // _JUDGED)


class Outputs:
    """The outputs of a float net on images.

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
        return [(x, self._run(self._graph, x, _NOTHING)) for x in images]

    def error(self, graph: TorchGraph, given: Mapping[str, Tensor] = _NOTHING) -> float:
        """Return the squared error of another graph's outputs, summed over images and outputs.

        Outputs that are no numbers to compare (indices, truth values) do not count.

        Args:
            graph: one with the same input and outputs.
            given: constants to replace, by name.
        """
        total = 0.0
        for x, exact in self._exact:
            found = self._run(graph, x, given)
            total += sum(
                float((found[name] - value).square().sum())
                for name, value in exact.items()
                if value.is_floating_point()
            )
        return total

    @staticmethod
    def _run(graph: TorchGraph, x: Tensor, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return graph.run({graph.input_names[0]: x, **given}, graph.output_names)
