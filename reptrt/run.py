"""The whole way into one folder, resumable.

    float.onnx -> int8.onnx -> model.engine,  then eval.json, bench.json, report.json

``run.json`` records for every finished stage a key (sha256 of its options, the content of its
inputs and the package versions) and the sha256 of its file. A stage whose key and file still agree
is kept; any other is done again. Files are written whole or not at all, so a killed run continues.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reptrt.artifacts import package_versions, sha256_of, write_json
from reptrt.bench import bench
from reptrt.engine import build_engine
from reptrt.engine_options import BuildOptions
from reptrt.errors import ArtifactError, MissingDependencyError
from reptrt.evaluate import evaluate
from reptrt.pipeline import (
    CalibrateOptions,
    ExportOptions,
    Source,
    calibrate,
    export,
    plain_options,
)

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of every stage of a run."""

    export: ExportOptions = field(default_factory=ExportOptions)
    calibrate: CalibrateOptions = field(default_factory=CalibrateOptions)
    build: BuildOptions = field(default_factory=BuildOptions)
    eval_limit: int | None = None
    batches: tuple[int, ...] = (1, 8)
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class StageResult:
    """What became of one stage."""

    name: str
    file: str  # in the run's folder
    state: str  # "done", "kept" from an earlier run, or "skipped: reason"


@dataclass(frozen=True, slots=True)
class RunReport:
    """What is in the run's folder."""

    folder: Path
    stages: tuple[StageResult, ...]
    results: Mapping[str, Any]  # content of report.json

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return dict(self.results)


def run(
    source: Source, data: Path, folder: Path, options: RunOptions, eval_data: Path | None = None
) -> RunReport:
    """Take a net the whole way; continue where an earlier run into the same folder stopped.

    Without a TensorRT the engine is skipped, with the reason in the report; every other failure
    ends the run, and what was finished stays.

    Args:
        source: what to export.
        data: calibration images; labels are not used.
        folder: where everything goes; made if missing.
        options: of every stage.
        eval_data: images to judge on, with labels where top-1 is wanted; None takes ``data``.

    Raises:
        ReptrtError: a stage failed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ArtifactError(f"{folder}: cannot be made ({err.strerror or err})") from err
    stages = _Stages(folder)
    fp, q = folder / "float.onnx", folder / "int8.onnx"
    engine = folder / "model.engine"
    judged_on = eval_data or data
    origins = [path for path in (source.weights, Path(source.name)) if path and path.is_file()]

    stages.file(
        "export",
        fp,
        {"source": source.name, "architecture": asdict(source.architecture), "seed": source.seed}
        | plain_options(options.export),
        origins,
        lambda: export(source, fp, options.export),
    )
    stages.file(
        "calibrate",
        q,
        plain_options(options.calibrate) | {"data": _fingerprint(data)},
        [fp],
        lambda: calibrate(fp, data, q, options.calibrate),
    )
    stages.engine(
        engine, plain_options(options.build), [q], lambda: build_engine(q, engine, options.build)
    )
    stages.json(
        "eval",
        {"data": _fingerprint(judged_on), "limit": options.eval_limit},
        [fp, q],
        lambda: evaluate(
            [fp, q], judged_on, reference=fp, limit=options.eval_limit, threads=options.threads
        ).to_json(),
    )
    stages.json(
        "bench",
        {"batches": options.batches, "threads": options.threads},
        [fp, q],
        lambda: bench(
            [fp, q], batches=options.batches, threads=options.threads, baseline=fp
        ).to_json(),
    )
    return stages.report()


class _Stages:
    """The stages of one run, in order, and their record in ``run.json``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "run.json"
        self._done: list[StageResult] = []
        self._records: dict[str, Any] = _read_records(self._path)

    def file(
        self,
        name: str,
        output: Path,
        options: Mapping[str, Any],
        inputs: list[Path],
        work: Callable[[], Any],
    ) -> None:
        """Make one file, unless it is there from the same inputs and options."""
        key = _key(options, inputs)
        record = self._records.get(name)
        known = record is not None and record["key"] == key and output.is_file()
        if record is not None and known and sha256_of(output) == record["sha256"]:
            self._finish(name, output, "kept")
            return
        work()
        self._records[name] = {"key": key, "file": output.name, "sha256": sha256_of(output)}
        write_json(self._path, {"stages": self._records, "versions": package_versions()})
        self._finish(name, output, "done")

    def json(
        self, name: str, options: Mapping[str, Any], inputs: list[Path], work: Callable[[], Any]
    ) -> None:
        """Make one JSON file of results."""
        output = self._folder / f"{name}.json"
        self.file(name, output, options, inputs, lambda: write_json(output, work()))

    def engine(
        self,
        output: Path,
        options: Mapping[str, Any],
        inputs: list[Path],
        work: Callable[[], Any],
    ) -> None:
        """Make the engine if there is a TensorRT."""
        try:
            self.file("build-engine", output, options, inputs, work)
        except MissingDependencyError as err:
            self._finish("build-engine", output, f"skipped: {err}")

    def report(self) -> RunReport:
        """Write and return what the run found."""
        content: dict[str, Any] = {
            "stages": [asdict(stage) for stage in self._done],
            "files": {name: record["sha256"] for name, record in self._records.items()},
            "versions": package_versions(),
        }
        for name in ("eval", "bench"):
            content[name] = json.loads((self._folder / f"{name}.json").read_text())
        write_json(self._folder / "report.json", content)
        return RunReport(self._folder, tuple(self._done), content)

    def _finish(self, name: str, output: Path, state: str) -> None:
        _LOG.info("%-12s  %s  %s", name, output.name, state)
        self._done.append(StageResult(name, output.name, state))


def _read_records(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text())["stages"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ArtifactError(
            f"{path}: not the record of a run ({err}); delete it to start anew"
        ) from err


def _fingerprint(data: Path) -> str:
    """Return a hash of what images there are: names and sizes of a folder, content of a file."""
    if data.is_file():
        return sha256_of(data)
    found = sorted((str(p.relative_to(data)), p.stat().st_size) for p in data.rglob("*.*"))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _key(options: Mapping[str, Any], inputs: list[Path]) -> str:
    """Return what a stage's result depends on, as one hash."""
    content = {
        "options": options,
        "inputs": {path.name: sha256_of(path) for path in inputs},
        "versions": package_versions(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
