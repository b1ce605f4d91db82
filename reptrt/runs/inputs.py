"""What a run reads, by sha256: the files of its source, and images."""

import hashlib
import importlib.machinery
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from reptrt.core.artifacts import sha256_of
from reptrt.core.errors import ArtifactError, DataError
from reptrt.core.progress import track
from reptrt.data.images import list_images
from reptrt.sources.source import Source


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file that a run read."""

    path: Path
    sha256: str


@dataclass(frozen=True, slots=True)
class DataRecord:
    """Images that a run read."""

    path: Path  # a folder, or a file of arrays
    sha256: str  # of the content, see `record_data`
    files: int


def record_files(paths: Iterable[Path]) -> tuple[FileRecord, ...]:
    """Return the record of files, with absolute paths.

    Raises:
        ArtifactError: one cannot be read.
    """
    return tuple(FileRecord(path.resolve(), _sha256(path)) for path in paths)


def record_data(path: Path) -> DataRecord:
    """Return the record of images: an array file, or every image below a folder.

    The sha256 of a folder is that of a line ``sha256 label name`` for each image: names count,
    because samples depend on them; other files in the folder do not.

    Raises:
        DataError: there are no images.
        ArtifactError: one cannot be read.
    """
    if not path.exists():
        raise DataError(f"{path}: does not exist; expected a folder of images, an .npz or an .npy")
    if not path.is_dir():
        return DataRecord(path.resolve(), _sha256(path), 1)
    listed = list_images(path)
    digest = hashlib.sha256()
    for index, image in enumerate(track(listed.paths, len(listed.paths), "hash")):
        label = "-" if listed.labels is None else listed.labels[index]
        name = image.relative_to(path).as_posix()
        digest.update(f"{_sha256(image)} {label} {name}\n".encode(errors="surrogateescape"))
    return DataRecord(path.resolve(), digest.hexdigest(), len(listed.paths))


def source_files(source: Source) -> tuple[Path, ...]:
    """Return the files that a source consists of: net or factory, external data, checkpoint.

    Of a factory that is the file that holds it, without the modules that it imports.
    """
    path = source.name.rpartition(":")[0] if source.is_factory else ""
    code = Path(path) if path.endswith(".py") else _module_file(path) if path else None
    found = [code] if code is not None else []
    for file in source.files:
        found += [file, *(_external_data(file) if file == Path(source.name) else [])]
    return tuple(found)


def check_source(expected: tuple[FileRecord, ...], found: tuple[Path, ...]) -> None:
    """Compare the files of a source with the record of them, in the order of `source_files`.

    Raises:
        ArtifactError: a file is gone or has changed; names it, with both hashes.
    """
    if len(found) < len(expected):
        gone = expected[len(found)]
        raise ArtifactError(
            f"{gone.path}: the run read it (sha256 {gone.sha256}), now it is not found from this "
            "folder; put it back"
        )
    for record, path in zip(expected, found, strict=False):
        if not path.is_file():
            raise ArtifactError(
                f"{path}: is gone; the run read it with sha256 {record.sha256}: put it back, or "
                "say where it is (--source, --weights)"
            )
        _same_sha256(path, _sha256(path), record.sha256)


def check_data(option: str, expected: DataRecord, path: Path) -> None:
    """Compare images with the record of them.

    Args:
        option: of the command line, that names another place.
        expected: the record.
        path: where the images are now.

    Raises:
        ArtifactError: they are gone or have changed; with both hashes.
    """
    if not path.exists():
        raise ArtifactError(
            f"{path}: is gone; the run read {expected.files} files of images there with sha256 "
            f"{expected.sha256}: put them back, or say where they are ({option})"
        )
    found = record_data(path)
    if found.files != expected.files:
        raise ArtifactError(
            f"{path}: got {found.files} files of images, the run read {expected.files} (sha256 "
            f"{found.sha256}, expected {expected.sha256}); restore them, or run anew"
        )
    _same_sha256(path, found.sha256, expected.sha256)


def _same_sha256(path: Path, got: str, expected: str) -> None:
    if got != expected:
        raise ArtifactError(
            f"{path}: has changed since the run: sha256 is {got}, expected {expected}; restore it, "
            "or run anew"
        )


def _sha256(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as err:
        raise ArtifactError(f"{path}: cannot be read ({err.strerror or err})") from err


def _module_file(name: str) -> Path | None:
    """Return the file of a module without importing anything; None if there is none."""
    folders: Sequence[str] | None = ["", *sys.path]
    file = None
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[:depth]), folders)
        if spec is None:
            return None
        folders, file = spec.submodule_search_locations, spec.origin
    return None if file is None else Path(file)


def _external_data(path: Path) -> list[Path]:
    """Return the files beside an ONNX file that hold its weights."""
    try:
        graph = onnx.load(str(path), format="protobuf", load_external_data=False).graph
    except Exception:  # the export says what is wrong with it
        return []
    tensors = [tensor for tensor in graph.initializer if uses_external_data(tensor)]
    return [path.parent / n for n in sorted({ExternalDataInfo(t).location for t in tensors})]
