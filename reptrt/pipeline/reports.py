"""What the stages report."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from reptrt.core.choices import Threshold
from reptrt.exporter.export import Proof
from reptrt.graph.splits import Split
from reptrt.quantize.choose import Decision, RangeDecision, full_range_of
from reptrt.quantize.reconstruct.options import ReconstructReport
from reptrt.rewrite.contract import Skipped


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What `export` made and proved."""

    path: Path | None  # None: it is in memory only
    sha256: str
    proof: Proof
    skipped: tuple[Skipped, ...]  # sums that look like rep blocks and were left alone
    num_parameters: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        content: dict[str, Any] = asdict(self) | {"path": _text(self.path)}
        content["blocks"] = content["proof"].pop("blocks")
        proof: dict[str, Any] = content.pop("proof")
        return content | proof


@dataclass(frozen=True, slots=True)
class TensorScale:
    """What calibration found for one activation."""

    tensor: str
    maximum: float  # largest |x| seen
    amax: float  # largest |x| kept
    scale: float
    zeros: float  # fraction of exact zeros
    bins: tuple[int, ...]  # how often |x| fell into [i * width, (i + 1) * width), without the zeros
    bin_width: float

    def widened(self, margin: float) -> "TensorScale":
        """Return the same activation with a larger threshold."""
        scale = float(np.float32(margin * self.scale))
        return replace(self, amax=margin * self.amax, scale=scale)


@dataclass(frozen=True, slots=True)
class CalibrateReport:
    """What `calibrate` measured and chose."""

    path: Path | None  # None: the INT8 model is in memory only
    sha256: str
    images: int
    layers: int
    threshold: Threshold  # the rule; of auto the one that was chosen
    margin: float  # by which auto widened its thresholds, for images not seen; 1 for a given rule
    tensors: tuple[TensorScale, ...]
    equalized: int  # tensors whose channels were given equal ranges
    splits: tuple[Split, ...]
    decisions: tuple[Decision, ...]  # of --split auto
    left_whole: tuple[Skipped, ...]  # layers that were to be split but are not, with the reason
    ranges: tuple[RangeDecision, ...]  # gain and cost of all codes, where they are possible
    overhead: float  # extra multiply-accumulates that were chosen, of the net's own
    learned: ReconstructReport | None  # None: nothing was learned
    simulation: str | None
    seconds: Mapping[str, float]  # per stage

    @property
    def full_range(self) -> tuple[str, ...]:
        """The activations that take all codes."""
        return full_range_of(self.ranges)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self) | {"path": _text(self.path), "seconds": dict(self.seconds)}


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
