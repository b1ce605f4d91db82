"""A timing cache file that several builds may use at once.

A build reads the file when it starts. When it ends it takes the lock, reads what other builds have
written meanwhile, adds its own measurements and replaces the file: no measurement is lost, and no
reader sees half a file. The lock is ``<file>.lock``; the operating system releases it when the
process that holds it dies.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from reptrt.core.artifacts import write_bytes
from reptrt.core.errors import ArtifactError, EngineError, option
from reptrt.trt.messages import Messages
from reptrt.trt.versions import Backend

_LOG = logging.getLogger(__name__)


def attach(backend: Backend, messages: Messages, config: Any, path: Path) -> None:
    """Give a builder config the measurements in ``path``, none if the file does not exist yet.

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
    """Add the measurements of a build to those in ``path``, which other builds may have extended.

    A file that meanwhile belongs to another TensorRT or GPU is left as it is, with a warning.

    Raises:
        ArtifactError: the file cannot be locked, read or written.
    """
    cache = config.get_timing_cache()
    with locked(path):
        others = _read(path)
        if others:
            theirs = _parse(config, others)
            if theirs is None or not cache.combine(theirs, False):
                _LOG.warning("%s: belongs to another TensorRT or GPU now; left as it is", path)
                return
        write_bytes(path, bytes(cache.serialize()))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of ``path``; wait for the process that holds it.

    Raises:
        ArtifactError: the lock file cannot be made.
    """
    lock = filelock.FileLock(path.with_name(path.name + ".lock"))
    try:
        lock.acquire()
    except OSError as err:
        raise ArtifactError(f"{lock.lock_file}: cannot be locked ({err.strerror or err})") from err
    try:
        yield
    finally:
        lock.release()


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
