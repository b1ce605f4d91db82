"""All stages into one folder; a run that was stopped continues.

    float.onnx -> int8.onnx -> model.engine
    then eval.json, diagnosis.json, bench.json, report.json, report.html (detections.json)

``run.json`` (`reptrt.runs.manifest`) records the options and the inputs, and for each finished
stage a key (sha256 over its options, the content of its inputs and the package versions) and the
sha256 of its file. A stage is kept if its key and its file are unchanged, and repeated otherwise.
Files are written whole or not at all, so that a run can continue even after it was killed.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from reptrt.core.artifacts import make_folder, remove_parts, sha256_of, write_json
from reptrt.core.errors import ConfigError, MissingDependencyError, ReptrtError
from reptrt.core.options_json import json_from_options, options_from_json
from reptrt.core.result import Result
from reptrt.judge.bench import bench
from reptrt.judge.diagnose import diagnose
from reptrt.judge.evaluate import evaluate
from reptrt.judge.options import BenchOptions, EvaluateOptions
from reptrt.judge.tasks import open_task
from reptrt.pipeline import (
    CalibrateOptions,
    CalibrateReport,
    Source,
    calibrate,
    export,
)
from reptrt.runs import manifest
from reptrt.runs.detections import shown_detections
from reptrt.runs.inputs import annotations_of, record_data, record_files, source_files
from reptrt.runs.manifest import CALIBRATE_FILE, FORMAT, Manifest, StageRecord
from reptrt.runs.options import RunOptions
from reptrt.runs.report import write_report
from reptrt.trt.build import build_engine

_LOG = logging.getLogger(__name__)

FLOAT_FILE, INT8_FILE, ENGINE_FILE = "float.onnx", "int8.onnx", "model.engine"
DIAGNOSIS_FILE = "diagnosis.json"


@dataclass(frozen=True, slots=True)
class StageResult:
    """The outcome of one stage."""

    name: str
    file: str  # in the run's folder
    state: str  # "done", "kept" from an earlier run, or "skipped: reason"


@dataclass(frozen=True, slots=True, repr=False)
class RunReport(Result):
    """The content of the run's folder."""

    folder: Path
    stages: tuple[StageResult, ...]
    results: Mapping[str, Any]  # content of report.json

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return dict(self.results)

    def to_table(self) -> Table:
        """Return what became of each stage."""
        table = Table(box=None, pad_edge=False)
        for title in ("stage", "file", "state"):
            table.add_column(title, overflow="fold")
        for stage in self.stages:
            table.add_row(stage.name, stage.file, stage.state)
        return table

    def to_lines(self) -> list[str]:
        """Return accuracy and fidelity of each file, and where the report is."""
        lines = []
        for result in self.results["eval"]["results"]:
            sqnr, accuracy = result["sqnr_db"], _accuracy(result)
            fidelity = "the reference" if sqnr is None else f"SQNR {sqnr:.2f} dB"
            lines.append(f"{Path(result['file']).name:12s}  {accuracy}  {fidelity}")
        lines += self.results["bench"].get("warnings", ())
        return [*lines, f"run  {self.folder / 'report.json'}  {self.folder / 'report.html'}"]


def run(
    source: Source, data: Path, folder: Path, options: RunOptions, eval_data: Path | None = None
) -> RunReport:
    """Take a net through all stages; continue an earlier run into the same folder.

    If TensorRT is not installed the engine is skipped, and the report says why. Every other failure
    ends the run; the files of finished stages stay.

    Args:
        source: the net.
        data: calibration images; labels are not used.
        folder: folder for all files; created if it does not exist.
        options: options of every stage.
        eval_data: images to judge on, with labels for top-1 and top-5; None: ``data``.

    Raises:
        ReptrtError: a stage failed.
    """
    remove_parts(make_folder(folder))
    judged_on = eval_data or data
    stages = _Stages(folder, _plan(source, data, judged_on, options))
    planned = stages.manifest
    fp, q, engine = folder / FLOAT_FILE, folder / INT8_FILE, folder / ENGINE_FILE
    stages.file(
        "export",
        fp,
        {"source": planned.source, **json_from_options(options.export)},
        [record.path for record in planned.source_files],
        lambda: export(source, fp, options.export),
    )
    stages.file(
        "calibrate",
        q,
        {**json_from_options(options.calibrate), "data": planned.data.sha256},
        [fp] if options.calibrate.costs is None else [fp, options.calibrate.costs],
        lambda: _calibrate(fp, data, q, options.calibrate),
        beside=[folder / CALIBRATE_FILE],
    )
    stages.engine(
        engine,
        json_from_options(options.build),
        [q],
        lambda: build_engine(q, engine, options.build),
        refused=_why_no_engine(options.calibrate),
    )
    _judge(stages, [fp, q], (data, judged_on), options)
    return stages.report()


def _calibrate(fp: Path, data: Path, q: Path, options: CalibrateOptions) -> None:
    """Calibrate, and write the report beside the INT8 file, whose sha256 it holds."""
    content = calibrate(fp, data, q, options).to_dict() | {"path": q.name}
    write_json(q.with_name(CALIBRATE_FILE), content)


def _diagnose(files: list[Path], data: Path, options: CalibrateOptions) -> dict[str, Any]:
    fp, q = files
    path = q.with_name(CALIBRATE_FILE)
    content = manifest.read_json(path, "the report of calibration")
    report = options_from_json(CalibrateReport, content, str(path))
    content = diagnose(fp, data, options, replace(report, path=q)).to_dict()
    del content["seconds"]  # everything else is the same in a replay
    return content


def _why_no_engine(options: CalibrateOptions) -> str | None:
    """Return why no engine can be built from an INT8 file; None: one can."""
    if options.simulation is not None:
        return f"a simulation, no engine can run it ({options.simulation})"
    return None if options.target == "tensorrt" else f"made for {options.target}"


def _judge(
    stages: "_Stages", files: list[Path], images: tuple[Path, Path], options: RunOptions
) -> None:
    """Judge, diagnose and time the float file, which is the reference, and the INT8 file."""
    limit, threads, seconds = options.eval_limit, options.threads, options.bench_seconds
    calibrating, (calib_data, data) = options.calibrate, images
    judging = EvaluateOptions(
        **vars(options.of_task), reference=files[0], limit=limit, threads=threads
    )
    judged_by = {"data": stages.manifest.eval_data.sha256, "limit": limit}
    if options.task != "classify":
        annotations = stages.manifest.annotations
        judged_by |= {"task": json_from_options(options.of_task)}
        judged_by |= {"annotations": None if annotations is None else annotations.sha256}
    timing = BenchOptions(
        batches=options.batches,
        threads=threads,
        baseline=files[0],
        min_seconds=seconds,
        warmup_seconds=seconds / 4,
    )
    judged = functools.cache(lambda: evaluate(files, data, judging))  # for two stages
    stages.json("eval", judged_by, files, lambda: judged().to_dict())
    if options.task == "detect":
        stages.json("detections", judged_by, files, lambda: shown_detections(judged(), data))
    else:
        stages.forget("detections")
    if options.diagnose:
        stages.diagnosis(
            {**json_from_options(calibrating), "data": stages.manifest.data.sha256},
            files,
            lambda: _diagnose(files, calib_data, calibrating),
        )
    else:
        stages.forget("diagnose")
    stages.json(
        "bench",
        {"batches": options.batches, "threads": threads, "seconds": seconds},
        files,
        lambda: bench(files, timing).to_dict(),
    )


def _plan(source: Source, data: Path, judged_on: Path, options: RunOptions) -> Manifest:
    """Return the record of a run before its first stage."""
    open_task(options, judged_on)  # refuses annotations that cannot be used before any work
    calibrated_on = record_data(data)
    annotations = annotations_of(options, judged_on)
    given = None if options.annotations is None else options.annotations.resolve()
    return Manifest(
        format=FORMAT,
        finished=False,
        source=json_from_options(_absolute(source)),
        source_files=record_files([p for p in source_files(source) if p.is_file()]),
        data=calibrated_on,
        eval_data=calibrated_on if judged_on == data else record_data(judged_on),
        annotations=None if annotations is None else record_data(annotations),
        options=json_from_options(replace(options, annotations=given)),
        stages={},
        versions=manifest.versions(),
        machine=manifest.describe_machine(),
    )


def _accuracy(result: Mapping[str, Any]) -> str:
    """Return the accuracy of a file in words."""
    for key, title in (("map", "mAP"), ("miou", "mIoU")):
        if result.get(key) is not None:
            return f"{title} {100 * result[key]:.2f}"
    top1 = result.get("top1")
    return "no labels" if top1 is None else f"top-1 {100 * top1:.2f} %"


def _absolute(source: Source) -> Source:
    """Return a source with absolute paths, which means the same in any working folder."""
    path, colon, factory = source.name.rpartition(":")
    name = source.name
    if path.endswith(".py"):
        name = f"{Path(path).resolve()}{colon}{factory}"
    elif source.is_onnx:
        name = str(Path(source.name).resolve())
    weights = None if source.weights is None else source.weights.resolve()
    return replace(source, name=name, weights=weights)


class _Stages:
    """The stages of one run, in order, and their record in ``run.json``."""

    def __init__(self, folder: Path, planned: Manifest) -> None:
        self._folder = folder
        self._done: list[StageResult] = []
        earlier: Mapping[str, StageRecord] = {}
        if (folder / manifest.FILE).exists():
            earlier = manifest.read_manifest(folder).stages
        self.manifest = planned
        self._record(earlier)

    def file(
        self,
        name: str,
        output: Path,
        options: Mapping[str, Any],
        inputs: list[Path],
        work: Callable[[], Any],
        beside: Sequence[Path] = (),
    ) -> None:
        """Make a file and those beside it, unless they exist and were made from the same inputs."""
        key = _key(options, inputs)
        record = self.manifest.stages.get(name)
        exist = all(path.is_file() for path in (output, *beside))
        unchanged = record is not None and record.key == key and exist
        if record is not None and unchanged and sha256_of(output) == record.sha256:
            self._finish(name, output, "kept")
            return
        work()
        written = StageRecord(key, output.name, sha256_of(output))
        self._record({**self.manifest.stages, name: written})
        self._finish(name, output, "done")

    def json(
        self,
        name: str,
        options: Mapping[str, Any],
        inputs: list[Path],
        work: Callable[[], dict[str, Any]],
    ) -> None:
        """Write results as JSON; they name files relative to the run's folder."""
        output = self._folder / f"{name}.json"

        def write() -> None:
            write_json(output, _named_within(self._folder, work()))

        self.file(name, output, options, inputs, write)

    def engine(
        self,
        output: Path,
        options: Mapping[str, Any],
        inputs: list[Path],
        work: Callable[[], Any],
        refused: str | None,
    ) -> None:
        """Build the engine, if TensorRT is installed and nothing speaks against it."""
        if refused is not None:
            self._skip("build-engine", output, ConfigError(refused))
            return
        try:
            self.file("build-engine", output, options, inputs, work)
        except MissingDependencyError as err:
            self._skip("build-engine", output, err)

    def diagnosis(
        self, options: Mapping[str, Any], inputs: list[Path], work: Callable[[], dict[str, Any]]
    ) -> None:
        """Diagnose the net; a failure is reported and does not end the run."""
        output = self._folder / DIAGNOSIS_FILE
        try:
            self.file("diagnose", output, options, inputs, lambda: write_json(output, work()))
        except ReptrtError as err:
            self._skip("diagnose", output, err)

    def forget(self, name: str) -> None:
        """Remove the record of a stage that an earlier run did and this one does not."""
        self._record({k: v for k, v in self.manifest.stages.items() if k != name})

    def _skip(self, name: str, output: Path, why: ReptrtError) -> None:
        self.forget(name)
        self._finish(name, output, f"skipped: {why}")

    def report(self) -> RunReport:
        """Write and return the results of the run."""
        content: dict[str, Any] = {
            "stages": [asdict(stage) for stage in self._done],
            "files": {name: record.sha256 for name, record in self.manifest.stages.items()},
            "versions": dict(self.manifest.versions),
        }
        for name in ("eval", "bench"):
            content[name] = manifest.read_json(self._folder / f"{name}.json", "results")
        write_json(self._folder / "report.json", content)
        self._record(self.manifest.stages, finished=True)
        write_report(self._folder)
        return RunReport(self._folder, tuple(self._done), content)

    def _record(self, stages: Mapping[str, StageRecord], finished: bool = False) -> None:
        self.manifest = replace(self.manifest, stages=stages, finished=finished)
        manifest.write_manifest(self._folder, self.manifest)

    def _finish(self, name: str, output: Path, state: str) -> None:
        _LOG.info("%-12s  %s  %s", name, output.name, state)
        self._done.append(StageResult(name, output.name, state))


def _named_within(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Name files relative to the folder, so that results do not depend on where it is."""

    def within(path: str) -> str:
        return Path(path).relative_to(folder).as_posix()

    changed = {**content, "results": [{**r, "file": within(r["file"])} for r in content["results"]]}
    if content.get("baseline") is not None:
        changed["baseline"] = within(content["baseline"])
    if "warnings" in content:
        changed["warnings"] = [text.replace(f"{folder}/", "") for text in content["warnings"]]
    return changed


def _key(options: Mapping[str, Any], inputs: list[Path]) -> str:
    """Return a hash over everything that the file of a stage depends on."""
    content = {
        "options": options,
        "inputs": {path.name: sha256_of(path) for path in inputs},
        "versions": manifest.versions(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
