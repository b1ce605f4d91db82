"""What evaluation asks of a task: what the outputs of networks mean, and how good they are.

    task = open_task(options, images)          # reads labels or annotations
    tally = task.tally(name, dataset)          # one for each network
    for batch in ...: tally.add(outputs, outputs_of_reference)  # in the order of the data set
    findings = tally.findings()
    measures = {**findings.measures, **task.compare(findings_of_reference, findings)}

`Task.columns` turns measures into cells of a table, `Task.ranked_by` says which of them ranks
networks. Nothing else knows tasks: a new one is a file in this package and a line in its
``__init__``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from reptrt.core.arrays import AnyArray
from reptrt.data.dataset import Dataset
from reptrt.judge.outputs import Outputs

Measures = Mapping[str, Any]  # name in JSON -> a JSON value; fractions are 0..1; None: unknown


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table for people."""

    key: str  # of the measure
    title: str
    text: Callable[[Any], str]  # the cell of a value that is not None

    def cell(self, measures: Measures) -> str:
        """Return the cell: "-" for None, and nothing where the measure does not exist."""
        value = measures.get(self.key, "")
        if value is None or value == "":
            return "-" if value is None else ""
        return self.text(value)


def percent(fraction: float) -> str:
    """Return a fraction 0..1 as 86.14 %."""
    return f"{100 * fraction:.2f} %"


def hundredths(fraction: float) -> str:
    """Return a fraction 0..1 as 86.14, as mAP is written."""
    return f"{100 * fraction:.2f}"


def change_text(change: Mapping[str, float]) -> str:
    """Return a change of a fraction and its interval in points: -0.10 (-0.40 to +0.20)."""
    value, low, high = (100 * change[key] for key in ("value", "low", "high"))
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


class Findings(Protocol):
    """What a task found out about one network, and what it needs to compare two of them."""

    @property
    def measures(self) -> Measures:
        """The JSON fields that need no reference, in their order; None without labels."""

    @property
    def rows(self) -> Mapping[str, Measures]:
        """Further rows of the table: name, such as that of a class -> measures."""


F = TypeVar("F", bound=Findings)
F_co = TypeVar("F_co", bound=Findings, covariant=True)


class Tally(Protocol[F_co]):
    """Collects what a task needs of the outputs of one network, batch by batch."""

    def add(self, outputs: Outputs, reference: Outputs | None = None) -> None:
        """Add the outputs (n, ...) of the next n images of the data set, all finite.

        Args:
            outputs: of the network.
            reference: the outputs of the reference for these images, of the same shapes; None
                without one.

        Raises:
            ReptrtError: the outputs cannot be those of a network for this task, or do not fit the
                labels.
        """

    def findings(self) -> F_co:
        """Return the result over all images that were added."""

    def kept(self) -> dict[str, AnyArray]:
        """Return all that was collected, as arrays that a file can hold."""

    def add_kept(self, kept: Mapping[str, AnyArray]) -> None:
        """Add what another tally collected of the next images, as `add` would have."""


class Task(Protocol[F]):
    """The meaning of the outputs of networks; knows the labels or annotations of the images."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns of a table, of `Findings.measures` and of what `compare` returns."""

    @property
    def ranked_by(self) -> tuple[str, ...]:
        """Measures that rank networks, larger is better; the first that is not None counts.

        If there is none, the SQNR with the reference ranks.
        """

    def tally(self, name: str, dataset: Dataset) -> Tally[F]:
        """Return an empty tally for the outputs of a network.

        Args:
            name: of the network, for messages.
            dataset: the images, prepared for this network: size and labels.
        """

    def compare(self, reference: F | None, findings: F) -> Measures:
        """Return the JSON fields of a comparison, None for each if there is no reference.

        Args:
            reference: what was found out about the reference; may be ``findings`` itself.
            findings: what was found out about a network on the same images.
        """


def score(task: Task[Any], measures: Measures) -> float | None:
    """Return the number that ranks networks, larger is better; None: the SQNR has to."""
    values = (measures.get(key) for key in task.ranked_by)
    return next((float(value) for value in values if value is not None), None)
