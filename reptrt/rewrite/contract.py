"""The report that every rewrite returns."""

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
