"""A timing cache file that several builds may use at once.

A build reads the file at its start. At its end it takes the lock, reads what others have written
in the meantime, adds its own measurements and replaces the file: nothing that anyone measured is
lost, and a reader never sees half a file. The lock is on ``<file>.lock``, which stays; the system
releases it when its holder dies.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from reptrt.core.artifacts import write_bytes
from reptrt.core.errors import ArtifactError, ConfigError, EngineError
from reptrt.trt.messages import Messages
from reptrt.trt.versions import Backend

_LOG = logging.getLogger(__name__)


def attach(backend: Backend, messages: Messages, config: Any, path: Path) -> None:
    """Give a builder config the measurements in ``path``; none if there is no such file yet.

    Raises:
        EngineError: the file is not a timing cache of this TensorRT and this GPU.
    """
    cache = _parse(config, _read(path))
    if cache is None or not config.set_timing_cache(cache, False):
        raise EngineError(
            f"{path}: not a timing cache of {backend.label} on this GPU ({messages.reason()}); "
            f"delete it, or name another {option('timing_cache')}"
        )


def merge(config: Any, path: Path) -> None:
    """Add what a build has measured to ``path``, together with what others added meanwhile."""
    cache = config.get_timing_cache()
    with locked(path):
        others = _read(path)
        if others:
            theirs = _parse(config, others)
            if theirs is None or not cache.combine(theirs, False):
                _LOG.warning("%s: now of another TensorRT or GPU; left as it is", path)
                return
        write_bytes(path, bytes(cache.serialize()))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of ``path``, waiting for whoever holds it.

    Raises:
        ArtifactError: the lock file cannot be made.
        ConfigError: the system has no file locks of this kind.
    """
    if sys.platform == "win32":
        raise ConfigError("--timing-cache: needs POSIX file locks; build without it on Windows")
    import fcntl

    with _open_lock(path.with_name(path.name + ".lock")) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _open_lock(path: Path) -> BinaryIO:
    try:
        return open(path, "ab")
    except OSError as err:
        raise ArtifactError(f"{path}: cannot be written ({err.strerror or err})") from err


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as err:
        raise ArtifactError(f"{path}: cannot be read ({err.strerror or err})") from err


def _parse(config: Any, content: bytes) -> Any | None:
    """Return TensorRT's form of a cache; empty content gives an empty cache."""
    try:
        return config.create_timing_cache(content)
    except TypeError:  # what pybind11 makes of a null pointer
        return None
