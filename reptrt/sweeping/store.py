"""Results of tasks, found again by what they depend on; their files, by what is in them.

    store.json                      the format
    records/KEY.json                what a finished task found, its files, its seconds, the machine
    records/KEY.NAME                further notes of the task, such as the report of calibration
    artifacts/SHA256/NAME           the files of a task; the sha256 is over their names and contents
    work/                           what has not ended yet, of a store that is a folder

A key is a sha256 over everything that a result depends on. A record is written last, so a task with
a record is finished, and never done again while its files are what they were.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from reptrt.core.artifacts import make_folder, sha256_of
from reptrt.core.errors import ArtifactError, option
from reptrt.runs import manifest
from reptrt.sweeping.places import Place, open_place

FORMAT = 1
_RECORDS, _ARTIFACTS, _WORK = "records", "artifacts", "work"


@dataclass(frozen=True, slots=True)
class Made:
    """What a task found, and the files that it leaves."""

    result: Mapping[str, Any]  # JSON values; the same each time the task is done
    files: Sequence[Path] = ()
    notes: Mapping[str, Path] = field(default_factory=dict)  # name -> file; may differ each time


class Store:
    """Records and artifacts in a place.

    Args:
        where: a folder or a URL.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._place: Place = open_place(where)

    @property
    def is_shared_with_processes(self) -> bool:
        """Whether other processes see the same files."""
        return not self.where.startswith("memory://")

    def prepare(self) -> None:
        """Make sure that the store can be used, before any work.

        Raises:
            ArtifactError: it cannot be read or written, or is of another format.
        """
        content = self._place.read("store.json")
        if content is None:
            self._place.write("store.json", _json({"format": FORMAT}))
            return
        try:
            written = json.loads(content)["format"]
        except (ValueError, KeyError, TypeError):
            written = "unknown"
        if written != FORMAT:
            raise ArtifactError(
                f"{self.where}: a store of format {written}, expected {FORMAT}; give another "
                f"{option('store')}"
            )

    def keys(self) -> set[str]:
        """Return the keys of all finished tasks."""
        names = self._place.names(_RECORDS)
        return {stem for stem, dot, end in (n.partition(".") for n in names) if end == "json"}

    def finished(self, key: str) -> dict[str, Any] | None:
        """Return the record of a task whose files are still there; None: it is to be done."""
        content = self._place.read(f"{_RECORDS}/{key}.json")
        try:
            record = json.loads(content or b"")
        except ValueError:
            return None
        if not isinstance(record, dict) or record.get("key") != key:
            return None
        return record if self._is_whole(record["files"], record["artifact"]) else None

    def once(self, key: str, make: Callable[[Path], Made]) -> dict[str, Any]:
        """Return the record of a task, which is done now unless it is finished.

        Args:
            key: of the task.
            make: does it, with a folder for its files. After a worker died it may find there what
                that one left.
        """
        if (record := self.finished(key)) is not None:
            return record
        with self._scratch(key) as folder:
            if (record := self.finished(key)) is not None:  # another process did it meanwhile
                return record
            started = time.perf_counter()
            made = make(folder)
            return self._finish(key, made, time.perf_counter() - started)

    def fetch(self, record: Mapping[str, Any], name: str, folder: Path) -> Path:
        """Return a file of a finished task as a file of this machine, with those beside it.

        Args:
            record: of the task.
            name: of the file.
            folder: for copies, where the store is no folder.

        Raises:
            ArtifactError: a file is gone or has changed.
        """
        at = f"{_ARTIFACTS}/{record['artifact']}"
        if self._place.path is not None:
            return self._place.path / at / name
        make_folder(folder)
        for file, sha256 in record["files"].items():
            content = self._place.read(f"{at}/{file}")
            if content is None or hashlib.sha256(content).hexdigest() != sha256:
                raise ArtifactError(
                    f"{self.where}/{at}/{file}: is gone or has changed; give the same command "
                    "again, which makes it anew"
                )
            (folder / file).write_bytes(content)
        return folder / name

    def _finish(self, key: str, made: Made, seconds: float) -> dict[str, Any]:
        files = {path.name: sha256_of(path) for path in made.files}
        artifact = _artifact_of(files)
        for path in made.files:
            self._place.write(f"{_ARTIFACTS}/{artifact}/{path.name}", path.read_bytes())
        for name, path in made.notes.items():
            self._place.write(f"{_RECORDS}/{key}.{name}", path.read_bytes())
        record = {
            "key": key,
            "result": dict(made.result),
            "files": files,
            "artifact": artifact,
            "seconds": seconds,
            "versions": manifest.versions(),
            "machine": manifest.describe_machine(),
        }
        self._place.write(f"{_RECORDS}/{key}.json", _json(record))
        return record

    def _is_whole(self, files: Mapping[str, str], artifact: str) -> bool:
        at = f"{_ARTIFACTS}/{artifact}"
        if self._place.path is None:
            return set(files) <= (self._place.names(at) if files else set())
        paths = {self._place.path / at / name: sha256 for name, sha256 in files.items()}
        return all(path.is_file() and sha256_of(path) == of for path, of in paths.items())

    @contextlib.contextmanager
    def _scratch(self, key: str) -> Iterator[Path]:
        """Yield a folder for the files of a task, which no other process of a folder's store has.

        It stays if the task does not end well, so that the next attempt can go on from there.
        """
        if self._place.path is None:
            with tempfile.TemporaryDirectory(prefix="reptrt-") as temporary:
                yield Path(temporary)
            return
        work = make_folder(self._place.path / _WORK)
        lock = work / f"{key}.lock"
        with FileLock(lock):
            yield make_folder(work / key)
            shutil.rmtree(work / key, ignore_errors=True)
            with contextlib.suppress(OSError):  # Windows removes no file that is open
                lock.unlink()


def _artifact_of(files: Mapping[str, str]) -> str:
    listed = "".join(f"{sha256} {name}\n" for name, sha256 in sorted(files.items()))
    return hashlib.sha256(listed.encode()).hexdigest()


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
