"""What the stages report."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from reptrt.core.choices import Threshold
from reptrt.core.grid import Grid
from reptrt.core.result import Result
from reptrt.exporter.prove import Proof
from reptrt.graph.splits import Split
from reptrt.quantize.choose import Decision, FloatChoice, RangeDecision, full_range_of
from reptrt.quantize.reconstruct.options import ReconstructReport
from reptrt.rewrite.contract import Skipped, by_reason

_NAMED = 5  # names that a line shows before it counts


@dataclass(frozen=True, slots=True, repr=False)
class ExportReport(Result):
    """What `export` made and proved."""

    path: Path | None  # None: it is in memory only
    sha256: str
    proof: Proof
    skipped: tuple[Skipped, ...]  # batch norms, affines and sums of branches that are left
    num_parameters: int
    seconds: float
    notes: tuple[str, ...] = ()  # warnings: what was done to the source, and doubts about it

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        content: dict[str, Any] = asdict(self) | {"path": _text(self.path)}
        content["blocks"] = content["proof"].pop("blocks")
        proof: dict[str, Any] = content.pop("proof")
        return content | proof

    def to_table(self) -> Table:
        """Return the difference that fusion makes, block by block."""
        table = Table(box=None, pad_edge=False)
        table.add_column("block", overflow="fold")
        for title in ("max difference", "of values up to"):
            table.add_column(title, justify="right", no_wrap=True)
        for block in self.proof.blocks:
            table.add_row(block.name, f"{block.max_difference:.2e}", f"{block.max_value:.3g}")
        return table

    def to_lines(self) -> list[str]:
        """Return what was left alone and why, then the sum."""
        overall = self.proof.overall
        return [
            *(f"{skip.node:32s} left alone: {skip.reason}" for skip in by_reason(self.skipped)),
            *([f"ill-conditioned: {cost}"] if (cost := self.proof.ill_conditioned) else []),
            f"export  {_text(self.path) or 'in memory'}  {len(self.proof.blocks)} blocks fused  "
            f"{self.num_parameters / 1e6:.2f} M parameters  "
            f"max |original - fused| {overall.max_difference:.2e} of {overall.max_value:.3g}  "
            f"{self.seconds:.1f} s",
        ]


@dataclass(frozen=True, slots=True)
class TensorScale:
    """What calibration found for one activation."""

    tensor: str
    maximum: float  # largest |x| seen
    amax: float  # largest |x| kept
    scale: float
    grid: Grid  # the codes, less the zero point
    zeros: float  # fraction of exact zeros
    bins: tuple[int, ...]  # how often |x| fell into [i * width, (i + 1) * width), without the zeros
    bin_width: float

    def widened(self, margin: float) -> "TensorScale":
        """Return the same activation with a larger threshold."""
        scale = float(np.float32(margin * self.scale))
        return replace(self, amax=margin * self.amax, scale=scale)


@dataclass(frozen=True, slots=True, repr=False)
class CalibrateReport(Result):
    """What `calibrate` measured and chose."""

    path: Path | None  # None: the INT8 model is in memory only
    sha256: str
    images: int
    layers: int
    excluded: tuple[str, ...]  # layers that stay in float on request
    float_nodes: tuple[str, ...]  # nodes of any kind that do, those behind them included
    in_float: FloatChoice | None  # of the layers among them that auto:N chose; None: not asked for
    dead: tuple[str, ...]  # tensors that are 0 on all images, so they have no scale
    idle: tuple[str, ...]  # layers that stay in float because they read one
    threshold: Threshold  # the rule; of auto the one that was chosen
    margin: float  # by which auto widened its thresholds, for images not seen; 1 for a given rule
    tensors: tuple[TensorScale, ...]
    equalized: int  # streams of tensors whose channels were scaled
    splits: tuple[Split, ...]
    decisions: tuple[Decision, ...]  # of automatically chosen splits
    left_whole: tuple[Skipped, ...]  # layers that were to be split but are not, with the reason
    ranges: tuple[RangeDecision, ...]  # gain and cost of all codes, where they are possible
    overhead: float  # extra multiply-accumulates that were chosen, of the net's own
    extra_time: float  # what they add to the time at batch 1 by the roofline of the target
    learned: ReconstructReport | None  # None: nothing was learned
    simulation: str | None
    seconds: Mapping[str, float]  # per stage
    notes: tuple[str, ...] = ()  # warnings: what was done to the file, and doubts about the images

    @property
    def full_range(self) -> tuple[str, ...]:
        """The activations that take all codes."""
        return full_range_of(self.ranges)

    @property
    def left_float(self) -> dict[str, str]:
        """What stays in float: a label and the names, no entry where that is nothing."""
        groups = {
            "layers in float": self.excluded,
            "nodes in float": self.float_nodes,
            "0 on all images": self.dead,
            "so in float": self.idle,
        }
        rows = {label: _names(names) for label, names in groups.items() if names}
        if self.in_float is not None:
            rows["kept in float"] = self.in_float.summary
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self) | {"path": _text(self.path), "seconds": dict(self.seconds)}

    def to_table(self) -> Table:
        """Return what was measured and chosen, one row each."""
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column("what", no_wrap=True)
        table.add_column("value", overflow="fold")
        margin = f", {self.margin:.2f} times as wide" if self.margin > 1 else ""
        forms = Counter(split.form for split in self.splits)
        splits = ", ".join(f"{count} {form}" for form, count in forms.items()) or "none"
        rows = {
            "file": _text(self.path) or "in memory",
            "images": str(self.images),
            "layers": f"{self.layers} INT8",
            **self.left_float,
            "activations": f"{len(self.tensors)}, {len(self.full_range)} with all 256 codes",
            "threshold": f"{self.threshold}{margin}",
            "equalized": f"{self.equalized} activations",
            "split": f"{splits}; {len(self.left_whole)} left whole",
            "extra work": f"{100 * self.overhead:.1f} % of the multiply-accumulates",
            "extra time": f"{100 * self.extra_time:.1f} % at batch 1, by the model of the target",
        }
        if self.learned is not None:
            units = self.learned.units
            better = sum(unit.kept != "start" for unit in units)
            rows["learned"] = f"{better} of {len(units)} units are better on held-out images"
        if self.simulation is not None:
            rows["simulation"] = f"no engine can run it: {self.simulation}"
        rows["seconds"] = f"{sum(self.seconds.values()):.1f}"
        for what, value in rows.items():
            table.add_row(what, value)
        return table


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _names(names: Sequence[str]) -> str:
    """Return a count and the first few names."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{len(names)}: {', '.join(names[:_NAMED])}{more}"
