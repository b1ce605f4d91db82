"""The record of the branches that each fused kernel was made from, kept in the net's metadata.

There is one entry per branch of every fused convolution, by node name:

    {"stage1.0": [
        {"kind": "3x3", "name": "stage1.0.rbr_dense", "amax": base64 of float32 (O,)},
        {"kind": "identity", "name": "stage1.0.rbr_identity", "amax": ..., "diagonal": ...}]}

Kinds: ``identity`` (one value per channel, no mixing), ``1x1``, ``3x3``, ``1x3``...: the size of
the branch's own kernel after merging what is in series.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from reptrt.core.arrays import floats_of, text_of
from reptrt.graph.net import Net, get_json, set_json

_KEY = "provenance"


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """One branch of a fused convolution."""

    kind: str
    name: str  # common prefix of its parameters' names; "" if they have none
    amax: npt.NDArray[np.float32]  # (O,), max |weight| it contributes per output channel
    diagonal: npt.NDArray[np.float32] | None = None  # (O,), identity branches only

    def scaled(self, scale: npt.NDArray[np.float64]) -> "Branch":
        """Return the branch with its output channels multiplied by ``scale``, (O,) or (1,)."""
        diagonal = None if self.diagonal is None else (self.diagonal * scale).astype(np.float32)
        amax = (self.amax * np.abs(scale)).astype(np.float32)
        return Branch(self.kind, self.name, amax, diagonal)


def write_provenance(
    net: Net, fused: Mapping[str, tuple[Branch, ...]], gone: Collection[str] = ()
) -> None:
    """Set the records of some convolutions in the net's metadata; drop those that are gone."""
    records: dict[str, Any] = get_json(net, _KEY, dict) or {}
    records |= {name: [_to_json(branch) for branch in branches] for name, branches in fused.items()}
    records = {name: record for name, record in records.items() if name not in gone}
    if records:
        set_json(net, _KEY, records)
    else:
        net.metadata.pop(f"reptrt.{_KEY}", None)


def read_provenance(net: Net) -> dict[str, tuple[Branch, ...]]:
    """Return the records of all fused convolutions, by node name; empty if none were kept."""

    def parse(stored: dict[str, Any]) -> dict[str, tuple[Branch, ...]]:
        return {name: tuple(map(_from_json, branches)) for name, branches in stored.items()}

    return get_json(net, _KEY, parse) or {}


def _to_json(branch: Branch) -> dict[str, Any]:
    record: dict[str, Any] = {
        "kind": branch.kind,
        "name": branch.name,
        "amax": text_of(branch.amax),
    }
    if branch.diagonal is not None:
        record["diagonal"] = text_of(branch.diagonal)
    return record


def _from_json(record: Mapping[str, Any]) -> Branch:
    diagonal = record.get("diagonal")
    return Branch(
        record["kind"],
        record["name"],
        floats_of(record["amax"]),
        None if diagonal is None else floats_of(diagonal),
    )
