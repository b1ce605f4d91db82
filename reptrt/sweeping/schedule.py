"""Keep an executor busy: as many tasks as it has slots for, and again what died."""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace

from reptrt.sweeping.tasks import Executor, Outcome, Placement, Task

_LOG = logging.getLogger(__name__)


class Queue:
    """Tasks that wait, in order; those of one placement do not hold up those of another."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[Task]] = {}

    def add(self, task: Task, *, first: bool = False) -> None:
        """Add a task, at the end of its line or before all others."""
        line = self._lines.setdefault(task.placement.key, deque())
        if first:
            line.appendleft(task)
        else:
            line.append(task)

    def take(self, has_room: Callable[[Placement], bool]) -> Task | None:
        """Return the next task that there is room for; None: there is none."""
        for line in self._lines.values():
            if line and has_room(line[0].placement):
                return line.popleft()
        return None


def run(executor: Executor, queue: Queue, retries: int) -> Iterator[Outcome]:
    """Yield what came of each task, in the order in which they end.

    The caller may add tasks to the queue between two outcomes. A task whose worker died is started
    again, at most ``retries`` times; then its death is a failure.
    """
    started: Counter[str] = Counter()  # by placement
    deaths: Counter[int] = Counter()

    def has_room(placement: Placement) -> bool:
        return started[placement.key] < executor.slots(placement)

    while True:
        while (task := queue.take(has_room)) is not None:
            started[task.placement.key] += 1
            executor.start(task)
        if not started.total():
            return
        outcome = executor.wait()
        task = outcome.task
        started[task.placement.key] -= 1
        if outcome.death is None:
            yield replace(outcome, attempts=deaths.pop(id(task), 0) + 1)
            continue
        deaths[id(task)] += 1
        if deaths[id(task)] <= retries:
            _LOG.info("%s: %s; started again", task.name, outcome.death)
            queue.add(task, first=True)
            continue
        times = deaths.pop(id(task))
        failure = f"its worker died {times} times" if times > 1 else "its worker died"
        yield replace(
            outcome,
            failure=f"{failure}: {outcome.death}",
            death=None,
            attempts=times,
        )
