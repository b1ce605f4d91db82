"""A candidate as a file in a folder of its own, with the record of how it was made.

    trials/NAME/int8.onnx, int8.onnx.json   the file and its sidecar
    trials/NAME/calibrate.json              the report of calibration
    trials/NAME/trial.json                  {"key", "name", "options", "inputs", "sha256",
                                             "seconds", "versions", "machine"}
    judged/KEY.json                         what a file loses on some of the images

A key is a sha256 over everything that a result depends on. What has the same key and, for files,
the same bytes is kept.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reptrt.core.artifacts import make_folder, remove_parts, sha256_of, write_json
from reptrt.core.options_json import json_from_options
from reptrt.pipeline import calibrate
from reptrt.runs import manifest
from reptrt.runs.manifest import CALIBRATE_FILE
from reptrt.runs.run import INT8_FILE
from reptrt.search.candidates import Candidate
from reptrt.search.judging import Judgement

TRIAL_FILE = "trial.json"


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate that was made."""

    candidate: Candidate
    path: Path  # the INT8 file
    sha256: str
    seconds: float  # of calibration, when it was done
    is_kept: bool  # from an earlier search


class Trials:
    """The trials of one search.

    Args:
        folder: of the search.
        model: the float net.
        data: calibration images.
        inputs: name -> sha256 of both.
    """

    def __init__(self, folder: Path, model: Path, data: Path, inputs: Mapping[str, str]) -> None:
        self._folder, self._model, self._data = folder, model, data
        self._inputs = dict(inputs)

    def make(self, candidate: Candidate) -> Trial:
        """Return a candidate as a file, calibrated now unless that was done before.

        Raises:
            ReptrtError: it cannot be calibrated.
        """
        if (kept := self.kept(candidate)) is not None:
            return kept
        folder = make_folder(self._folder / "trials" / candidate.name)
        remove_parts(folder)
        path, started = folder / INT8_FILE, time.perf_counter()
        report = calibrate(self._model, self._data, path, candidate.options)
        seconds = time.perf_counter() - started
        write_json(folder / CALIBRATE_FILE, report.to_dict() | {"path": path.name})
        sha256 = sha256_of(path)
        record = {
            "key": self._key(candidate),
            "name": candidate.name,
            "options": json_from_options(candidate.options),
            "inputs": self._inputs,
            "sha256": sha256,
            "seconds": seconds,
            "versions": manifest.versions(),
            "machine": manifest.describe_machine(),
        }
        write_json(folder / TRIAL_FILE, record)
        return Trial(candidate, path, sha256, seconds, is_kept=False)

    def kept(self, candidate: Candidate) -> Trial | None:
        """Return a candidate that was made before from the same inputs; None: it was not."""
        path = self._folder / "trials" / candidate.name / INT8_FILE
        record = read_record(path.with_name(TRIAL_FILE))
        if record.get("key") != self._key(candidate) or not path.is_file():
            return None
        if sha256_of(path) != record.get("sha256"):
            return None
        return Trial(candidate, path, record["sha256"], float(record["seconds"]), is_kept=True)

    def _key(self, candidate: Candidate) -> str:
        content = json_from_options(candidate.options)
        return key_of(options=content, inputs=self._inputs, versions=manifest.versions())


class Judged:
    """What was judged, kept in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "judged"

    def get(self, key: str) -> Judgement | None:
        """Return what was found out under a key; None: nothing."""
        record = read_record(self._folder / f"{key}.json")
        return Judgement(**record) if record else None

    def put(self, key: str, judgement: Judgement) -> None:
        """Keep what was found out."""
        write_json(make_folder(self._folder) / f"{key}.json", asdict(judgement))


def kept_or(path: Path, key: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the content of a JSON file with a key, or do the work and write it."""
    record = read_record(path)
    if record.get("key") != key:
        record = {**work(), "key": key}
        write_json(path, record)
    return record


def key_of(**content: Any) -> str:
    """Return a hash over JSON values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_record(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; nothing if it does not exist or was cut off."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
