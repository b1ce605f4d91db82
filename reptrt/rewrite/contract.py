"""What a rewrite returns."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Skipped:
    """A node that a rewrite looked at and left alone."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class RewriteReport:
    """What one rewrite did to one net."""

    rewrite: str
    changed: tuple[str, ...] = ()  # names of the nodes it made or changed
    skipped: tuple[Skipped, ...] = ()
