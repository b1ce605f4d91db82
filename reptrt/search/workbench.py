"""What a search works with: its inputs, the candidates that were made, and a row for each."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reptrt.core.artifacts import make_folder
from reptrt.core.choices import Effort
from reptrt.core.errors import ReptrtError
from reptrt.core.options_json import json_from_options
from reptrt.data.dataset import count_images
from reptrt.judge.tasks import open_task
from reptrt.runs import manifest
from reptrt.runs.inputs import annotations_of, record_data, record_files
from reptrt.search import candidates
from reptrt.search.candidates import Candidate
from reptrt.search.judging import Judgement, judge, parts
from reptrt.search.latency import MEASURED, Cost, measure, model_time
from reptrt.search.options import TuneOptions
from reptrt.search.record import Row
from reptrt.search.trials import Judged, Trial, Trials, kept_or, key_of

_LOG = logging.getLogger(__name__)

FORMAT = 1
_DEFAULT_IMAGES = 512
# Time to calibrate, as multiples of plain INT8: medians of RepVGG and MobileOne in docs/results.md.
_TIMES_PLAIN = {None: 1.0, "fast": 5.5, "balanced": 13.0, "accurate": 34.0}


class Workbench:
    """The inputs of a search and what was made of them.

    Attributes:
        record: what ``tune.json`` says of the inputs.
        tuning: indices of the images to tune on.
        confirming: indices of the images to confirm on.
        images: number of calibration images.
        rows: what is known of each candidate, by name.
        made: the candidates that are files.
        of_float: the cost of the float net, once it is measured.
    """

    def __init__(
        self, model: Path, data: Path, eval_data: Path, folder: Path, options: TuneOptions
    ) -> None:
        self._started = time.perf_counter()
        self.model, self._eval_data, self.folder, self.options = model, eval_data, folder, options
        open_task(options, eval_data)  # refuses annotations that cannot be used before any work
        total = count_images(eval_data)
        self.tuning, self.confirming = parts(total, options.eval_limit, options.seed)
        self.images = options.images or min(_DEFAULT_IMAGES, count_images(data))
        self.record = _record(model, data, eval_data, options)
        make_folder(folder)
        inputs = {name: self.record[name]["sha256"] for name in ("model", "data")}
        self._trials, self._judged = Trials(folder, model, data, inputs), Judged(folder)
        self.made: dict[str, Trial] = {}
        self.rows: dict[str, Row] = {}
        self.of_float: Cost | None = None

    @property
    def seconds(self) -> float:
        """The time since the search was started."""
        return time.perf_counter() - self._started

    @property
    def seconds_left(self) -> float | None:
        """What is left of the budget; None: there is no budget."""
        return None if self.options.budget is None else self.options.budget - self.seconds

    def make(self, candidate: Candidate) -> Trial:
        """Return a candidate as a file.

        Raises:
            ReptrtError: it cannot be calibrated.
        """
        trial = self._trials.make(candidate)
        row = self._row(candidate)
        row.state = "kept" if trial.is_kept else "done"
        row.seconds, row.sha256 = trial.seconds, trial.sha256
        self.made[candidate.name] = trial
        time_of, time_of_plain = (
            model_time(self.made[name].path, self.options.target, self.options.batch)
            for name in (candidate.name, candidates.PLAIN)
        )
        row.modelled = time_of / time_of_plain if time_of_plain else 1.0
        _LOG.info("tune: %-18s %s, calibrated in %.1f s", row.name, row.state, trial.seconds)
        return trial

    def attempt(self, form: str, recipe: Effort) -> Trial | None:
        """Return a form as a file; None if it fails or does not fit the budget; its row says so."""
        candidate = candidates.of_form(form, recipe, self.options, self.images)
        need, left = self.expected(recipe), self.seconds_left
        if left is not None and need > left and self._trials.kept(candidate) is None:
            why = f"skipped: takes about {need:.0f} s, {max(left, 0):.0f} s of the budget are left"
            self._row(candidate).state = why
            return None
        try:
            return self.make(candidate)
        except ReptrtError as err:
            self._row(candidate).state = f"failed: {err}"
            _LOG.info("tune: %s failed: %s", candidate.name, err)
            return None

    def expected(self, recipe: Effort | None) -> float:
        """Return the seconds of a trial: those of others with its recipe, or from plain INT8."""
        same = [t.seconds for t in self.made.values() if t.candidate.recipe == recipe]
        plain = self.made[candidates.PLAIN].seconds
        return max(same) if same else _TIMES_PLAIN[recipe] * plain

    def judge(self, trials: Sequence[Trial], size: int) -> None:
        """Judge trials on the first images of the tuning part."""
        for trial, judged in zip(trials, self._losses(trials, self.tuning[:size]), strict=True):
            row = self.rows[trial.candidate.name]
            row.judged, row.is_final = judged, size == len(self.tuning)

    def confirm(self, name: str) -> Judgement:
        """Judge a candidate on the other images."""
        (judged,) = self._losses([self.made[name]], self.confirming)
        self.rows[name].confirmed = judged
        return judged

    def measure(self, trials: Sequence[Trial]) -> None:
        """Measure the latency of trials where the target runs here, or take that of the model."""
        rows = [self.rows[trial.candidate.name] for trial in trials]
        if self.options.target not in MEASURED:
            for row in rows:
                row.cost = Cost(row.modelled or 1.0)
            return
        unique = {trial.sha256: trial.path for trial in trials}
        options = self.options
        timing = [options.batch, options.threads, options.bench_seconds, options.seed]
        machine, versions = self.record["machine"], self.record["versions"]
        key = key_of(files=sorted(unique), timing=timing, machine=machine, versions=versions)

        def work() -> dict[str, Any]:
            plain = self.made[candidates.PLAIN].path
            costs, of_float = measure(list(unique.values()), plain, self.model, options)
            by_sha256 = {sha256: asdict(costs[path]) for sha256, path in unique.items()}
            return {"costs": by_sha256, "float": asdict(of_float)}

        content = kept_or(self.folder / "bench.json", key, work)
        self.of_float = Cost(**content["float"])
        for trial, row in zip(trials, rows, strict=True):
            row.cost = Cost(**content["costs"][trial.sha256])

    def _row(self, candidate: Candidate) -> Row:
        row = Row(candidate.name, candidate.form, candidate.recipe)
        row.is_simulation = candidate.is_simulation
        return self.rows.setdefault(candidate.name, row)

    def _losses(self, trials: Sequence[Trial], taken: Sequence[int]) -> list[Judgement]:
        """Return what files lose on some images; what is known is not judged again."""
        keys = {trial.sha256: self._key(trial, taken) for trial in trials}
        unknown = {t.sha256: t.path for t in trials if self._judged.get(keys[t.sha256]) is None}
        if unknown:
            of = (self.model, self._eval_data, taken, self.options)
            for sha256, judged in zip(unknown, judge(list(unknown.values()), *of), strict=True):
                self._judged.put(keys[sha256], judged)
        found = [self._judged.get(keys[trial.sha256]) for trial in trials]
        return [judged for judged in found if judged is not None]

    def _key(self, trial: Trial, taken: Sequence[int]) -> str:
        record = self.record
        return key_of(
            file=trial.sha256,
            inputs=[record["model"]["sha256"], record["eval_data"]["sha256"]],
            annotations=record["annotations"] and record["annotations"]["sha256"],
            taken=sorted(taken),
            task=json_from_options(self.options.of_task),
            metric=self.options.measure,
            versions=record["versions"],
        )


def _record(model: Path, data: Path, eval_data: Path, options: TuneOptions) -> dict[str, Any]:
    """Return the record of the inputs."""
    annotations = annotations_of(options, eval_data)
    return {
        "format": FORMAT,
        "model": json_from_options(record_files([model])[0]),
        "data": json_from_options(record_data(data)),
        "eval_data": json_from_options(record_data(eval_data)),
        "annotations": annotations and json_from_options(record_data(annotations)),
        "options": json_from_options(options),
        "versions": manifest.versions(),
        "machine": manifest.describe_machine(),
    }
