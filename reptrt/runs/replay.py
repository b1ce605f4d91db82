"""Repeat a run from its record, and compare each file with the one that the run wrote.

    float.onnx, int8.onnx, eval.json, detections.json, diagnosis.json    must be equal
    model.engine    may differ: TensorRT can choose other kernels in every build
    bench.json      may differ: it holds latencies

The inputs must have the sha256 that the run recorded. Packages and machine may differ; they are
then named as possible reasons for a file that differs.
"""

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from reptrt.core.artifacts import sha256_of
from reptrt.core.errors import ConfigError, option
from reptrt.core.options_json import options_from_json
from reptrt.core.result import Result
from reptrt.runs.compare import Change, changes
from reptrt.runs.inputs import annotations_of, check_data, check_source, source_files
from reptrt.runs.manifest import FILE, STAGES, Manifest, read_finished
from reptrt.runs.options import RunOptions
from reptrt.runs.run import run
from reptrt.sources.source import Source

State = Literal["equal", "differs", "not made"]

_MAY_DIFFER = {
    "build-engine": "engines differ between builds",
    "bench": "latencies differ between runs",
}
_MADE_FROM = {
    "calibrate": ("export",),
    "eval": ("export", "calibrate"),
    "detections": ("export", "calibrate"),
    "diagnose": ("export", "calibrate"),
}
_FACTORY = "nothing that is recorded differs: does the factory draw new weights at each call?"
_UNEXPLAINED = "nothing that is recorded differs"


@dataclass(frozen=True, slots=True)
class ReplayedFile:
    """One file of a run and of its replay."""

    stage: str
    file: str
    expected_sha256: str  # what the run recorded
    sha256: str | None  # of the replay
    state: State
    must_be_equal: bool
    reasons: tuple[str, ...]  # why it may differ
    kept: str | None  # what happened to the run's own file afterwards; None: nothing


@dataclass(frozen=True, slots=True, repr=False)
class ReplayReport(Result):
    """The result of a replay."""

    folder: Path
    output: Path | None  # None: the replay was not kept
    files: tuple[ReplayedFile, ...]
    changes: tuple[Change, ...]  # of packages and machine

    @property
    def reproduced(self) -> bool:
        """Whether every file that must be equal is."""
        return all(file.state == "equal" for file in self.files if file.must_be_equal)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "folder": str(self.folder),
            "output": None if self.output is None else str(self.output),
            "reproduced": self.reproduced,
            "files": [asdict(file) for file in self.files],
            "changes": [asdict(change) for change in self.changes],
        }

    def to_table(self) -> Table:
        """Return the files as a table for people."""
        table = Table(box=None, pad_edge=False)
        for title in ("file", "sha256 of the run", "of the replay", "", "why"):
            table.add_column(title, overflow="fold")
        for file in self.files:
            why = list(file.reasons) + ([file.kept] if file.kept is not None else [])
            now = "-" if file.sha256 is None else file.sha256[:12]
            table.add_row(file.file, file.expected_sha256[:12], now, file.state, "; ".join(why))
        return table

    def to_lines(self) -> list[str]:
        """Return the changes of packages and machine, and the verdict."""
        verdict = "reproduced" if self.reproduced else "not reproduced"
        where = "" if self.output is None else f"  {self.output}"
        return [*(f"changed: {change}" for change in self.changes), f"replay  {verdict}{where}"]


@dataclass(frozen=True, slots=True)
class Moved:
    """Where the inputs of a run are now; None: where the run read them."""

    source: str | None = None
    weights: Path | None = None
    data: Path | None = None
    eval_data: Path | None = None


def replay(folder: Path, output: Path | None = None, moved: Moved | None = None) -> ReplayReport:
    """Repeat a run from its record and compare the files.

    Args:
        folder: the folder of the run.
        output: a new or empty folder for the replay; None: a temporary one.
        moved: inputs that have moved; their content must be the same.

    Raises:
        ArtifactError: there is no record of a finished run, or an input does not exist or has
            changed; names the input and both hashes.
        ReptrtError: a stage failed.
    """
    before = read_finished(folder)
    moved = moved or Moved()
    source = _moved_source(before, moved, f"{folder / FILE}: source")
    options = options_from_json(RunOptions, before.options, f"{folder / FILE}: options")
    data, eval_data = moved.data or before.data.path, moved.eval_data or before.eval_data.path
    if moved.data is not None and before.eval_data == before.data:
        eval_data = moved.eval_data or moved.data
    check_source(before.source_files, source_files(source))
    check_data("data", before.data, data)
    if eval_data != data:
        check_data("eval_data", before.eval_data, eval_data)
    annotations = annotations_of(options, eval_data)
    if before.annotations is not None:
        check_data("annotations", before.annotations, annotations or before.annotations.path)
    _check_output(output)
    with tempfile.TemporaryDirectory() as temporary:
        where = output or Path(temporary) / "replay"
        run(source, data, where, options, eval_data)
        after = read_finished(where)
        changed = changes(
            {**before.versions, **before.machine}, {**after.versions, **after.machine}
        )
        files = _compare(folder, before, after, changed)
    return ReplayReport(folder, output, files, changed)


def _moved_source(before: Manifest, moved: Moved, where: str) -> Source:
    source = options_from_json(Source, before.source, where)
    if moved.source is not None:
        source = replace(source, name=moved.source)
    if moved.weights is not None:
        source = replace(source, weights=moved.weights)
    return source


def _check_output(output: Path | None) -> None:
    """Refuse a folder that holds files: stages could be kept from there instead of repeated."""
    if output is not None and output.is_dir() and any(output.iterdir()):
        raise ConfigError(
            f"{option('output')} {output}: is not empty; give a new folder for the replay"
        )


def _compare(
    folder: Path, before: Manifest, after: Manifest, changed: tuple[Change, ...]
) -> tuple[ReplayedFile, ...]:
    files: dict[str, ReplayedFile] = {}
    for stage in (stage for stage in STAGES if stage in before.stages):
        record, now = before.stages[stage], after.stages.get(stage)
        state: State = "not made"
        if now is not None:
            state = "equal" if now.sha256 == record.sha256 else "differs"
        origins = [files[origin] for origin in _MADE_FROM.get(stage, ()) if origin in files]
        reasons = () if state == "equal" else _reasons(stage, state, origins, before, changed)
        files[stage] = ReplayedFile(
            stage=stage,
            file=record.file,
            expected_sha256=record.sha256,
            sha256=None if now is None else now.sha256,
            state=state,
            must_be_equal=stage not in _MAY_DIFFER,
            reasons=reasons,
            kept=_since(folder / record.file, record.sha256),
        )
    return tuple(files.values())


def _reasons(
    stage: str,
    state: State,
    origins: list[ReplayedFile],
    before: Manifest,
    changed: tuple[Change, ...],
) -> tuple[str, ...]:
    """Return why a file may differ, the most direct reason first."""
    if state == "not made":
        return ("no TensorRT is installed here",)
    if stage in _MAY_DIFFER:
        return (_MAY_DIFFER[stage],)
    reasons = [f"it is made from {file.file}, which differs" for file in origins if file.reasons]
    if not reasons:
        reasons = [str(change) for change in changed]
    if not reasons:
        is_factory = Source(before.source["name"]).is_factory and before.source["weights"] is None
        reasons = [_FACTORY if stage == "export" and is_factory else _UNEXPLAINED]
    return tuple(reasons)


def _since(path: Path, expected: str) -> str | None:
    if not path.is_file():
        return "the run's own file does not exist any more"
    return None if sha256_of(path) == expected else "the run's own file was changed afterwards"
