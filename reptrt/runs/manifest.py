"""The record of a run, ``run.json``: what is needed to repeat the run, and what it wrote.

    {"format": 1, "finished": true,
     "source": {"name", "weights", "architecture", "seed"},   reptrt.sources.source.Source
     "source_files": [{"path", "sha256"}],                    the files of the source
     "data": {"path", "sha256", "files"}, "eval_data": ...,   images for calibration, for judging
     "annotations": {"path", "sha256", "files"} or null,      of the images to judge on
     "options": {"export": {...}, "calibrate": {...}, ...},   runs.options.RunOptions, every field
     "stages": {"export": {"key", "file", "sha256"}, ...},    the file that each stage wrote
     "versions": {package: version}, "machine": {"python", "system", "cpu", "cores"}}

Paths are absolute. The record is written before the first stage and after each stage, whole or not
at all.
"""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from reptrt.core.artifacts import package_versions, sha256_of, write_json
from reptrt.core.errors import ArtifactError
from reptrt.core.options_json import json_from_options, options_from_json
from reptrt.execute.runner import usable_cores
from reptrt.runs.inputs import DataRecord, FileRecord
from reptrt.trt.machine import cpu_name

FILE = "run.json"
CALIBRATE_FILE = "calibrate.json"  # the result of calibration, for the report
LADDER_FILE = "ladder.json"  # written by `reptrt ladder`
FORMAT = 1
STAGES = (
    "export",
    "calibrate",
    "build-engine",
    "eval",
    "detections",
    "diagnose",
    "bench",
)  # in the order of a run


@dataclass(frozen=True, slots=True)
class StageRecord:
    """The file that one stage wrote."""

    key: str  # hash over everything that the file depends on
    file: str  # name in the run's folder
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of ``run.json``."""

    format: int
    finished: bool
    source: Mapping[str, Any]
    source_files: tuple[FileRecord, ...]
    data: DataRecord
    eval_data: DataRecord
    annotations: DataRecord | None  # None: the task needs none
    options: Mapping[str, Any]
    stages: Mapping[str, StageRecord]
    versions: Mapping[str, str]
    machine: Mapping[str, str]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``run.json`` into the run's folder."""
    write_json(folder / FILE, json_from_options(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Return the record of a run, finished or not.

    Raises:
        ArtifactError: there is no record, or this version cannot read it.
    """
    path = folder / FILE
    content = read_json(path, "the record of a run")
    written = content.get("format") if isinstance(content, dict) else None
    if written != FORMAT:
        raise ArtifactError(
            f"{path}: not the record of a run in format {FORMAT} (its format is {written}); start "
            "a new run, or use the version of reptrt that wrote it"
        )
    return options_from_json(Manifest, content, str(path))


def read_finished(folder: Path) -> Manifest:
    """Return the record of a finished run.

    Raises:
        ArtifactError: there is no record, it cannot be read, or the run was stopped before its end.
    """
    if not (folder / FILE).is_file():
        raise ArtifactError(f"{folder}: not the folder of a run, it has no {FILE}")
    manifest = read_manifest(folder)
    if not manifest.finished:
        done = ", ".join(stage for stage in STAGES if stage in manifest.stages) or "nothing"
        raise ArtifactError(
            f"{folder}: the run was stopped ({done} done); finish it with the same reptrt run "
            "command, which keeps what is done"
        )
    return manifest


def check_made(folder: Path, manifest: Manifest) -> None:
    """Refuse the folder of a run if a file is not the one that the run wrote.

    Raises:
        ArtifactError: a file does not exist, or has another sha256; names it.
    """
    for record in manifest.stages.values():
        path = folder / record.file
        if not path.is_file():
            raise ArtifactError(f"{path}: does not exist any more; make it again with reptrt run")
        sha256 = sha256_of(path)
        if sha256 != record.sha256:
            raise ArtifactError(
                f"{path}: was changed after the run: sha256 is {sha256}, expected {record.sha256}; "
                "make it again with reptrt run"
            )


def read_json(path: Path, expected: str) -> Any:
    """Return the content of a JSON file.

    Raises:
        ArtifactError: the file cannot be read; ``expected`` describes its content in the message.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        reason = err.strerror if isinstance(err, OSError) else err
        raise ArtifactError(
            f"{path}: cannot be read ({reason}), expected {expected}; delete it and start a new run"
        ) from err


def versions() -> dict[str, str]:
    """Return the versions of packages that can change a result; Pillow decodes the images."""
    return {**package_versions(), "pillow": metadata.version("pillow")}


def describe_machine() -> dict[str, str]:
    """Return what else can change the last bits of a result: Python, system and CPU."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": str(usable_cores()),
    }
