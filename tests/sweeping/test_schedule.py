"""Executors and the schedule, with work that needs no net."""

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reptrt.core.errors import ConfigError
from reptrt.sweeping.local import LocalProcesses, ThisProcess
from reptrt.sweeping.schedule import Queue, run
from reptrt.sweeping.tasks import Executor, Outcome, Placement, Task
from tests.support.pages import REPOSITORY

STUBS = "tests.sweeping.stubs"


def queue_of(*tasks: Task) -> Queue:
    queue = Queue()
    for task in tasks:
        queue.add(task)
    return queue


@pytest.fixture(scope="module")
def local() -> Iterator[LocalProcesses]:
    executor = LocalProcesses(2, 1)
    yield executor
    executor.close()


class Recorded:
    """Runs tasks at once and records how many were started."""

    def __init__(self, deaths: int = 0) -> None:
        self.tasks: deque[Task] = deque()
        self.most: dict[float, int] = {}
        self.deaths = deaths

    def slots(self, placement: Placement) -> int:
        return 3

    def start(self, task: Task) -> None:
        self.tasks.append(task)
        gpus = task.placement.gpus
        now = sum(other.placement.gpus == gpus for other in self.tasks)
        self.most[gpus] = max(self.most.get(gpus, 0), now)

    def wait(self) -> Outcome:
        task = self.tasks.popleft()
        if self.deaths:
            self.deaths -= 1
            return Outcome(task, death="killed")
        return Outcome(task, result=task.name)

    def close(self) -> None:
        pass


def test_each_placement_has_slots_of_its_own() -> None:
    executor = Recorded()
    tasks = [Task(str(i), "", {}, Placement(gpus=i % 2)) for i in range(20)]
    outcomes = list(run(executor, queue_of(*tasks), 0))
    assert sorted(o.result for o in outcomes) == sorted(task.name for task in tasks)
    assert executor.most == {0: 3, 1: 3}


def test_tasks_can_be_added_while_it_runs() -> None:
    queue = queue_of(Task("a", "", {}))
    names = []
    for outcome in run(Recorded(), queue, 0):
        names.append(outcome.result)
        if len(names) < 4:
            queue.add(Task(outcome.result + "a", "", {}), first=True)
    assert names == ["a", "aa", "aaa", "aaaa"]


@pytest.mark.parametrize(
    ("deaths", "retries", "works"), [(2, 2, True), (3, 2, False), (1, 0, False)]
)
def test_a_task_is_started_again_a_bounded_number_of_times(
    deaths: int, retries: int, works: bool
) -> None:
    executor: Executor = Recorded(deaths)
    (outcome,) = run(executor, queue_of(Task("a", "", {})), retries)
    assert outcome.attempts == (deaths + 1 if works else deaths)
    assert (outcome.failure is None) == works
    assert outcome.death is None
    if not works:
        assert "worker died" in (outcome.failure or "")
        assert "killed" in (outcome.failure or "")


@pytest.mark.slow
def test_processes_return_results_and_failures_as_lines(local: LocalProcesses) -> None:
    tasks = [Task(str(i), f"{STUBS}:double", {"number": i}) for i in range(7)]
    tasks += [Task(name, f"{STUBS}:{name}", {}) for name in ("refuse", "break_down", "missing")]
    found = {outcome.task.name: outcome for outcome in run(local, queue_of(*tasks), 0)}
    assert [found[str(i)].result for i in range(7)] == [2 * i for i in range(7)]
    assert found["refuse"].failure == "x.npz: holds no images"
    assert "JSONDecodeError" in (found["break_down"].failure or "")
    assert "bug" in (found["break_down"].failure or "")
    assert "has no attribute 'missing'" in (found["missing"].failure or "")


@pytest.mark.slow
def test_a_killed_process_is_replaced(local: LocalProcesses, tmp_path: Path) -> None:
    payload: dict[str, Any] = {"folder": str(tmp_path), "times": 2}
    other = Task("other", f"{STUBS}:double", {"number": 4})
    found = {
        outcome.task.name: outcome
        for outcome in run(local, queue_of(Task("a", f"{STUBS}:die_often", payload), other), 2)
    }
    assert (found["a"].result, found["a"].attempts) == ("done", 3)
    assert found["other"].result == 8


@pytest.mark.slow
def test_the_last_words_of_a_worker_are_kept(local: LocalProcesses) -> None:
    (outcome,) = run(local, queue_of(Task("a", f"{STUBS}:end", {})), 0)
    assert outcome.failure is not None
    assert "status 7: a library says goodbye" in outcome.failure


@pytest.mark.slow
def test_workers_end_with_whoever_started_them(tmp_path: Path) -> None:
    program = (
        "import sys; from reptrt.sweeping.local import LocalProcesses\n"
        "from reptrt.sweeping.tasks import Task\n"
        "executor = LocalProcesses(1, 1)\n"
        "executor.start(Task('a', 'tests.sweeping.stubs:sleep', "
        "{'folder': sys.argv[1], 'seconds': 60}))\n"
        "executor.wait()"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, stdin=subprocess.DEVNULL
    )
    wait_for(lambda: os.listdir(tmp_path))
    driver.kill()
    driver.wait()
    worker = int(os.listdir(tmp_path)[0])
    wait_for(lambda: not is_running(worker))


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.02)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")
    return not (state.is_file() and state.read_text().rpartition(")")[2].split()[0] == "Z")


def test_this_process_runs_tasks_too() -> None:
    task = Task("a", f"{STUBS}:double", {"number": 1})
    (outcome,) = run(ThisProcess(), queue_of(task), 0)
    assert json.dumps(outcome.result) == "2"


@pytest.mark.parametrize("values", [{"cpus": -1}, {"gpus": float("nan")}, {"resources": {"a": 0}}])
def test_placements_are_checked(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(values))}: .*got"):
        Placement(**values)
