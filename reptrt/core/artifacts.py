"""Files that stages exchange: each is written whole or not at all, with a sidecar for its origin.

The sidecar of ``M.onnx`` is ``M.onnx.json``:

    {"artifact": "int8-onnx", "sha256": "...", "parents": {"M.onnx": "sha256"}, "options": {...},
     "versions": {...}, "details": {...}}

The sidecar of a derived file has the sha256 of every file it was made from, so that the whole chain
can be checked.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from reptrt.core.errors import ArtifactError, option

_RECORDED_PACKAGES = (
    "reptrt",
    "torch",
    "numpy",
    "onnx",
    "onnx-graphsurgeon",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
)

ONNX_SUFFIXES = (".onnx",)
ENGINE_SUFFIXES = (".engine", ".plan")


@dataclass(frozen=True, slots=True)
class Sidecar:
    """Provenance of one file."""

    artifact: str  # what the file is: "float-onnx", "int8-onnx", "engine", ...
    sha256: str  # of the file itself, hex
    parents: Mapping[str, str] = field(default_factory=dict)  # file name -> sha256, hex
    options: Mapping[str, Any] = field(default_factory=dict)  # options of the stage
    versions: Mapping[str, str] = field(default_factory=dict)  # package -> version
    details: Mapping[str, Any] = field(default_factory=dict)  # what the stage made


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that can change a result."""
    versions = {}
    for name in _RECORDED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def require_folder(path: Path) -> None:
    """Raise an error if the folder of a path does not exist; called before any work is done.

    Raises:
        ArtifactError: the folder of ``path`` does not exist, or ``path`` is a folder.
    """
    if not path.parent.is_dir():
        raise ArtifactError(f"{path}: folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise ArtifactError(f"{path}: is a folder, expected a file name")


def make_folder(path: Path) -> Path:
    """Make a folder, with those above it, unless it exists; return it.

    Raises:
        ArtifactError: it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ArtifactError(f"{path}: cannot be created ({err.strerror or err})") from err
    return path


def require_suffix(path: Path, suffixes: tuple[str, ...], what: str) -> None:
    """Raise an error if an output has another suffix than its kind of file.

    An output whose name belongs to another kind of file is nearly always a mistake, and writing it
    could destroy images or a network.

    Args:
        path: the file that would be written.
        suffixes: those that are accepted, in lower case.
        what: is written, for the message.

    Raises:
        ArtifactError: the suffix is another one.
    """
    if path.suffix.lower() not in suffixes:
        raise ArtifactError(
            f"{path}: expected a name that ends in {' or '.join(suffixes)} for {what}; give "
            f"another {option('output')}"
        )


def is_engine_file(path: Path) -> bool:
    """Return whether a path is named as an engine is."""
    return path.suffix.lower() in ENGINE_SUFFIXES


def refuse_overwriting(path: Path, sources: Iterable[Path]) -> None:
    """Raise an error if a path is one of the files from which it would be made.

    Raises:
        ArtifactError: ``path`` is one of ``sources``.
    """
    for source in sources:
        if path.exists() and source.exists() and path.samefile(source):
            raise ArtifactError(
                f"{path}: is the file it would be made from; give another {option('output')}"
            )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path; the file is renamed to ``path`` on success and removed otherwise.

    The bytes are flushed to disk before the rename, so other processes read either the old file or
    the new one, never a part of it.

    Raises:
        ArtifactError: the folder does not exist, or the file cannot be written.
    """
    require_folder(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as err:
        raise ArtifactError(f"{path}: cannot be written ({err.strerror or err})") from err
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with open(part, "rb+") as stream:
            os.fsync(stream.fileno())
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    except OSError as err:
        raise ArtifactError(f"{path}: cannot be written ({err.strerror or err})") from err
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove the temporary files that `replacing` leaves behind when its process is killed."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all."""
    with replacing(path) as part:
        part.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON with sorted keys, whole or not at all."""
    write_bytes(path, _json_bytes(content))


def sidecar_path(path: Path) -> Path:
    """Return the path of the sidecar of ``path``: ``M.onnx`` -> ``M.onnx.json``."""
    return path.with_name(path.name + ".json")


def write_artifact(
    path: Path,
    content: bytes,
    *,
    artifact: str,
    parents: Mapping[str, str],
    options: Mapping[str, Any],
    details: Mapping[str, Any] | None = None,
) -> Sidecar:
    """Write a file and its sidecar, both or neither; return the sidecar.

    Both are on disk under temporary names before either is renamed. The old sidecar is removed
    first. A crash between the two renames therefore leaves a file without a sidecar, which every
    stage accepts, never a file with the sidecar of another file, which every stage rejects.

    Raises:
        ArtifactError: the folder does not exist, or the files cannot be written; the old files are
            then unchanged.
    """
    require_folder(path)
    sidecar = Sidecar(
        artifact=artifact,
        sha256=hashlib.sha256(content).hexdigest(),
        parents=dict(parents),
        options=dict(options),
        versions=package_versions(),
        details=dict(details or {}),
    )
    with replacing(sidecar_path(path)) as sidecar_part:
        sidecar_part.write_bytes(_json_bytes(asdict(sidecar)))
        with replacing(path) as part:
            part.write_bytes(content)
            sidecar_path(path).unlink(missing_ok=True)
    return sidecar


def read_sidecar(path: Path) -> Sidecar | None:
    """Return the sidecar of ``path``, or None if it has none.

    Raises:
        ArtifactError: the sidecar is damaged, or belongs to other bytes than those of the file.
    """
    try:
        content = json.loads(sidecar_path(path).read_text())
        sidecar = Sidecar(**content)
        _check_kinds(sidecar)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as err:
        raise ArtifactError(
            f"{sidecar_path(path)}: not a sidecar written by reptrt ({err}); delete it to go on"
        ) from err
    try:
        actual = sha256_of(path)
    except OSError as err:
        raise ArtifactError(f"{path}: cannot be read ({err.strerror or err})") from err
    if actual != sidecar.sha256:
        raise ArtifactError(
            f"{path}: sha256 is {actual[:12]}..., its sidecar says {sidecar.sha256[:12]}...: the "
            f"file was changed after it was written; make it again, or delete the sidecar"
        )
    return sidecar


def _check_kinds(sidecar: Sidecar) -> None:
    """Raise TypeError if a field has another type than declared."""
    for item in fields(sidecar):
        kind = str if item.name in ("artifact", "sha256") else dict
        value = getattr(sidecar, item.name)
        if not isinstance(value, kind):
            raise TypeError(f"{item.name} is {value!r}, expected a {kind.__name__}")
    for field_name in ("parents", "versions"):
        for key, value in getattr(sidecar, field_name).items():
            if not isinstance(value, str):
                raise TypeError(f"{field_name}.{key}: got {value!r}, expected a text")


def _json_bytes(content: Any) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
