"""The report that every rewrite returns."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Skipped:
    """A node that a rewrite did not change, with the reason."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class RewriteReport:
    """What one rewrite changed in one net."""

    rewrite: str  # its name
    changed: tuple[str, ...] = ()  # names of the nodes that were added or changed
    skipped: tuple[Skipped, ...] = ()


def by_reason(skipped: Iterable[Skipped]) -> list[Skipped]:
    """Return one entry for each reason, which names its first node and counts the others.

    >>> by_reason([Skipped("a", "late"), Skipped("b", "late"), Skipped("c", "full")])
    [Skipped(node='a and 1 more', reason='late'), Skipped(node='c', reason='full')]
    """
    nodes: dict[str, list[str]] = {}
    for skip in skipped:
        nodes.setdefault(skip.reason, []).append(skip.node)
    return [
        Skipped(names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else ""), reason)
        for reason, names in nodes.items()
    ]
