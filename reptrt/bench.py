"""Time files side by side: what a user waits for one run, and how sure that number is.

All files are open at once and warm. Then come rounds: in each round every file runs once, in an
order drawn anew, so that heat, frequency steps and other programs hit all files alike. One sample
is the wall-clock time of one `run`, copies to and from a device included. Inputs are random: they
serve for timing only.

The JSON form of a report:

    {"results": [{"file", "runner", "device", "threads", "batch", "rounds", "median_ms",
                  "median_low_ms", "median_high_ms", "p90_ms", "p95_ms", "p99_ms",
                  "throughput_ips", "ratio", "ratio_low", "ratio_high"}],
     "baseline", "cpu", "onnxruntime", "seed", "warmup_seconds", "min_seconds"}

``low`` and ``high`` bound a 95 % bootstrap interval of the median. ``ratio`` is the median over
rounds of (time of this file / time of the baseline in the same round); below 1 is faster than the
baseline; null without one.
"""

import contextlib
import gc
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.table import Table

from reptrt.errors import ConfigError
from reptrt.runner import Device, Runner, RunnerKind, open_runner, ort_version

Float64Array = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]

MIN_ROUNDS = 10
RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A median and its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


class _Net(NamedTuple):
    path: Path
    runner: Runner


@dataclass(frozen=True, slots=True)
class Timing:
    """One file at one batch size; times in ms."""

    file: str
    runner: str
    device: str
    threads: int | None
    batch: int
    rounds: int  # samples
    median_ms: float
    median_low_ms: float
    median_high_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    throughput_ips: float  # images a second at the median
    ratio: float | None = None  # time / time of the baseline
    ratio_low: float | None = None
    ratio_high: float | None = None


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Timings by batch size, then by file in the order they were given; and the conditions."""

    results: tuple[Timing, ...]
    baseline: str | None
    cpu: str
    onnxruntime: str | None  # version; None if only engines ran
    seed: int
    warmup_seconds: float
    min_seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)

    def to_table(self) -> Table:
        """Return the report as a table for people."""
        table = Table(box=None, pad_edge=False, caption=self.cpu, caption_justify="left")
        table.add_column("file", overflow="fold")
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
            table.add_row(row.file, *cells)
        return table


def bench(
    files: Sequence[Path],
    *,
    batches: tuple[int, ...] = (1,),
    runner: RunnerKind = "auto",
    device: Device = "cpu",
    threads: int | None = None,
    baseline: Path | None = None,
    min_seconds: float = 2.0,
    warmup_seconds: float = 0.5,
    seed: int = 0,
) -> BenchReport:
    """Time every file at every batch size.

    Args:
        files: .onnx and .engine files, in the order of the report.
        batches: batch sizes.
        runner: "ort" or "tensorrt" accept one kind of file only.
        device: of onnxruntime.
        threads: CPU threads of onnxruntime.
        baseline: the file that ratios refer to; put first if it is not one of ``files``.
        min_seconds: measuring goes on for so long for each file and batch size, and for at least
            `MIN_ROUNDS` rounds.
        warmup_seconds: for each file and batch size, before.
        seed: of inputs, order and bootstrap.

    Raises:
        ReptrtError: a file that cannot be opened or fails; a batch size that a file cannot take.
    """
    if not batches or min(batches) < 1:
        raise ConfigError(f"--batch: got {batches}, expected positive batch sizes")
    paths = list(dict.fromkeys(files))
    if baseline is not None and baseline not in paths:
        paths.insert(0, baseline)
    rng = np.random.default_rng(seed)
    results: list[Timing] = []
    with contextlib.ExitStack() as stack:
        nets = [
            _Net(
                p,
                stack.enter_context(open_runner(p, runner=runner, threads=threads, device=device)),
            )
            for p in paths
        ]
        for net in nets:
            _check_shape(net, batches)
        for batch in batches:
            inputs = [_random_input(net.runner, batch, rng) for net in nets]
            for net, images in zip(nets, inputs, strict=True):
                _warm_up(net.runner, images, warmup_seconds)
            times = _measure([net.runner for net in nets], inputs, min_seconds * len(nets), rng)
            base = None if baseline is None else times[paths.index(baseline)]
            for net, samples in zip(nets, times, strict=True):
                ratio = None if base is None else median_interval(samples / base, rng)
                results.append(_timing(net, batch, samples, median_interval(samples, rng), ratio))
    uses_ort = any(net.runner.name == "onnxruntime" for net in nets)
    return BenchReport(
        results=tuple(results),
        baseline=None if baseline is None else str(baseline),
        cpu=cpu_name(),
        onnxruntime=ort_version() if uses_ort else None,
        seed=seed,
        warmup_seconds=warmup_seconds,
        min_seconds=min_seconds,
    )


def median_interval(samples: Float64Array, rng: np.random.Generator) -> Interval:
    """Return the median of samples (n,) and its 95 % bootstrap interval."""
    low, high = np.percentile(resampled_medians(samples, rng), (2.5, 97.5))
    return Interval(float(np.median(samples)), float(low), float(high))


def resampled_medians(samples: Float64Array, rng: np.random.Generator) -> Float64Array:
    """Return medians of `RESAMPLES` resamples of samples (n,), without making the resamples.

    Drawing n of n sorted samples with replacement takes the indices floor(n U) of n uniform
    numbers U. The k-th smallest U is Beta(k, n + 1 - k) distributed, and the smallest of the
    n - k above it is U_k + (1 - U_k) (1 - R^(1 / (n - k))) with R uniform.
    """
    ordered = np.sort(samples)
    n = len(ordered)
    k = (n + 1) // 2
    lower = rng.beta(k, n + 1 - k, RESAMPLES)
    medians: Float64Array = ordered[np.minimum((n * lower).astype(int), n - 1)]
    if n % 2 == 0:
        upper = lower + (1 - lower) * (1 - rng.random(RESAMPLES) ** (1 / (n - k)))
        medians = (medians + ordered[np.minimum((n * upper).astype(int), n - 1)]) / 2
    return medians


def cpu_name() -> str:
    """Return the processor's name as the operating system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _check_shape(net: _Net, batches: Sequence[int]) -> None:
    path, runner = net
    fixed, *image = runner.input_shape
    if not all(image):
        raise ConfigError(
            f"{path}: input {runner.input_name} is {list(runner.input_shape)}, expected a fixed "
            "image size; export it with --input-size"
        )
    if fixed is not None and any(batch != fixed for batch in batches):
        raise ConfigError(
            f"{path}: takes batch {fixed} only, asked for {', '.join(map(str, batches))}; "
            f"use --batch {fixed} or export it with a free batch size"
        )


def _random_input(runner: Runner, batch: int, rng: np.random.Generator) -> Float32Array:
    sizes = [size or 1 for size in runner.input_shape[1:]]
    return rng.standard_normal((batch, *sizes), dtype=np.float32)


def _warm_up(runner: Runner, images: Float32Array, seconds: float) -> None:
    started = time.perf_counter()
    runner.run(images)
    while time.perf_counter() - started < seconds:
        runner.run(images)


def _measure(
    runners: Sequence[Runner],
    inputs: Sequence[Float32Array],
    seconds: float,
    rng: np.random.Generator,
) -> Float64Array:
    """Return the times of all rounds in ms, shape (files, rounds)."""
    rounds: list[Float64Array] = []
    started = time.perf_counter()
    with _no_garbage_collection():
        while len(rounds) < MIN_ROUNDS or time.perf_counter() - started < seconds:
            samples = np.empty(len(runners))
            for index in rng.permutation(len(runners)):
                begin = time.perf_counter_ns()
                runners[index].run(inputs[index])
                samples[index] = (time.perf_counter_ns() - begin) / 1e6
            rounds.append(samples)
    return np.stack(rounds, axis=1)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _timing(
    net: _Net, batch: int, samples: Float64Array, middle: Interval, ratio: Interval | None
) -> Timing:
    p90, p95, p99 = (float(value) for value in np.percentile(samples, (90, 95, 99)))
    return Timing(
        file=str(net.path),
        runner=net.runner.name,
        device=net.runner.device,
        threads=net.runner.threads,
        batch=batch,
        rounds=len(samples),
        median_ms=middle.median,
        median_low_ms=middle.low,
        median_high_ms=middle.high,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        throughput_ips=1000.0 * batch / middle.median,
        ratio=None if ratio is None else ratio.median,
        ratio_low=None if ratio is None else ratio.low,
        ratio_high=None if ratio is None else ratio.high,
    )
