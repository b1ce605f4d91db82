"""What a search found: what is printed, and the content of ``tune.json``."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from reptrt.core.choices import Metric, TargetName
from reptrt.core.result import Result
from reptrt.quantize.targets import TARGETS
from reptrt.search.judging import Judgement
from reptrt.search.latency import MEASURED, Cost

BEST_FILE, RECORD_FILE, REPORT_FILE = "best.onnx", "tune.json", "report.html"
_TITLES = {"top1": "top-1", "map": "mAP", "miou": "mIoU", "agreement": "agreement", "sqnr": "SQNR"}


@dataclass(slots=True)
class Row:
    """One candidate; filled while the search goes on."""

    name: str
    form: str
    recipe: str | None
    state: str = "done"  # "kept" from an earlier search, or "failed: ...", "skipped: ..."
    seconds: float | None = None  # of calibration
    sha256: str | None = None
    modelled: float | None = None  # time by the model / that of plain INT8
    judged: Judgement | None = None  # on the most images of the tuning part so far
    is_final: bool = False  # judged on all images of the tuning part
    is_simulation: bool = False
    cost: Cost | None = None  # of the finalists
    on_front: bool = False
    confirmed: Judgement | None = None  # on the other images


@dataclass(frozen=True, slots=True, repr=False)
class Tuned(Result):
    """The choice, the candidates it was made from, and what the search cost."""

    folder: Path
    metric: Metric
    limit: float  # largest loss that is accepted
    target: TargetName
    rows: tuple[Row, ...]
    chosen: str  # name of the candidate in best.onnx: the cheapest, or else the most accurate
    met: bool  # whether it meets the bound on both parts
    looks: int  # candidates that were judged on the part to confirm on
    of_float: Cost | None  # the float net, where latencies are measured
    tuning_images: int
    confirming_images: int
    seconds: float  # of this search, without what was kept
    hints: tuple[str, ...] = field(default=())  # what would help where nothing meets the bound

    @property
    def path(self) -> Path:
        """The chosen file."""
        return self.folder / BEST_FILE

    @property
    def best(self) -> Row:
        """The row of the chosen file."""
        return next(row for row in self.rows if row.name == self.chosen)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {**asdict(self), "folder": str(self.folder)}

    def to_table(self) -> Table:
        """Return the candidates; a * is on the Pareto front."""
        table = Table(box=None, pad_edge=False)
        table.add_column("candidate", overflow="fold")
        for title in self.titles:
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("state", overflow="fold")
        for row in self.rows:
            mark = f"{row.name} *" if row.on_front else row.name
            table.add_row(mark, *self.cells(row), row.state)
        return table

    @property
    def titles(self) -> tuple[str, ...]:
        """The titles of `cells`."""
        unit = "dB" if self.metric == "sqnr" else "loss, points"
        how = "measured" if self.is_measured else "by the model"
        return ("images", f"{_TITLES[self.metric]} {unit}", "95 %", f"latency {how}", "calib. s")

    def cells(self, row: Row) -> tuple[str, ...]:
        """Return the numbers of a candidate as text."""
        judged, cost = row.judged, row.cost
        ratio = cost.ratio if cost is not None else None if self.is_measured else row.modelled
        return (
            "-" if judged is None else str(judged.images),
            "-" if judged is None else self._loss(judged),
            interval_text(judged),
            "-" if ratio is None else f"{ratio:.3f}",
            "-" if row.seconds is None else f"{row.seconds:.1f}",
        )

    def to_lines(self) -> list[str]:
        """Return the choice, the numbers on both parts, what it costs, and where it is."""
        return [*self.verdict(), *self.hints, f"tune  {self.path}  {self.folder / REPORT_FILE}"]

    def verdict(self) -> list[str]:
        """Return the choice in sentences."""
        best, name = self.best, _TITLES[self.metric]
        bound = (
            f"{name} >= {-self.limit:g} dB"
            if self.metric == "sqnr"
            else (f"{name} loses at most {self.limit:g} points")
        )
        if not self.met:
            head = f"nothing meets the bound ({bound}); the most accurate is {best.name}"
        elif best.recipe is None:
            head = f"plain INT8 is enough ({bound})"
        else:
            head = f"the cheapest that meets the bound ({bound}) is {best.name}"
        lines = [head]
        for judged, what in ((best.judged, "tuned on"), (best.confirmed, "never seen before")):
            if judged is not None:
                inside = "" if judged.low is None else f" (95 %: {interval_text(judged)})"
                unit = "" if self.metric == "sqnr" else " points lost"
                lines.append(
                    f"  {what}: {self._loss(judged)}{unit}{inside}, {judged.images} images"
                )
        lines += self._costs()
        if self.looks > 1:
            lines.append(
                f"  {self.looks} candidates were judged on the unseen images before one held there"
                if self.met
                else f"  {self.looks} candidates were judged on the unseen images"
            )
        return lines

    @property
    def is_measured(self) -> bool:
        """Whether latencies are measured."""
        return self.target in MEASURED

    def _costs(self) -> list[str]:
        best, tried = self.best, sum(row.sha256 is not None for row in self.rows)
        if best.cost is None:
            return []
        how = f"in {self.target}" if self.is_measured else f"by the model for {self.target}"
        line = f"  latency {best.cost.ratio:.3f} of plain INT8 {how}"
        if self.of_float is not None:
            line += f", {best.cost.ratio / self.of_float.ratio:.2f} of float"
        source = (
            [] if self.is_measured else [f"  the model: {TARGETS[self.target].roofline.source}"]
        )
        return [f"{line}; {tried} candidates were made, in {self.seconds:.0f} s", *source]

    def _loss(self, judged: Judgement) -> str:
        if self.metric == "sqnr":
            return f"{judged.value:.2f} dB"
        return f"{judged.loss:.2f}"


def interval_text(judged: Judgement | None) -> str:
    """Return an interval in points, or a dash."""
    if judged is None or judged.low is None or judged.high is None:
        return "-"
    return f"{judged.low:.2f} to {judged.high:.2f}"
