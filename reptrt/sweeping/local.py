"""Executors on this machine: worker processes, or this process itself."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from typing import IO

from reptrt.sweeping.tasks import Outcome, Placement, Task
from reptrt.sweeping.worker import call

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
_START += "from reptrt.sweeping.worker import main; main()"
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def thread_variables(threads: int) -> dict[str, str]:
    """Return the environment in which libraries use some threads, and do not spin."""
    return {**dict.fromkeys(_THREADS, str(threads)), "OMP_WAIT_POLICY": "PASSIVE"}


class _Worker:
    """A process, the task that it works on, and what it says on stderr."""

    def __init__(self, threads: int, ended: "queue.Queue[tuple[_Worker, str | None]]") -> None:
        self.task: Task | None = None
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `end`
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **thread_variables(threads)},
            text=True,
            encoding="utf-8",
        )
        self._threads, self._ended = threads, ended
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def start(self, task: Task) -> None:
        self.task = task
        message = {"work": task.work, "payload": task.payload, "threads": self._threads}
        assert self._process.stdin is not None  # a pipe
        with contextlib.suppress(OSError):  # it died before; the listener says so
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def death(self) -> str:
        """Return why the process ended."""
        status = self._process.wait()
        if status < 0:
            name = signal.Signals(-status).name
            why = ", as the system does when memory is short" if name == "SIGKILL" else ""
            return f"killed by {name}{why}"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f"it ended with status {status}: {lines[-1] if lines else 'it said nothing'}"

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._listener.join()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was not flushed has no reader any more
                    stream.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None  # a pipe
        for line in self._process.stdout:
            self._ended.put((self, line))
        self._ended.put((self, None))


class LocalProcesses:
    """Worker processes that are started when they are needed and used again.

    Args:
        workers: how many at most.
        threads: CPU threads of each.
    """

    def __init__(self, workers: int, threads: int) -> None:
        self._number, self._threads = workers, threads
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._ended: queue.Queue[tuple[_Worker, str | None]] = queue.Queue()

    def slots(self, placement: Placement) -> int:
        """Return the number of workers; tasks of any placement share them."""
        return self._number

    def start(self, task: Task) -> None:
        """Start a task in a worker that has none."""
        worker = self._idle.pop() if self._idle else _Worker(self._threads, self._ended)
        self._busy.add(worker)
        worker.start(task)

    def wait(self) -> Outcome:
        """Return what came of a task."""
        while True:
            worker, line = self._ended.get()
            task = worker.task
            if worker in self._busy:
                self._busy.remove(worker)
                break
            if worker in self._idle:  # it died while it had nothing to do
                self._idle.remove(worker)
            worker.end()
        assert task is not None  # a busy worker has one
        worker.task = None
        if line is None:
            death = worker.death()
            worker.end()
            return Outcome(task, death=death)
        self._idle.append(worker)
        return Outcome(task, **json.loads(line))

    def close(self) -> None:
        """Kill the workers; what they have not finished is done again by the next sweep."""
        for worker in (*self._idle, *self._busy):
            worker.end()
        self._idle.clear()
        self._busy.clear()


class ThisProcess:
    """Runs one task after the other, here."""

    def __init__(self) -> None:
        self._tasks: deque[Task] = deque()

    def slots(self, placement: Placement) -> int:
        """Return 1."""
        return 1

    def start(self, task: Task) -> None:
        """Keep a task until `wait`."""
        self._tasks.append(task)

    def wait(self) -> Outcome:
        """Run the next task."""
        task = self._tasks.popleft()
        return Outcome(task, **call(task.work, task.payload))

    def close(self) -> None:
        """Do nothing."""
