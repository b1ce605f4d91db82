"""Run several forms of one net on the same images; compare each with the first and the previous.

The outputs of at most three forms are in memory at a time.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from reptrt.core.errors import ArtifactError, EngineError, MissingDependencyError
from reptrt.core.metrics import agreement, class_scores, top_k_accuracy
from reptrt.core.result import Result
from reptrt.data.dataset import Dataset
from reptrt.execute.runner import Runner
from reptrt.judge.conditioning import Conditioning, conditioning_line
from reptrt.judge.options import BATCH
from reptrt.judge.outputs import (
    Outputs,
    first_of,
    num_not_finite,
    paired,
    refuse_labels_beyond,
    run_batch,
    run_dataset,
    total_sqnr_db,
)
from reptrt.judge.rung_scores import TOP1, RungScores
from reptrt.judge.tasks.protocol import Task

_NOT_COMPARED = ("-",) * 4


@dataclass(frozen=True, slots=True)
class Distance:
    """The distance between the outputs of two rungs."""

    max_difference: float  # of the first output, in its units
    sqnr_db: float | None  # over all outputs, each in its own unit; None: they are equal
    agreement: float | None  # fraction of images with the same arg max; None: not a classifier
    top1_change: float | None  # change of the fraction; None: no labels, or not a classifier
    score_change: float | None = None  # change of the task's score; None: as `Rung.score`


@dataclass(frozen=True, slots=True)
class Rung:
    """One form of the net in one executor."""

    name: str
    runs_in: str
    top1: float | None = None  # fraction; None: no labels, not a classifier, or not run
    from_first: Distance | None = None  # None: this is the first rung, or it was not run
    from_before: Distance | None = None
    score: float | None = None  # of another task than classify, such as mAP; None: there is none
    not_run: str | None = None  # the reason why it was not run; None: it was run


@dataclass(frozen=True, slots=True, repr=False)
class Ladder(Result):
    """All rungs, from the first to the last."""

    rungs: tuple[Rung, ...]
    images: int
    largest_output: float  # largest first output of the first rung, as a measure for differences
    noise_db: float | None = None  # SQNR of the first rung under the noise of its images' rounding
    measure: str = TOP1  # name of the number that each rung has: top1, or the task's score

    @property
    def ill_conditioned(self) -> str | None:
        """A sentence where the net is so ill-conditioned that SQNR says nothing."""
        return conditioning_line(self.noise_db)

    def to_dict(self) -> dict[str, Any]:
        """Return the ladder as JSON values."""
        return asdict(self) | {"ill_conditioned": self.ill_conditioned}

    def to_table(self) -> Table:
        """Return the rungs as a table for people."""
        unit = f"{self.images} images; outputs up to {self.largest_output:.3g}"
        table = Table(box=None, pad_edge=False, caption=unit, caption_justify="left")
        table.add_column("rung", overflow="fold")
        table.add_column("runs in", no_wrap=True)
        titles = ("agreement", "SQNR dB", "max diff.")
        for title in (self.measure, *titles, f"step: {self.measure}", *titles):
            table.add_column(title, justify="right", no_wrap=True)
        for rung in self.rungs:
            so_far, step = _cells(rung.from_first), _cells(rung.from_before)
            table.add_row(rung.name, rung.runs_in, _measure(rung), *so_far[1:], *step)
        return table

    def to_lines(self) -> list[str]:
        """Return a line for each rung that was not run, and one on an ill-conditioned net."""
        lines = [f"{r.name}: not run: {r.not_run}" for r in self.rungs if r.not_run is not None]
        return lines if self.ill_conditioned is None else [*lines, self.ill_conditioned]


class Step(NamedTuple):
    """How to run one form."""

    name: str
    runs_in: str
    open: Callable[[], Runner]
    may_fail: bool = False  # the form needs TensorRT or a GPU; without them it is not run


def measure(steps: Iterable[Step], dataset: Dataset, task: Task[Any] | None = None) -> Ladder:
    """Run every form on all images, one after the other.

    Args:
        steps: the forms.
        dataset: the images.
        task: gives each rung a score; None: top-1 does, where there are labels.

    Raises:
        ArtifactError: outputs are NaN or infinite, or have another shape than the first form's.
        DataError: a label is larger than the net's number of classes allows.
        ReptrtError: a form cannot be run, and is not one that may fail.
    """
    rungs: list[Rung] = []
    conditioning = Conditioning(dataset.preprocess)
    first: Outputs | None = None
    before: Outputs | None = None
    scores = RungScores(task, dataset)
    for step in steps:
        try:
            with step.open() as runner:
                outputs = run_dataset([runner], dataset, BATCH)[0]
                if first is None:
                    images = next(dataset.batches(BATCH))
                    conditioning.add(images, outputs, functools.partial(run_batch, runner))
        except (EngineError, MissingDependencyError) as err:
            if not step.may_fail:
                raise
            rungs.append(Rung(step.name, step.runs_in, not_run=str(err)))
            continue
        first = outputs if first is None else first
        if first.keys().isdisjoint(outputs):
            missing = f"torch cannot compute {', '.join(first)}, which the net returns"
            rungs.append(Rung(step.name, step.runs_in, not_run=missing))
            continue
        _check(step, outputs, first)
        rungs.append(_rung(step, outputs, first, before, scores))
        before = outputs
    if first is None:
        raise ArtifactError("no form of the net could be run")
    return Ladder(tuple(rungs), dataset.length, _largest(first), conditioning.sqnr_db, scores.title)


def _largest(outputs: Outputs) -> float:
    return float(np.abs(first_of(outputs)).max(initial=0.0))


def _check(step: Step, outputs: Outputs, first: Outputs) -> None:
    bad, images = num_not_finite(outputs), len(first_of(outputs))
    where = f"{step.name} in {step.runs_in}"
    if bad:
        raise ArtifactError(
            f"{where}: NaN or infinite outputs on {bad} of {images} images; the net is "
            "broken, or its inputs are on another scale than it expects"
        )
    for name, (expected, got) in paired(first, outputs).items():
        if got.shape != expected.shape:
            raise ArtifactError(
                f"{where}: output {name} has shape {got.shape}, that of the first rung "
                f"{expected.shape}"
            )


def _rung(
    step: Step, outputs: Outputs, first: Outputs, before: Outputs | None, scores: RungScores
) -> Rung:
    dataset = scores.dataset
    now, from_first, from_before = scores.of(f"{step.name} in {step.runs_in}", outputs)
    rung = Rung(step.name, step.runs_in, _top1(outputs, dataset), score=now)
    if before is None:
        return rung
    return replace(
        rung,
        from_first=replace(_distance(first, outputs, dataset), score_change=from_first),
        from_before=replace(_distance(before, outputs, dataset), score_change=from_before),
    )


def _distance(reference: Outputs, outputs: Outputs, dataset: Dataset) -> Distance:
    ratio = total_sqnr_db(reference, outputs)
    exact, got = next(iter(paired(reference, outputs).values()))
    top1_before, top1 = _top1(reference, dataset), _top1(outputs, dataset)
    rows, expected = class_scores(got), class_scores(exact)
    return Distance(
        max_difference=float(np.abs(got.astype(np.float64) - exact).max(initial=0.0)),
        sqnr_db=ratio if math.isfinite(ratio) else None,
        agreement=None if rows is None or expected is None else agreement(expected, rows),
        top1_change=None if top1_before is None or top1 is None else top1 - top1_before,
    )


def _top1(outputs: Outputs, dataset: Dataset) -> float | None:
    rows, labels = class_scores(first_of(outputs)), dataset.labels
    if rows is None or labels is None:
        return None
    refuse_labels_beyond(dataset.name, labels, rows.shape[1])
    return top_k_accuracy(rows, labels, 1)


def _cells(distance: Distance | None) -> tuple[str, ...]:
    """Return top-1 change, agreement, SQNR and largest difference as texts."""
    if distance is None:
        return _NOT_COMPARED
    top1 = distance.top1_change if distance.score_change is None else distance.score_change
    same, ratio = distance.agreement, distance.sqnr_db
    equal = "equal" if distance.max_difference == 0 else "-"
    return (
        "-" if top1 is None else f"{100 * top1:+.2f}",
        "-" if same is None else f"{100 * same:.2f} %",
        equal if ratio is None else f"{ratio:.2f}",
        f"{distance.max_difference:.2g}",
    )


def _measure(rung: Rung) -> str:
    if rung.score is not None:
        return f"{100 * rung.score:.2f}"
    return "-" if rung.top1 is None else f"{100 * rung.top1:.2f} %"
