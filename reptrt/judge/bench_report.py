"""The report of timing files side by side.

The JSON form of a report:

    {"results": [{"file", "runner", "device", "threads", "host_copies", "batch", "rounds",
                  "median_ms", "median_low_ms", "median_high_ms", "p90_ms", "p90_low_ms",
                  "p90_high_ms", "p95_ms", ..., "p99_ms", ..., "throughput_ips", "ratio",
                  "ratio_low", "ratio_high", "target"}],
     "baseline", "cpu", "onnxruntime", "seed", "warmup_seconds", "min_seconds", "warnings",
     "before": {"cpu_mhz", "load_average", "gpu": {"sm_mhz", "memory_mhz", "temperature_c",
                "power_w", "held_back_by"}}, "after", "remarks",
     "explanations": [{"file", "batch", "lines"}]}

``low`` and ``high`` bound a 95 % bootstrap interval. ``ratio`` is the median over all rounds of the
file's time divided by the baseline's time in the same round: a ratio below 1 means that the file is
faster than the baseline; without a baseline it is null. ``target`` is the runtime that the file was
made for; ``warnings`` name files that were timed in another. ``before`` was read when all files
were warm, ``after`` right after the last run; values that could not be read are null
(`reptrt.trt.machine`). ``explanations`` say why a file is not clearly faster than the baseline
(`reptrt.judge.explain`).
"""

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from reptrt.core.result import Result
from reptrt.trt.machine import Conditions


@dataclass(frozen=True, slots=True)
class Timing:
    """One file at one batch size; times in ms."""

    file: str
    runner: str
    device: str
    threads: int | None
    host_copies: bool | None  # whether samples include copies between host and GPU; None on a CPU
    batch: int
    rounds: int  # number of samples
    median_ms: float
    median_low_ms: float
    median_high_ms: float
    p90_ms: float
    p90_low_ms: float
    p90_high_ms: float
    p95_ms: float
    p95_low_ms: float
    p95_high_ms: float
    p99_ms: float
    p99_low_ms: float
    p99_high_ms: float
    throughput_ips: float  # images per second at the median
    ratio: float | None = None  # time / time of the baseline
    ratio_low: float | None = None
    ratio_high: float | None = None
    target: str | None = None  # runtime that the file was made for; None: not known, or float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why one file at one batch size is not clearly faster than the baseline."""

    file: str
    batch: int
    lines: tuple[str, ...]  # the verdict first

    def to_dict(self) -> dict[str, Any]:
        """Return the explanation as JSON values."""
        return asdict(self)

    def to_lines(self) -> list[str]:
        """Return the explanation for people."""
        first, *others = self.lines
        return [f"{self.file}, batch {self.batch}: {first}", *(f"  {line}" for line in others)]


@dataclass(frozen=True, slots=True, repr=False)
class BenchReport(Result):
    """All timings, by batch size and then in the order of the files, and the machine's state."""

    results: tuple[Timing, ...]
    baseline: str | None
    cpu: str
    onnxruntime: str | None  # version; None: onnxruntime ran none of the files
    seed: int
    warmup_seconds: float
    min_seconds: float
    before: Conditions
    after: Conditions
    remarks: tuple[str, ...]  # what may have disturbed the measurement
    explanations: tuple[Explanation, ...] | None = None  # None: not requested
    warnings: tuple[str, ...] = ()  # files that were made for another runtime

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        content = asdict(self)
        if self.explanations is None:
            del content["explanations"]
        return content

    def to_table(self) -> Table:
        """Return the report as a table for people."""
        caption = "\n".join((self.cpu, *self.remarks, *self.warnings))
        table = Table(box=None, pad_edge=False, caption=caption, caption_justify="left")
        table.add_column("file", overflow="fold")
        with_target = any(row.target is not None for row in self.results)
        if with_target:
            table.add_column("made for", no_wrap=True)
        titles = ["device", "batch", "median ms", "95 %", "p90", "p95", "p99", "images/s"]
        for title in [*titles, *(["ratio", "95 %"] if self.baseline is not None else [])]:
            table.add_column(title, justify="right", no_wrap=True)
        for row in self.results:
            cells = [
                row.device if row.threads is None else f"{row.device} x{row.threads}",
                str(row.batch),
                f"{row.median_ms:.3f}",
                f"{row.median_low_ms:.3f}-{row.median_high_ms:.3f}",
                *(f"{value:.3f}" for value in (row.p90_ms, row.p95_ms, row.p99_ms)),
                f"{row.throughput_ips:.0f}",
            ]
            if row.ratio is not None:
                cells += [f"{row.ratio:.3f}", f"{row.ratio_low:.3f}-{row.ratio_high:.3f}"]
            made_for = [row.target or "-"] if with_target else []
            table.add_row(row.file, *made_for, *cells)
        return table

    def to_lines(self) -> list[str]:
        """Return why networks are not clearly faster than the baseline."""
        explanations = self.explanations or ()
        return [line for explanation in explanations for line in explanation.to_lines()]
