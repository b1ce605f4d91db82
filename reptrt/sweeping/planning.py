"""The tasks of a sweep with the keys of their results, and which of them are finished.

The key of an export follows from its inputs; that of a trial also from the bytes of the float net,
so it is known once the net is exported. Images are hashed once for all nets that share them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reptrt.core.options_json import json_from_options
from reptrt.runs import manifest
from reptrt.runs.inputs import DataRecord, annotations_of, record_data, record_files, source_files
from reptrt.runs.run import FLOAT_FILE, INT8_FILE
from reptrt.search.trials import key_of
from reptrt.sweeping.sheet import EnginePlan, NetPlan, TrialPlan
from reptrt.sweeping.store import Store
from reptrt.sweeping.tasks import Task

WORK = "reptrt.sweeping.work"  # the module of what workers do


@dataclass(frozen=True, slots=True)
class TrialTask:
    """A trial of an exported net, and the keys of its two records."""

    plan: TrialPlan
    calibrated: str
    judged: str
    task: Task


class Planner:
    """Makes the tasks of nets.

    Args:
        store: where results are kept.
        threads: CPU threads of a trial.
    """

    def __init__(self, store: Store, threads: int) -> None:
        self._store, self._threads = store, threads
        self._versions = manifest.versions()
        self._images: dict[Path, DataRecord] = {}

    def images(self, path: Path) -> DataRecord:
        """Return the record of images, or of another folder or file that a task reads."""
        if path not in self._images:
            self._images[path] = record_data(path)
        return self._images[path]

    def export(self, net: NetPlan) -> Task:
        """Return the task that exports a net."""
        source, options = json_from_options(net.source), json_from_options(net.export)
        files = record_files(source_files(net.source))
        key = key_of(
            what="export",
            source=_by_content(net.source, files),
            options=options,
            versions=self._versions,
        )
        payload = {"store": self._store.where, "key": key, "source": source, "options": options}
        return Task(f"{net.name}: export", f"{WORK}:export_net", payload, net.placement)

    def trial(self, net: NetPlan, plan: TrialPlan, of_float: Mapping[str, Any]) -> TrialTask:
        """Return the task of a trial.

        Args:
            net: the net.
            plan: the trial.
            of_float: the record of its export.
        """
        data = self.images(net.data)
        inputs = {"model": of_float["files"][FLOAT_FILE], "data": data.sha256}
        options = json_from_options(plan.options)
        costs = plan.options.costs
        calibrated = key_of(
            what="calibrate",
            options={**options, "costs": None if costs is None else self.images(costs).sha256},
            inputs=inputs,
            versions=self._versions,
        )
        judging = self._judging(net)
        judged = key_of(what="eval", of=calibrated, by=judging["key"], versions=self._versions)
        steps = (
            {"key": calibrated, "options": options, "data": str(net.data), "inputs": inputs},
            {**judging, "key": judged},
        )
        payload = {"store": self._store.where, "float": _short(of_float), "steps": steps}
        task = Task(plan.name, f"{WORK}:make_trial", payload, net.placement)
        return TrialTask(plan, calibrated, judged, task)

    def engines(
        self, plan: TrialPlan, engine: EnginePlan, calibrated: Mapping[str, Any]
    ) -> list[tuple[str, Task]]:
        """Return the tasks that build engines from the file of a trial, each with its GPU.

        Args:
            plan: the trial.
            engine: what is built.
            calibrated: the record of the trial's calibration.
        """
        options = json_from_options(engine.options)
        tasks = []
        for gpu in engine.accelerators:
            placement = replace(engine.placement, accelerator_type=gpu)
            key = key_of(
                what="engine",
                of=calibrated["files"][INT8_FILE],
                options=options,
                placement=json_from_options(placement),
                versions=self._versions,
            )
            payload = {"key": key, "options": options, "calibrated": _short(calibrated)}
            payload["store"] = self._store.where
            name = f"{plan.name}: engine{f' for {gpu}' if gpu else ''}"
            task = Task(name, f"{WORK}:make_engine", payload, placement)
            tasks.append((gpu or "any GPU", task))
        return tasks

    def _judging(self, net: NetPlan) -> dict[str, Any]:
        """Return how the files of a net are judged, and a key of all that decides it."""
        options = json_from_options(net.judging)
        annotations = annotations_of(net.judging, net.eval_data)
        read = None if annotations is None else self.images(annotations).sha256
        key = key_of(
            options={**options, "annotations": read}, data=self.images(net.eval_data).sha256
        )
        given = {"options": options, "data": str(net.eval_data), "threads": self._threads}
        return {**given, "key": key}


def _by_content(source: Any, files: tuple[Any, ...]) -> dict[str, Any]:
    """Return a source by what its files hold, wherever they are; a factory by its name too."""
    content = json_from_options(source)
    if source.is_onnx or ".py:" in source.name:
        content["name"] = Path(source.name).name
    if source.weights is not None:
        content["weights"] = source.weights.name
    return {**content, "files": [record.sha256 for record in files]}


def _short(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `Store.fetch` needs of a record."""
    return {"files": record["files"], "artifact": record["artifact"]}
