"""Times of layers that were measured before, in a file of the user's cache folder.

    {"format": 1, "timings": {KEY: {"none": seconds, "identity-scalar": seconds}}}

KEY is a sha256 over the machine, the version of the runtime and the shape of the layer. Times of
one entry were measured side by side; they are used together or not at all.
"""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from reptrt.core.artifacts import write_json

_LOG = logging.getLogger(__name__)

FORMAT = 1
_WAIT = 10.0  # seconds for the lock; a machine that is off may hold it on a shared folder

Times = Mapping[str, float]  # form -> seconds


def cache_folder() -> Path:
    """Return the user's folder for what can be made again."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "reptrt"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reptrt"


def key_of(content: Any) -> str:
    """Return the key of an entry for JSON values that it depends on."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Timings:
    """The file; several processes may use it at a time.

    Args:
        path: of the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, dict[str, float]]:
        """Return all entries; none if there is no file, or if it cannot be used."""
        try:
            content = json.loads(self._path.read_text())
            if content["format"] != FORMAT:
                return {}
            return {
                key: {form: float(seconds) for form, seconds in times.items()}
                for key, times in content["timings"].items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as err:
            said = " ".join(str(err).split())
            _LOG.warning("%s: cannot be used (%s); layers are timed anew", self._path, said)
            return {}

    def add(self, entries: Mapping[str, Times]) -> None:
        """Add entries to those that the file has by now."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._path.with_suffix(".lock"), timeout=_WAIT):
                every = {**self.read(), **{key: dict(times) for key, times in entries.items()}}
                write_json(self._path, {"format": FORMAT, "timings": every})
        except OSError as err:  # a timeout of the lock is one, too
            said = " ".join(str(err).split())
            _LOG.warning("%s: cannot be written (%s); timings are not kept", self._path, said)
