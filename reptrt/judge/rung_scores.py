"""What the task says of the rungs of a ladder: mAP of detectors, mIoU of segmenters."""

from typing import Any

from reptrt.data.dataset import Dataset
from reptrt.judge.options import BATCH
from reptrt.judge.outputs import Outputs
from reptrt.judge.tasks.classify import Classify
from reptrt.judge.tasks.protocol import Task, score

TOP1 = "top-1"


class RungScores:
    """The scores of rungs, in their order; of a classifier none, since top-1 says it.

    Args:
        task: of the outputs; None: none has a score.
        dataset: the images.
    """

    def __init__(self, task: Task[Any] | None, dataset: Dataset) -> None:
        self.dataset = dataset
        self._task = None if isinstance(task, Classify) else task
        self._first: float | None = None
        self._before: float | None = None

    @property
    def title(self) -> str:
        """The name of the number that each rung gets."""
        if self._task is None:
            return TOP1
        titles = {column.key: column.title for column in self._task.columns}
        return next((titles[key] for key in self._task.ranked_by if key in titles), TOP1)

    def of(self, name: str, outputs: Outputs) -> tuple[float | None, float | None, float | None]:
        """Return the score of the next rung, its change from the first, and from the one before.

        Args:
            name: of the rung, for messages.
            outputs: over all images.
        """
        if self._task is None:
            return None, None, None
        tally = self._task.tally(name, self.dataset)
        for start in range(0, self.dataset.length, BATCH):
            tally.add({key: value[start : start + BATCH] for key, value in outputs.items()})
        now = score(self._task, tally.findings().measures)
        first, before = self._first, self._before
        self._first, self._before = now if first is None else first, now
        return now, _change(first, now), _change(before, now)


def _change(before: float | None, now: float | None) -> float | None:
    return None if before is None or now is None else now - before
