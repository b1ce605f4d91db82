"""Successive halving, and the Pareto front of cost and loss.

Half of the candidates go on after each rung, to four times as many images (Jamieson and Talwalkar,
AISTATS 2016). There are two objectives, so candidates are ranked by the front that they are on: the
first front is of those that no other beats in one of cost and loss without losing in the other, the
second is that of the rest, and so on (Deb et al., 2002, doi 10.1109/4235.996017).
"""

from collections.abc import Sequence
from typing import NamedTuple

FEWEST = 64  # images of the first rung
FACTOR = 4  # between rungs


class Point(NamedTuple):
    """A candidate with its two objectives; smaller is better for both."""

    name: str
    cost: float
    loss: float


def rungs(total: int, count: int = 3) -> tuple[int, ...]:
    """Return the numbers of images of the rungs, ascending; the last is all of them.

    >>> rungs(5000), rungs(100), rungs(40)
    ((312, 1250, 5000), (64, 100), (40,))
    """
    sizes = {max(min(FEWEST, total), total // FACTOR**step) for step in range(count)}
    return tuple(sorted(sizes))


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats, the cheapest first; of equal ones, the first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.loss)):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best


def halve(points: Sequence[Point]) -> list[str]:
    """Return the names of the better half, at least one: by front, then by loss."""
    rest = list(points)
    kept: list[Point] = []
    most = max(1, (len(points) + 1) // 2)
    while rest and len(kept) < most:
        ahead = front(rest)
        kept += sorted(ahead, key=lambda p: (p.loss, p.cost))[: most - len(kept)]
        rest = [point for point in rest if point not in ahead]
    return [point.name for point in kept]
