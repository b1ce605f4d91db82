"""What files cost where they will run, as ratios to plain INT8.

For onnxruntime, files are timed here in interleaved rounds (`reptrt.judge.bench`). For TensorRT the
cost is computed from shapes (`reptrt.quantize.targets.roofline`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reptrt.core.choices import TargetName
from reptrt.graph.net import read_model
from reptrt.judge.bench import bench
from reptrt.judge.options import BenchOptions
from reptrt.quantize.targets import TARGETS
from reptrt.quantize.targets.roofline import modelled_time
from reptrt.search.options import TuneOptions

MEASURED: tuple[TargetName, ...] = ("onnxruntime",)  # that run where the search does


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a file as a ratio to that of plain INT8."""

    ratio: float
    low: float | None = None  # 95 % interval; None: by the model
    high: float | None = None
    median_ms: float | None = None  # None: by the model


def model_time(path: Path, target: TargetName, batch: int) -> float:
    """Return the time of a file by the model, in units of the time to move one byte."""
    return modelled_time(read_model(path), TARGETS[target], batch).total


def measure(
    files: Sequence[Path], plain: Path, of_float: Path, options: TuneOptions
) -> tuple[dict[Path, Cost], Cost]:
    """Time files in interleaved rounds; return the cost of each, and that of the float net."""
    every = list(dict.fromkeys([plain, of_float, *files]))
    report = bench(
        every,
        BenchOptions(
            batches=(options.batch,),
            threads=options.threads,
            baseline=plain,
            min_seconds=options.bench_seconds,
            warmup_seconds=options.bench_seconds / 4,
            seed=options.seed,
        ),
    )
    costs = {
        path: Cost(float(row.ratio or 1.0), row.ratio_low, row.ratio_high, row.median_ms)
        for path, row in zip(every, report.results, strict=True)
    }
    return costs, costs[of_float]
