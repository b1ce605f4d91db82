"""Time files side by side: what a user waits for one run, and how sure that number is.

All files are open at once and warm. Then come rounds: in each round every file runs once, in an
order drawn anew, so that heat, frequency steps and other programs hit all files alike. One sample
is the wall-clock time of one `run`, copies to and from a GPU included; without host copies, that of
an engine is the time between two CUDA events around the run. Inputs are random: they serve for
timing only.
"""

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from reptrt.core.choices import Device, RunnerKind
from reptrt.core.errors import ConfigError
from reptrt.core.intervals import Float64Array, percentile_interval
from reptrt.execute.runner import (
    EventTimer,
    Runner,
    open_runner,
    ort_version,
    usable_cores,
)
from reptrt.judge.bench_report import BenchReport, Timing
from reptrt.trt.machine import Conditions, cpu_name, read_conditions, remarks

Float32Array = npt.NDArray[np.float32]

MIN_ROUNDS = 10


class _Net(NamedTuple):
    path: Path
    runner: Runner
    events: EventTimer | None  # the runner, if its runs are timed by events on the GPU

    @property
    def on_gpu(self) -> bool:
        return self.runner.device != "cpu"


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
    host_copies: bool = True,
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
        host_copies: count the copies from and to the host; False leaves those of engines out.
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
    with contextlib.ExitStack() as stack:
        nets = []
        for path in paths:
            opened = open_runner(path, runner=runner, threads=threads, device=device)
            nets.append(_net(path, stack.enter_context(opened), host_copies))
        for net in nets:
            _check_shape(net, batches)
        base = None if baseline is None else paths.index(baseline)
        seconds = (warmup_seconds, min_seconds)
        results, before, after = _time_all(nets, batches, base, seconds, rng)
    uses_ort = any(net.runner.name == "onnxruntime" for net in nets)
    return BenchReport(
        results=tuple(results),
        baseline=None if baseline is None else str(baseline),
        cpu=cpu_name(),
        onnxruntime=ort_version() if uses_ort else None,
        seed=seed,
        warmup_seconds=warmup_seconds,
        min_seconds=min_seconds,
        before=before,
        after=after,
        remarks=remarks(before, after, usable_cores()),
    )


def _net(path: Path, runner: Runner, host_copies: bool) -> _Net:
    return _Net(
        path, runner, runner if not host_copies and isinstance(runner, EventTimer) else None
    )


def _time_all(
    nets: Sequence[_Net],
    batches: Sequence[int],
    base: int | None,
    seconds: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[list[Timing], Conditions, Conditions]:
    """Return the timings of open nets, and the machine when all were warm and after the last run.

    Args:
        nets: what to time.
        batches: batch sizes.
        base: index of the net that ratios refer to.
        seconds: to warm up and to measure for, each net at each batch size.
        rng: of inputs, order and bootstrap.
    """
    on_gpu = any(net.on_gpu for net in nets)
    results: list[Timing] = []
    before = None
    for batch in batches:
        inputs = [_random_input(net.runner, batch, rng) for net in nets]
        for net, images in zip(nets, inputs, strict=True):
            _warm_up(net.runner, images, seconds[0])
        before = before or read_conditions(gpu=on_gpu)
        times = _measure(nets, inputs, seconds[1] * len(nets), rng)
        for net, samples in zip(nets, times, strict=True):
            results.append(_timing(net, batch, samples, None if base is None else times[base], rng))
    after = read_conditions(gpu=on_gpu)
    return results, before or after, after


def _check_shape(net: _Net, batches: Sequence[int]) -> None:
    path, runner, _ = net
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
    nets: Sequence[_Net],
    inputs: Sequence[Float32Array],
    seconds: float,
    rng: np.random.Generator,
) -> Float64Array:
    """Return the times of all rounds in ms, shape (files, rounds)."""
    rounds: list[Float64Array] = []
    started = time.perf_counter()
    with _no_garbage_collection():
        while len(rounds) < MIN_ROUNDS or time.perf_counter() - started < seconds:
            samples = np.empty(len(nets))
            for index in rng.permutation(len(nets)):
                samples[index] = _sample(nets[index], inputs[index])
            rounds.append(samples)
    return np.stack(rounds, axis=1)


def _sample(net: _Net, images: Float32Array) -> float:
    """Return the time of one run in ms."""
    if net.events is not None:
        return float(net.events.time_ms(images, 1)[0])
    begin = time.perf_counter_ns()
    net.runner.run(images)
    return (time.perf_counter_ns() - begin) / 1e6


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
    net: _Net,
    batch: int,
    samples: Float64Array,
    base: Float64Array | None,
    rng: np.random.Generator,
) -> Timing:
    median, p90, p95, p99 = (percentile_interval(samples, p, rng) for p in (50, 90, 95, 99))
    ratio = None if base is None else percentile_interval(samples / base, 50, rng)
    return Timing(
        file=str(net.path),
        runner=net.runner.name,
        device=net.runner.device,
        threads=net.runner.threads,
        host_copies=net.events is None if net.on_gpu else None,
        batch=batch,
        rounds=len(samples),
        median_ms=median.value,
        median_low_ms=median.low,
        median_high_ms=median.high,
        p90_ms=p90.value,
        p90_low_ms=p90.low,
        p90_high_ms=p90.high,
        p95_ms=p95.value,
        p95_low_ms=p95.low,
        p95_high_ms=p95.high,
        p99_ms=p99.value,
        p99_low_ms=p99.low,
        p99_high_ms=p99.high,
        throughput_ips=1000.0 * batch / median.value,
        ratio=None if ratio is None else ratio.value,
        ratio_low=None if ratio is None else ratio.low,
        ratio_high=None if ratio is None else ratio.high,
    )
