"""The inputs of a run, recorded by sha256: the files of its source, and images."""

import hashlib
import importlib.machinery
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from reptrt.core.artifacts import sha256_of
from reptrt.core.errors import ArtifactError, DataError, option
from reptrt.core.progress import track
from reptrt.data.coco import find_annotations
from reptrt.data.images import list_images
from reptrt.judge.options import TaskOptions
from reptrt.sources.source import Source


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file that a run read."""

    path: Path
    sha256: str


@dataclass(frozen=True, slots=True)
class DataRecord:
    """The images that a run read."""

    path: Path  # a folder, or a file of arrays
    sha256: str  # of the content, see `record_data`
    files: int


def record_files(paths: Iterable[Path]) -> tuple[FileRecord, ...]:
    """Return the records of files, with absolute paths.

    Raises:
        ArtifactError: a file cannot be read.
    """
    return tuple(FileRecord(path.resolve(), _sha256(path)) for path in paths)


def record_data(path: Path) -> DataRecord:
    """Return the record of the images in an array file or a folder.

    The sha256 of a folder is computed over one line ``sha256 label name`` for each image. Names
    are included because the sample of images depends on them; other files are ignored.

    Raises:
        DataError: there are no images.
        ArtifactError: an image cannot be read.
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


def annotations_of(options: TaskOptions, images: Path) -> Path | None:
    """Return the file or folder of annotations that a task reads; None: it reads none.

    Args:
        options: of the task.
        images: to judge on.
    """
    if options.task not in ("detect", "segment"):
        return None
    if options.annotations is not None or options.task == "segment":
        return options.annotations
    return find_annotations(images) if images.is_dir() else None


def source_files(source: Source) -> tuple[Path, ...]:
    """Return the files of a source: net or factory, external data, checkpoint.

    For a factory, that is the Python file that defines it, without the modules that it imports.
    """
    path = source.name.rpartition(":")[0] if source.is_factory else ""
    code = Path(path) if path.endswith(".py") else _module_file(path) if path else None
    files = [code] if code is not None else []
    for file in source.files:
        files += [file, *(_external_data(file) if file == Path(source.name) else [])]
    return tuple(files)


def check_source(expected: tuple[FileRecord, ...], files: tuple[Path, ...]) -> None:
    """Compare the files of a source with the record of them, in the order of `source_files`.

    Raises:
        ArtifactError: a file does not exist or has changed; names it and both hashes.
    """
    if len(files) < len(expected):
        missing = expected[len(files)]
        raise ArtifactError(
            f"{missing.path}: the run read it (sha256 {missing.sha256}), and it is not found from "
            "this folder now; put it back"
        )
    for record, path in zip(expected, files, strict=False):
        if not path.is_file():
            raise ArtifactError(
                f"{path}: does not exist; the run read it with sha256 {record.sha256}: put it "
                f"back, or give {option('source')} or {option('weights')}"
            )
        _same_sha256(path, _sha256(path), record.sha256)


def check_data(name: str, expected: DataRecord, path: Path) -> None:
    """Compare images with the record of them.

    Args:
        name: the option that says where the images are.
        expected: the record.
        path: where the images are now.

    Raises:
        ArtifactError: the images do not exist or have changed; names both hashes.
    """
    if not path.exists():
        raise ArtifactError(
            f"{path}: does not exist; the run read {expected.files} files of images there with "
            f"sha256 {expected.sha256}: put them back, or give {option(name)}"
        )
    current = record_data(path)
    if current.files != expected.files:
        raise ArtifactError(
            f"{path}: got {current.files} files of images, the run read {expected.files} (sha256 "
            f"{current.sha256}, expected {expected.sha256}); restore them, or start a new run"
        )
    _same_sha256(path, current.sha256, expected.sha256)


def _same_sha256(path: Path, got: str, expected: str) -> None:
    if got != expected:
        raise ArtifactError(
            f"{path}: has changed since the run: sha256 is {got}, expected {expected}; restore it, "
            "or start a new run"
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
