"""Read the folder of a run; a part that cannot be shown comes with the reason.

Nothing is computed but hashes. A part is used only if it belongs to the files that the run
recorded: ``calibrate.json`` and ``ladder.json`` name the files they describe by sha256, all other
files have a sha256 in the record of the run.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from reptrt.core.artifacts import sha256_of
from reptrt.core.errors import ArtifactError
from reptrt.runs.manifest import (
    CALIBRATE_FILE,
    FILE,
    LADDER_FILE,
    STAGES,
    Manifest,
    StageRecord,
    read_manifest,
)

T = TypeVar("T")
JsonObject = Mapping[str, Any]

AS_RECORDED = "as recorded"


@dataclass(frozen=True, slots=True)
class Part(Generic[T]):
    """One part of a run, or the reason why it is missing."""

    value: T | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class FileState:
    """One file that a stage wrote."""

    stage: str
    path: Path
    sha256: str  # in the record of the run
    size_bytes: int | None  # None: it is gone
    state: str  # "as recorded", "changed after the run", or "gone"


@dataclass(frozen=True, slots=True)
class RunContent:
    """Everything that a report can show."""

    folder: Path
    manifest: Manifest
    files: tuple[FileState, ...]  # in the order of the stages
    eval: Part[JsonObject]
    detections: Part[JsonObject]
    bench: Part[JsonObject]
    calibrate: Part[JsonObject]
    diagnosis: Part[JsonObject]
    ladder: Part[JsonObject]
    float_onnx: Part[Path]
    int8_onnx: Part[Path]
    skipped: Mapping[str, str]  # stage -> why the run skipped it


def read_run(folder: Path) -> RunContent:
    """Read the folder of a run, finished or stopped.

    Raises:
        ArtifactError: it has no record of a run, or one that this version cannot read.
    """
    if not (folder / FILE).is_file():
        raise ArtifactError(f"{folder}: not the folder of a run, it has no {FILE}")
    manifest = read_manifest(folder)
    records = manifest.stages
    files = tuple(_state(folder, name, records[name]) for name in STAGES if name in records)
    skipped = _skipped(folder)
    by_stage = {file.stage: file for file in files}

    def part(stage: str) -> Part[Path]:
        return _file(by_stage.get(stage), stage, manifest, skipped)

    return RunContent(
        folder=folder,
        manifest=manifest,
        files=files,
        eval=_json(part("eval")),
        detections=_json(part("detections")),
        bench=_json(part("bench")),
        calibrate=_calibrated(folder, part("calibrate"), records),
        diagnosis=_json(part("diagnose")),
        ladder=_ladder(folder, manifest),
        float_onnx=part("export"),
        int8_onnx=part("calibrate"),
        skipped=skipped,
    )


def _state(folder: Path, stage: str, record: StageRecord) -> FileState:
    path = folder / record.file
    if not path.is_file():
        return FileState(stage, path, record.sha256, None, "gone")
    state = AS_RECORDED if sha256_of(path) == record.sha256 else "changed after the run"
    return FileState(stage, path, record.sha256, path.stat().st_size, state)


def _skipped(folder: Path) -> dict[str, str]:
    """Return why stages were skipped; ``report.json`` may be missing."""
    try:
        stages = json.loads((folder / "report.json").read_text(encoding="utf-8"))["stages"]
        states = {stage["name"]: str(stage["state"]).partition(": ") for stage in stages}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {name: why for name, (state, _, why) in states.items() if state == "skipped"}


def _file(
    file: FileState | None, stage: str, manifest: Manifest, skipped: Mapping[str, str]
) -> Part[Path]:
    if file is None and stage in skipped:
        return Part(None, f"the run skipped it: {skipped[stage]}")
    if file is None and manifest.finished:
        return Part(None, f"the run did not include the stage {stage}")
    if file is None:
        return Part(None, f"the run was stopped before the stage {stage}")
    if file.state != AS_RECORDED:
        verb = "is gone" if file.size_bytes is None else "was changed after the run"
        return Part(None, f"{file.path.name} {verb}; make it again with reptrt run")
    return Part(file.path)


def _json(file: Part[Path]) -> Part[JsonObject]:
    if file.value is None:
        return Part(None, file.reason)
    try:
        content = json.loads(file.value.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        return Part(None, f"{file.value.name} cannot be read ({err})")
    if not isinstance(content, dict):
        return Part(None, f"{file.value.name} is not what reptrt writes")
    return Part(content)


def _calibrated(
    folder: Path, int8: Part[Path], records: Mapping[str, StageRecord]
) -> Part[JsonObject]:
    if int8.value is None:
        return Part(None, int8.reason)
    path = folder / CALIBRATE_FILE
    if not path.is_file():
        return Part(None, f"{path.name} is missing; reptrt run writes it when it calibrates")
    content = _json(Part(path))
    if content.value is not None and content.value.get("sha256") != records["calibrate"].sha256:
        return Part(None, f"{path.name} belongs to another {int8.value.name}")
    return content


def _ladder(folder: Path, manifest: Manifest) -> Part[JsonObject]:
    path = folder / LADDER_FILE
    if not path.is_file():
        return Part(
            None, "it was not computed; run reptrt ladder RUN_DIR, then reptrt report RUN_DIR"
        )
    content = _json(Part(path))
    if content.value is None:
        return content
    files = {record.file: record.sha256 for record in manifest.stages.values()}
    judged = content.value.get("files")
    same = isinstance(judged, dict) and all(files.get(name) == judged[name] for name in judged)
    if not same or content.value.get("data") != manifest.eval_data.sha256:
        return Part(None, f"{path.name} is about other files or images; compute it again")
    return content
