"""Finished units on disk, so that a calibration that was stopped goes on where it was.

One .npz per unit in a folder beside the output; a key over everything that the result depends on
is part of its name, so what belongs to another calibration is never taken up.
"""

import hashlib
import io
import json
import shutil
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
_BROKEN = (  # what reading a damaged .npz raises; RuntimeError: it seems to be encrypted
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

    def __init__(self, output: Path, key: Mapping[str, Any]) -> None:
        """Leftovers of other calibrations of this output go; `save` makes the folder.

        Args:
            output: the file that the calibration is to write.
            key: everything that the result depends on, as JSON values.

        Raises:
            ArtifactError: they cannot be removed, or a file has the folder's name.
        """
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.root = output.with_name(f"{output.name}.partial")
        self._folder = self.root / digest[:16]
        if not self.root.exists():
            return
        try:
            others = [path for path in self.root.iterdir() if path != self._folder]
            for other in others:
                shutil.rmtree(other) if other.is_dir() else other.unlink()
            if not self._folder.exists():
                self.root.rmdir()
        except OSError as err:
            reason = err.strerror or err
            raise ArtifactError(
                f"{self.root}: leftovers of an earlier calibration cannot be removed ({reason}); "
                "remove it"
            ) from err

    def load(self, index: int, device: torch.device) -> tuple[State, UnitReport] | None:
        """Return what unit ``index`` learned; None if it is not finished or the file is broken."""
        try:
            content = io.BytesIO(self._path(index).read_bytes())
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
        except FileNotFoundError:
            return None
        except _BROKEN:
            return None

    def save(self, index: int, state: State, report: UnitReport) -> None:
        """Write what unit ``index`` learned, whole or not at all.

        Raises:
            ArtifactError: the folder cannot be made, or the disk is full.
        """
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
        write_bytes(self._path(index), stream.getvalue())

    def remove(self) -> None:
        """Delete everything: the output is written."""
        shutil.rmtree(self.root, ignore_errors=True)

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:04d}.npz"
