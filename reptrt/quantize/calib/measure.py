"""What of a net is compared with the float net, and in which unit.

The outputs of a net count each in units of its own power, so that large units do not outvote small
ones:

    error = sum over outputs of  sum |y' - y|^n / sum |y|^n        n = 2 (squares) or 1 (absolute)

A detector is compared at its raw heads (`reptrt.graph.heads`), in groups. Nearly all places of an
image hold no object, and neither the logit of their score (-9 or -12: both are 0) nor their box
matters. So a score counts as it is behind its Sigmoid, multiplied by the objectness of its place if
the net has one, and a box by the largest score w of its place in the float net (ours):

    scores    sum |p' - p|^n / sum p^n             over all heads with scores
    boxes     sum w |b' - b|^n / sum w |b|^n       over all other heads with as many channels
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from reptrt.execute.torchgraph import TorchGraph

Order = Literal[1, 2]
Sums = dict[str, tuple[Tensor, Tensor]]  # group -> sums over its values: of signal and of error


class Measure:
    """How the outputs of a float graph are compared with those of others.

    Args:
        graph: the float graph.
    """

    def __init__(self, graph: TorchGraph) -> None:
        self._is_score = graph.heads.scores
        self.names = graph.heads.names or graph.comparable_names

    @property
    def is_detector(self) -> bool:
        """Whether raw heads are compared, not outputs."""
        return bool(self._is_score)

    def is_measured(self, name: str) -> bool:
        """Whether a tensor is a raw head, or lies on the way to one."""
        return name in self._is_score

    def sums(
        self, exact: Mapping[str, Tensor], other: Mapping[str, Tensor], order: Order = 2
    ) -> Sums:
        """Return the sums of |y|^n and of |y' - y|^n of each group of compared tensors.

        Args:
            exact: name -> values (N, ...) in the float net; only these are compared.
            other: the same in another net.
            order: n.
        """
        real = {name: value for name, value in exact.items() if value.is_floating_point()}
        scores = [name for name in real if self._is_score.get(name)]
        places = _by_place([real[name] for name in scores])
        weights = [_weight(tensors) for tensors in places]
        sums: Sums = {}
        for name, value in real.items():
            if name not in self._is_score:
                _add(sums, name, value, other[name], None, order)
            elif name not in scores:
                group = f"boxes of {value.shape[_channels(value)]}"
                _add(sums, group, value, other[name], _aligned(value, weights), order)
        changed = _by_place([other[name] for name in scores])
        for values, others in zip(places, changed, strict=True):
            for value, change in zip(_products(values), _products(others), strict=True):
                _add(sums, "scores", value, change, None, order)
        return sums


def _add(
    sums: Sums, group: str, exact: Tensor, other: Tensor, weight: Tensor | None, order: Order
) -> None:
    """Add the sums of one tensor to those of its group."""
    signal, error = exact, other - exact
    signal, error = (x.abs() if order == 1 else x.square() for x in (signal, error))
    if weight is not None:
        signal, error = signal * weight, error * weight
    before = sums.get(group)
    pair = (signal.sum(dtype=torch.float64), error.sum())
    sums[group] = pair if before is None else (before[0] + pair[0], before[1] + pair[1])


def _channels(x: Tensor) -> int:
    """Return the axis of classes or sides, in (N, C, H, W), (N, A, C), (N, C, A) and the like."""
    if x.dim() == 3:
        return 1 if x.shape[1] < x.shape[2] else 2
    return 4 if x.dim() == 5 else min(1, x.dim() - 1)


def _by_place(scores: list[Tensor]) -> list[list[Tensor]]:
    """Return the tensors that have scores for the same places together, channels last."""
    places: dict[tuple[int, ...], list[Tensor]] = {}
    for value in scores:
        last = value.movedim(_channels(value), -1)
        places.setdefault(tuple(last.shape[:-1]), []).append(last)
    return list(places.values())


def _products(scores: list[Tensor]) -> list[Tensor]:
    """Return the scores of classes, each multiplied by those of one channel, the objectness."""
    several = [value for value in scores if value.shape[-1] > 1]
    factors = [value for value in scores if value.shape[-1] == 1]
    if not several:
        return [math.prod(factors[1:], start=factors[0])]
    return [math.prod(factors, start=value) for value in several]


def _weight(scores: list[Tensor]) -> Tensor:
    """Return the largest score of each place, (N, ...)."""
    return torch.stack([value.amax(-1) for value in _products(scores)]).amax(0)


def _aligned(boxes: Tensor, weights: list[Tensor]) -> Tensor | None:
    """Return the weights of the places of boxes, with axes of size 1 elsewhere; None: unknown."""
    shape = tuple(boxes.shape)
    for weight in weights:
        for places in (tuple(weight.shape[1:]), (weight[0].numel(),)):
            for start in range(len(shape) - len(places), 0, -1):
                if shape[start : start + len(places)] == places and shape[0] == weight.shape[0]:
                    before, after = start - 1, len(shape) - start - len(places)
                    return weight.reshape(shape[0], *[1] * before, *places, *[1] * after)
    return None
