"""Finished units on disk, so that a stopped calibration can go on where it was.

Each unit has one .npz in a folder beside the output. The folder's name contains a hash of
everything that the result depends on, so units of another calibration are never loaded.
"""

import hashlib
import io
import json
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reptrt.core.artifacts import write_bytes
from reptrt.core.errors import ArtifactError
from reptrt.quantize.reconstruct.options import UnitReport
from reptrt.quantize.reconstruct.state import State

_FIELDS = ("codes", "gain", "shift", "step")
_BROKEN = (  # raised when a damaged .npz is read; RuntimeError: it seems to be encrypted
    OSError,
    ValueError,
    EOFError,
    KeyError,
    TypeError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


class Finished:
    """The finished units of one calibration."""

    def __init__(self, output: Path | None, key: Mapping[str, Any]) -> None:
        """Open the folder, and remove leftovers of other calibrations of the same output.

        The folder is not made before the first `save`.

        Args:
            output: the file that the calibration will write; None: nothing is kept.
            key: everything that the result depends on, as JSON values.

        Raises:
            ArtifactError: leftovers cannot be removed, or a file has the folder's name.
        """
        self._folder: Path | None = None
        if output is None:
            self.spill = Path(tempfile.gettempdir())
            return
        self.spill = output.parent  # for activations that do not fit into memory
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.root = _root(output)
        self._folder = self.root / digest[:16]
        if not self.root.exists():
            return
        try:
            leftovers = [path for path in self.root.iterdir() if path != self._folder]
            for path in leftovers:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if not self._folder.exists():
                self.root.rmdir()
        except OSError as err:
            reason = err.strerror or err
            raise ArtifactError(
                f"{self.root}: leftovers of an earlier calibration cannot be removed ({reason}); "
                "remove it"
            ) from err

    def load(self, index: int, device: torch.device) -> tuple[State, UnitReport] | None:
        """Return the result of unit ``index``; None if there is no file or it is damaged."""
        if self._folder is None:
            return None
        try:
            content = io.BytesIO(_path(self._folder, index).read_bytes())
            with np.load(content, allow_pickle=False) as arrays:
                report = json.loads(str(arrays["report"]))
                values: dict[str, dict[Any, torch.Tensor]] = {name: {} for name in _FIELDS}
                for key in arrays.files:
                    kind, _, name = key.partition(":")
                    if kind in values:
                        value = torch.tensor(arrays[key], device=device)
                        values[kind][int(name) if kind == "step" else name] = value
            report["layers"] = tuple(report["layers"])
            return State(**values), UnitReport(**report)
        except _BROKEN:  # OSError: the file is not there
            return None

    def save(self, index: int, state: State, report: UnitReport) -> None:
        """Write the result of unit ``index`` atomically.

        Raises:
            ArtifactError: the folder cannot be made, or the disk is full.
        """
        if self._folder is None:
            return
        arrays = {
            f"{kind}:{name}": value.cpu().numpy()
            for kind in _FIELDS
            for name, value in getattr(state, kind).items()
        }
        text = json.dumps({name: getattr(report, name) for name in UnitReport.__slots__})
        stream = io.BytesIO()
        np.savez(stream, report=np.array(text), **arrays)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise ArtifactError(f"{self.root}: cannot be made ({err.strerror or err})") from err
        write_bytes(_path(self._folder, index), stream.getvalue())


def remove_finished(output: Path) -> None:
    """Delete the folder of finished units; called when the output is written."""
    shutil.rmtree(_root(output), ignore_errors=True)


def _root(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index:04d}.npz"
