"""Options of `tune`; importing this loads nothing heavy."""

import re
from dataclasses import dataclass

from reptrt.core.choices import Metric, TargetName, TaskName
from reptrt.core.errors import ConfigError, option
from reptrt.core.option_fields import check_bounds, described, require_at_least
from reptrt.judge.options import TaskOptions

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smh]?)")
_METRIC_OF: dict[TaskName, Metric] = {
    "classify": "top1",
    "detect": "map",
    "segment": "miou",
    "any": "sqnr",
}


def seconds_from(text: str) -> float:
    """Return the seconds of a duration.

    >>> seconds_from("10m"), seconds_from("1.5h"), seconds_from("90")
    (600.0, 5400.0, 90.0)

    Raises:
        ConfigError: the text is no duration.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None:
        raise ConfigError(f"{option('budget')}: got {text!r}, expected a duration: 90s, 10m, 2h")
    return float(match[1]) * _UNITS[match[2] or "s"]


@dataclass(frozen=True)  # no slots: as TaskOptions
class TuneOptions(TaskOptions):
    """Options of `tune`."""

    max_drop: float = described(
        0.1,
        "Largest loss that is accepted against the float net, in points (percent) of the metric; "
        "of agreement: the largest share of images that may differ.",
        minimum=0,
    )
    min_sqnr: float | None = described(
        None, "Least SQNR of the outputs in dB that is accepted; for --metric sqnr."
    )
    metric: Metric = described(
        "auto",
        "Measure of accuracy: top1, map, miou, agreement with the float net, or sqnr; auto is that "
        "of the task.",
    )
    target: TargetName = described(
        "tensorrt",
        "Runtime that the file is made for: tensorrt (NVIDIA GPUs; latency by the cost model), "
        "onnxruntime (CPUs; latency is measured here).",
    )
    budget: float | None = described(
        None,
        "Time for the search, such as 90s, 10m or 2h; no trial is started that would not end "
        "within it. Default: no limit.",
        metavar="TIME",
        parse=seconds_from,
    )
    images: int | None = described(
        None,
        "Number of calibration images, sampled from the data; default: 512, or all if there are "
        "fewer.",
        short="-n",
    )
    eval_limit: int | None = described(
        None,
        "Number of images of --eval-data to judge on, tuning and confirmation together; default: "
        "all.",
    )
    float_layers: tuple[int, ...] = described(
        (1, 4), "Numbers of layers that may stay in float, those that cost most (--float auto:N)."
    )
    overheads: tuple[float, ...] = described(
        (0.0, 0.05, 0.1), "Shares of extra work that splits may add (--max-overhead) to try."
    )
    bits: tuple[int, ...] = described(
        (), "Bits of weights and activations to simulate too; such files are reported, not chosen."
    )
    threads: int | None = described(None, "CPU threads of onnxruntime; default: one for each core.")
    batch: int = described(1, "Batch size of latencies.", minimum=1)
    bench_seconds: float = described(2.0, "Seconds to measure the latency of each file.", minimum=0)
    seed: int = described(
        0, "Seed for sampling images, for the two parts of --eval-data and for learning.", minimum=0
    )

    def __post_init__(self) -> None:
        TaskOptions.__post_init__(self)
        check_bounds(self)
        require_at_least(1, self, "images", "threads")
        require_at_least(2, self, "eval_limit")
        if self.budget is not None and not self.budget > 0:
            raise ConfigError(f"{option('budget')}: got {self.budget}, expected seconds above 0")
        for name, least in (("float_layers", 1), ("overheads", 0)):
            if any(not value >= least for value in getattr(self, name)):
                got = getattr(self, name)
                raise ConfigError(f"{option(name)}: got {got}, expected {least} or more of each")
        if any(not 2 <= bits <= 7 for bits in self.bits):
            raise ConfigError(f"{option('bits')}: got {self.bits}, expected 2 to 7 (simulated)")
        self._check_metric()

    def _check_metric(self) -> None:
        task = {"map": "detect", "miou": "segment", "top1": "classify", "agreement": "classify"}
        needed = task.get(self.measure)
        if needed not in (None, self.task):
            raise ConfigError(
                f"{option('metric', self.measure)}: is not measured with "
                f"{option('task', self.task)}; give {option('task', needed)}"
            )
        if (self.measure == "sqnr") != (self.min_sqnr is not None):
            raise ConfigError(
                f"{option('min_sqnr')}: got {self.min_sqnr} with {option('metric', self.measure)}; "
                f"expected the least SQNR in dB with {option('metric', 'sqnr')}, and only with it"
            )

    @property
    def measure(self) -> Metric:
        """The metric, never auto."""
        return _METRIC_OF[self.task] if self.metric == "auto" else self.metric

    @property
    def limit(self) -> float:
        """The largest loss (`reptrt.search.judging`) that is accepted."""
        return self.max_drop if self.min_sqnr is None else -self.min_sqnr
