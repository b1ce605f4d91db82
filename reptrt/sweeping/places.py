"""Where the files of a store are: in a folder, or in any place that fsspec knows."""

import os
import re
from pathlib import Path
from typing import Any, Protocol

from reptrt.core.artifacts import make_folder, write_bytes
from reptrt.core.errors import ArtifactError, ConfigError, MissingDependencyError, option

_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_LOCAL = "file://"


class Place(Protocol):
    """Files by name, with slashes; each is written whole or not at all."""

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None: it does not exist."""

    def write(self, name: str, content: bytes) -> None:
        """Write a file."""

    def names(self, folder: str) -> set[str]:
        """Return the names of the files directly in a folder."""

    @property
    def path(self) -> Path | None:
        """The place as a folder of this machine; None: it is none."""


class Folder:
    """A folder, on this machine or in a shared file system."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def path(self) -> Path:
        """The folder."""
        return self._path

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None: it does not exist."""
        try:
            return (self._path / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as err:
            raise ArtifactError(
                f"{self._path / name}: cannot be read ({err.strerror or err})"
            ) from err

    def write(self, name: str, content: bytes) -> None:
        """Write a file, with the folders above it."""
        path = self._path / name
        make_folder(path.parent)
        write_bytes(path, content)

    def names(self, folder: str) -> set[str]:
        """Return the names of the files in a folder."""
        try:
            return set(os.listdir(self._path / folder))
        except FileNotFoundError:
            return set()


class Remote:
    """A place that fsspec knows; files appear whole, as in every object store."""

    path = None

    def __init__(self, filesystem: Any, root: str, url: str) -> None:
        self._files, self._root, self._url = filesystem, root.rstrip("/"), url.rstrip("/")

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None: it does not exist."""
        try:
            return bytes(self._files.cat_file(f"{self._root}/{name}"))
        except FileNotFoundError:
            return None
        except Exception as err:  # each file system has errors of its own
            raise _unusable(f"{self._url}/{name}", "read", err) from err

    def write(self, name: str, content: bytes) -> None:
        """Write a file."""
        path = f"{self._root}/{name}"
        try:
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._files.pipe_file(path, content)
        except Exception as err:
            raise _unusable(f"{self._url}/{name}", "written", err) from err

    def names(self, folder: str) -> set[str]:
        """Return the names of the files in a folder."""
        try:
            self._files.invalidate_cache()
            found = self._files.ls(f"{self._root}/{folder}", detail=False)
        except FileNotFoundError:
            return set()
        except Exception as err:
            raise _unusable(f"{self._url}/{folder}", "listed", err) from err
        return {str(path).rstrip("/").rpartition("/")[2] for path in found}


def is_url(text: str) -> bool:
    """Return whether a text names a place that only fsspec knows."""
    return _URL.match(text) is not None and not text.startswith(_LOCAL)


def open_place(where: str) -> Place:
    """Return a place; nothing is written yet.

    Args:
        where: a folder, or a URL.

    Raises:
        MissingDependencyError: fsspec, or what it needs for this kind of URL, is not installed.
        ConfigError: fsspec does not know this kind of URL.
    """
    if not is_url(where):
        return Folder(Path(where.removeprefix(_LOCAL)))
    kind = where.partition("://")[0]
    try:
        from fsspec.core import url_to_fs

        filesystem, root = url_to_fs(where)
    except ImportError as err:
        raise MissingDependencyError(
            f"{option('store')} {where}: {' '.join(str(err).split())}; pip install "
            f"'reptrt[fsspec]', and the package that fsspec needs for {kind}://"
        ) from err
    except ValueError as err:
        raise ConfigError(
            f"{option('store')} {where}: expected a folder or a URL that fsspec knows, such as "
            f"s3://bucket/folder ({' '.join(str(err).split())})"
        ) from err
    except Exception as err:  # no credentials, no host, ...
        raise _unusable(where, "opened", err) from err
    return Remote(filesystem, root, where)


def _unusable(what: str, verb: str, err: Exception) -> ArtifactError:
    reason = " ".join(str(err).split()) or type(err).__name__
    return ArtifactError(f"{what}: cannot be {verb} ({reason})")
