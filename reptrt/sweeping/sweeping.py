"""The sweep: what is not finished is done, by an executor; then the table and the report.

A net is exported once, then its trials start. Failures are rows; everything else goes on. What is
finished is in the store, so a sweep that was stopped goes on with the same command.
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reptrt.core.artifacts import make_folder, write_json
from reptrt.core.errors import ConfigError, option
from reptrt.core.options_json import json_from_options
from reptrt.execute.runner import usable_cores
from reptrt.runs import manifest
from reptrt.runs.run import FLOAT_FILE, INT8_FILE
from reptrt.sweeping.local import LocalProcesses, ThisProcess
from reptrt.sweeping.options import SweepOptions
from reptrt.sweeping.planning import Planner
from reptrt.sweeping.record import RECORD_FILE, REPORT_FILE, Row, Swept
from reptrt.sweeping.report import write_page
from reptrt.sweeping.schedule import Queue, run
from reptrt.sweeping.sheet import NetPlan, Sheet
from reptrt.sweeping.store import Store
from reptrt.sweeping.tasks import Executor, Outcome, Task

_LOG = logging.getLogger(__name__)

STORE = "store"


def sweep(sheet: Sheet, folder: Path, options: SweepOptions) -> Swept:
    """Do what a sheet says and is not finished; return everything.

    Args:
        sheet: nets and their trials.
        folder: for the table and the report; made if it does not exist.
        options: where trials run and where results are kept.

    Raises:
        ReptrtError: an input cannot be used, or the workers or the store cannot be reached.
    """
    make_folder(folder)
    store = Store(options.store or str((folder / STORE).resolve()))
    check_store(store, options)
    store.prepare()
    going = _Sweep(sheet, folder, store, options)
    going.plan()
    executor = executor_of(options) if going.is_left and not options.dry_run else None
    going.announce()
    if executor is not None:
        going.work(executor)
    return going.finish()


def executor_of(options: SweepOptions) -> Executor:
    """Return what runs the tasks.

    Raises:
        ReptrtError: it cannot be reached.
    """
    if options.ray is not None:
        from reptrt.sweeping.on_ray import OnRay

        return OnRay(options.ray, options.workers, options.threads)
    if options.workers == 0:
        return ThisProcess()
    return LocalProcesses(_workers(options), options.threads)


class _Sweep:
    """One sweep; rows are filled while it goes on."""

    def __init__(self, sheet: Sheet, folder: Path, store: Store, options: SweepOptions) -> None:
        self._started = time.perf_counter()
        self._nets = {net.name: net for net in sheet.nets}
        self._folder, self._store, self._options = folder, store, options
        self._planner = Planner(store, options.threads)
        self._known = store.keys()
        self._floats: dict[str, Mapping[str, Any]] = {}
        self._queue = Queue()
        self._waiting: dict[int, tuple[str, Any]] = {}  # id of a task -> its kind and what it is of
        self._rows = {
            plan.name: Row(
                *(plan.name, net.name, plan.target, plan.recipe, plan.variant),
                options=json_from_options(plan.options),
            )
            for net in sheet.nets
            for plan in net.trials
        }
        self._same: dict[str, list[str]] = {}  # key of a trial -> the rows that it fills
        self._failures: dict[str, str] = {}  # key of a trial -> why it has no result
        self._kept = self._retried = 0

    @property
    def is_left(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting)

    def plan(self) -> None:
        """Find out what is finished, and queue the rest."""
        for net in self._nets.values():
            task = self._planner.export(net)
            record = self._finished(task.payload["key"])
            if record is None:
                self._add(task, "export", net)
            else:
                self._exported(net, record)
        self._kept = sum(row.is_finished for row in self._rows.values())

    def announce(self) -> None:
        """Say what the sweep will do before it starts."""
        left = len(self._rows) - self._kept
        options = self._options
        where = f"on Ray ({options.ray})" if options.ray else "in this process"
        if options.ray is None and options.workers != 0:
            where = f"in {min(_workers(options), max(left, 1))} processes of this machine"
        text = f"sweep: {len(self._rows)} trials of {len(self._nets)} nets"
        text += f", {self._kept} are finished already"
        if left:
            text += f"; {left} to do {where}"
        seconds = [row.seconds for row in self._rows.values() if row.seconds is not None]
        if left and seconds:
            text += f"; those that are finished took {sum(seconds) / len(seconds):.1f} s each"
        _LOG.info("%s", text)

    def work(self, executor: Executor) -> None:
        """Run all tasks, and close the executor."""
        total, done = len(self._rows), self._kept
        try:
            for outcome in run(executor, self._queue, self._options.retries):
                for row in self._took(outcome):
                    done += 1
                    _LOG.info("sweep: %d of %d  %s  %s", done, total, row.name, row.state)
        finally:
            executor.close()

    def finish(self) -> Swept:
        """Write the table and the report."""
        swept = Swept(
            folder=self._folder,
            store=self._store.where,
            rows=tuple(self._rows.values()),
            nets={name: self._describe(net) for name, net in self._nets.items()},
            versions=manifest.versions(),
            kept=self._kept,
            seconds=time.perf_counter() - self._started,
            retried=self._retried,
        )
        if not self._options.dry_run:
            write_json(self._folder / RECORD_FILE, swept.to_dict())
            write_page(self._folder / REPORT_FILE, swept)
        return swept

    def _took(self, outcome: Outcome) -> list[Row]:
        """Take what came of a task; return the trials that have ended with it."""
        kind, of = self._waiting.pop(id(outcome.task))
        self._retried += outcome.attempts > 1
        if kind == "export":
            return self._took_export(of, outcome)
        if kind == "engine":
            row, gpu = of
            self._took_engine(row, gpu, outcome)
            return []
        rows = [self._rows[name] for name in self._same[of.judged]]
        if outcome.failure is None:
            self._known |= {of.calibrated, of.judged}
        else:
            self._failures[of.judged] = outcome.failure
        for row in rows:
            if outcome.failure is not None:
                row.state = f"failed: {outcome.failure}"
            else:
                self._fill(row, outcome.result["calibrated"], outcome.result["judged"])
        return rows

    def _took_export(self, net: NetPlan, outcome: Outcome) -> list[Row]:
        if outcome.failure is None:
            self._exported(net, outcome.result)
            return []
        rows = [self._rows[plan.name] for plan in net.trials]
        for row in rows:
            row.state = f"failed: export: {outcome.failure}"
        return rows

    def _took_engine(self, row: Row, gpu: str, outcome: Outcome) -> None:
        if outcome.failure is not None:
            row.engines[gpu] = {"state": f"failed: {outcome.failure}"}
        else:
            row.engines[gpu] = _engine(outcome.result)

    def _exported(self, net: NetPlan, record: Mapping[str, Any]) -> None:
        """Queue the trials of a net that are not finished."""
        self._floats[net.name] = record
        left = []
        for plan in net.trials:
            trial = self._planner.trial(net, plan, record)
            is_new = trial.judged not in self._same
            self._same.setdefault(trial.judged, []).append(plan.name)
            calibrated, judged = (self._finished(k) for k in (trial.calibrated, trial.judged))
            if calibrated is not None and judged is not None:
                self._fill(self._rows[plan.name], calibrated, judged)
            elif is_new:
                left.append(trial)
            elif trial.judged in self._failures:
                self._rows[plan.name].state = f"failed: {self._failures[trial.judged]}"
        for trial in reversed(left):  # before the exports that wait, in their own order
            self._add(trial.task, "trial", trial, first=True)

    def _fill(self, row: Row, calibrated: Mapping[str, Any], judged: Mapping[str, Any]) -> None:
        """Fill a row from the records of its trial, and queue the engines."""
        found = calibrated["result"]
        row.state, row.judged = "finished", judged["result"]
        row.sha256 = calibrated["files"][INT8_FILE]
        row.file = f"artifacts/{calibrated['artifact']}/{INT8_FILE}"
        row.bytes, row.modelled, row.lint = found["bytes"], found["modelled"], found["lint"]
        row.simulation = found["simulation"]
        row.seconds = calibrated["seconds"] + judged["seconds"]
        net = self._nets[row.net]
        if net.engine is None or row.target != "tensorrt" or row.simulation is not None:
            return
        plan = next(plan for plan in net.trials if plan.name == row.name)
        for gpu, task in self._planner.engines(plan, net.engine, calibrated):
            record = self._finished(task.payload["key"])
            if record is not None:
                row.engines[gpu] = _engine(record)
            else:
                row.engines[gpu] = {"state": "to do"}
                self._add(task, "engine", (row, gpu))

    def _add(self, task: Task, kind: str, of: Any, *, first: bool = False) -> None:
        self._waiting[id(task)] = (kind, of)
        self._queue.add(task, first=first)

    def _finished(self, key: str) -> dict[str, Any] | None:
        return self._store.finished(key) if key in self._known else None

    def _describe(self, net: NetPlan) -> dict[str, Any]:
        record = self._floats.get(net.name)
        return {
            "source": json_from_options(net.source),
            "export": json_from_options(net.export),
            "float_sha256": None if record is None else record["files"][FLOAT_FILE],
            "file": None if record is None else f"artifacts/{record['artifact']}/{FLOAT_FILE}",
            "data": json_from_options(self._planner.images(net.data)),
            "eval_data": json_from_options(self._planner.images(net.eval_data)),
            "eval": json_from_options(net.judging),
        }


def _engine(record: Mapping[str, Any]) -> dict[str, Any]:
    (file,) = (name for name in record["files"] if not name.endswith(".json"))
    return {
        "state": "finished",
        "sha256": record["files"][file],
        "file": f"artifacts/{record['artifact']}/{file}",
        "bytes": record["result"]["bytes"],
    }


def _workers(options: SweepOptions) -> int:
    return options.workers or max(1, usable_cores() // options.threads)


def check_store(store: Store, options: SweepOptions) -> None:
    """Refuse a store that the workers do not see."""
    is_alone = options.ray is None and options.workers == 0
    if not is_alone and not store.is_shared_with_processes:
        raise ConfigError(
            f"{option('store')} {store.where}: is the memory of one process; give "
            f"{option('workers', 0)} too, or a folder"
        )
