"""What of a net is compared with the float net, and in which unit.

The outputs of a net count each in units of its own power, so that large units do not outvote small
ones:

    error = sum over outputs of  sum |y' - y|^n / sum |y|^n        n = 2 (squares) or 1 (absolute)

A detector is compared at its raw heads (`reptrt.graph.heads`), in groups. Nearly all places of an
image hold no object, and neither the logit of their score (-9 or -12: both are 0) nor their box
matters. So a score counts as it is behind its Sigmoid, multiplied by the objectness of its place if
the net has one, and a box by the largest score w of its place in the float net (ours):

    scores    sum over classes of e / sqrt(P)  /  sum over classes of sqrt(P)
              e = sum |p' - p|^n, P = sum p^n      of a class, over all heads with scores
    boxes     sum w |b' - b|^n / sum w |b|^n       over all other heads with as many channels

Heads that have no score for each place (prototypes of masks) form groups of their own, with w = 1.
Where no head has scores (two maps that are resized), each counts in units of its own power.

If all classes were summed, a frequent one would hide the others, although mAP is the mean over
classes; if each had the unit P, the noise of a class that no image shows would decide.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from reptrt.execute.torchgraph import TorchGraph

Order = Literal[1, 2]
# group -> sums over its values, of the signal and of the error: () or, of scores, (C,)
Sums = dict[str, tuple[Tensor, Tensor]]
_WITH_ANCHORS = 5  # axes of (N, anchors, H, W, 1 + C)
_SUM_IS_ONE = 1e-3  # probabilities of a Softmax, also in FP16


class Measure:
    """How the outputs of a float graph are compared with those of others.

    Args:
        graph: the float graph.
    """

    def __init__(self, graph: TorchGraph) -> None:
        self._is_score = graph.heads.scores
        self.names = graph.heads.names or graph.comparable_names
        self._has_scores = any(self._is_score.get(name) for name in self.names)

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
        names = [name for name in real if self._is_score.get(name)]
        scores = _scores(*({name: values[name] for name in names} for values in (exact, other)))
        weights = [torch.stack([p.amax(-1) for p, _ in pairs]).amax(0) for pairs in scores]
        sums: Sums = {}
        for name, value in real.items():
            if name not in self._is_score:
                _add(sums, name, _powers(value, other[name], order))
            elif name not in names:
                powers, kind = _powers(value, other[name], order), "values"
                if (weight := _aligned(value, weights)) is not None:
                    powers, kind = (powers[0] * weight, powers[1] * weight), "boxes"
                group = f"{kind} of {value.shape[_channels(value)]}"
                _add(sums, group if self._has_scores else name, powers)
        for p, q in (pair for pairs in scores for pair in pairs):
            _add(sums, f"scores of {p.shape[-1]}", _powers(p, q, order), each=True)
        return sums


def relative(signal: Tensor, error: Tensor) -> Tensor:
    """Return the relative error of a group, (), from its sums () or (C,)."""
    roots = torch.where(signal > 0, signal, 1.0).sqrt()
    return (error / roots).sum() / roots.sum()


def added(first: Sums, second: Sums) -> Sums:
    """Return the sums over the images of both."""
    both = dict(first)
    for group, (signal, error) in second.items():
        before = both.get(group)
        both[group] = (signal, error) if before is None else (before[0] + signal, before[1] + error)
    return both


def _powers(exact: Tensor, other: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    error = other - exact
    return (exact.abs(), error.abs()) if order == 1 else (exact.square(), error.square())


def _add(sums: Sums, group: str, powers: tuple[Tensor, Tensor], each: bool = False) -> None:
    """Add the sums over one tensor to those of its group, for each of its last channels if asked.

    Sums are float64, so that adding up batches does not depend on how many there are.
    """
    axes = list(range(powers[0].dim() - 1)) if each else None
    signal, error = powers[0].sum(axes, dtype=torch.float64), powers[1].sum(axes).double()
    sums |= added({group: sums[group]} if group in sums else {}, {group: (signal, error)})


def _channels(x: Tensor) -> int:
    """Return the axis of classes or sides, in (N, C, H, W), (N, A, C), (N, C, A) and the like."""
    if x.dim() == 3:
        return 1 if x.shape[1] < x.shape[2] else 2
    return 4 if x.dim() == 5 else min(1, x.dim() - 1)


def _scores(
    exact: Mapping[str, Tensor], other: Mapping[str, Tensor]
) -> list[list[tuple[Tensor, Tensor]]]:
    """Return the scores of classes in both nets, (N, ..., C), those of the same places together.

    Scores of one channel are the objectness of their places, or their centerness: they multiply the
    others. So does the first channel where the places of anchors have an axis of their own, as in
    YOLO v3 to v7. A Softmax has a class for the background, which is left out.
    """
    places: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
    for name, value in exact.items():
        p, q = (x.movedim(_channels(value), -1) for x in (value, other[name]))
        pairs = [(p, q)]
        if value.dim() == _WITH_ANCHORS and p.shape[-1] > 1:
            pairs = [(p[..., :1], q[..., :1]), (p[..., 1:], q[..., 1:])]
        elif p.shape[-1] > 1 and bool((p.sum(-1) - 1).abs().amax() < _SUM_IS_ONE):
            kept = torch.arange(p.shape[-1], device=p.device) != p.flatten(0, -2).mean(0).argmax()
            pairs = [(p[..., kept], q[..., kept])]
        places.setdefault(tuple(p.shape[:-1]), []).extend(pairs)
    return [_products(pairs) for pairs in places.values()]


def _products(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Return the pairs of several channels, multiplied by all pairs of one channel."""
    factors = [pair for pair in pairs if pair[0].shape[-1] == 1]
    classes = [pair for pair in pairs if pair[0].shape[-1] > 1] or [factors.pop()]
    p, q = (math.prod((pair[i] for pair in factors), start=1) for i in (0, 1))
    return [(first * p, second * q) for first, second in classes]


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
