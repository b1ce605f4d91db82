"""Time files side by side: the latency of one run as a user sees it, with a confidence interval.

All files are open and warm at the same time. They are measured in rounds: in each round every file
runs once, in a new random order, so that heat, clock changes and other programs affect all files
alike. One sample is the wall-clock time of one `run`, including copies to and from a GPU; without
host copies, the sample of an engine is the time between two CUDA events around the run. Inputs are
random numbers.
"""

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from reptrt.core.arrays import Float32Array, Float64Array
from reptrt.core.errors import ConfigError, option
from reptrt.core.intervals import percentile_interval
from reptrt.execute.runner import (
    EventTimer,
    Runner,
    open_runner,
    ort_version,
    usable_cores,
)
from reptrt.graph.made_for import target_of
from reptrt.graph.model import Network, unique_labels
from reptrt.judge.bench_report import BenchReport, Timing
from reptrt.judge.options import BenchOptions
from reptrt.pipeline.values import Calibrated
from reptrt.trt.machine import Conditions, cpu_name, read_conditions, remarks

MIN_ROUNDS = 10


class _Net(NamedTuple):
    name: str
    runner: Runner
    target: str | None  # what it was made for
    events: EventTimer | None  # the runner, if its runs are timed by events on the GPU

    @property
    def elsewhere(self) -> str | None:
        """Say so if the net was made for another runtime than it is timed in."""
        in_tensorrt = "tensorrt" in (self.runner.name, self.runner.device)
        here = "tensorrt" if in_tensorrt else "onnxruntime" if not self.on_gpu else "no target"
        if self.target in (None, here):
            return None
        place = f"{self.runner.name} on {self.runner.device}"
        return f"{self.name} was made for {self.target} and timed in {place}"

    @property
    def on_gpu(self) -> bool:
        return self.runner.device != "cpu"


def bench(
    networks: Sequence[Network],
    options: BenchOptions = BenchOptions(),
    *,
    baseline: Network | None = None,
) -> BenchReport:
    """Time every network at every batch size.

    Args:
        networks: .onnx and .engine files and models in memory, in the order of the report; the
            baseline comes first if it is not one of them.
        options: how networks are run, at which batch sizes, and for how long; at least `MIN_ROUNDS`
            rounds are measured.
        baseline: the network that ratios of latencies refer to; it overrides ``options.baseline``.

    Raises:
        ReptrtError: a file cannot be opened, fails, or does not accept a batch size.
    """
    different, baseline = list(dict.fromkeys(networks)), baseline or options.baseline
    if baseline is not None and baseline not in different:
        different.insert(0, baseline)
    base = None if baseline is None else different.index(baseline)
    names = unique_labels(different)
    with contextlib.ExitStack() as stack:
        nets = [
            _open(name, network, options, stack)
            for name, network in zip(names, different, strict=True)
        ]
        batches = _own_batch(nets) if options.batches is None else options.batches
        for net in nets:
            _check_shape(net, batches)
        results, before, after = _time_all(nets, base, batches, options)
    uses_ort = any(net.runner.name == "onnxruntime" for net in nets)
    return BenchReport(
        results=tuple(results),
        baseline=None if base is None else names[base],
        cpu=cpu_name(),
        onnxruntime=ort_version() if uses_ort else None,
        seed=options.seed,
        warmup_seconds=options.warmup_seconds,
        min_seconds=options.min_seconds,
        before=before,
        after=after,
        remarks=remarks(before, after, usable_cores()),
        warnings=tuple(warning for net in nets if (warning := net.elsewhere) is not None),
    )


def _open(name: str, network: Network, options: BenchOptions, stack: contextlib.ExitStack) -> _Net:
    """Open a network until the stack is closed."""
    runner = stack.enter_context(
        open_runner(network, runner=options.runner, threads=options.threads, device=options.device)
    )
    events = runner if not options.host_copies and isinstance(runner, EventTimer) else None
    options_used = network.origin.options if isinstance(network, Calibrated) else None
    return _Net(name, runner, target_of(network, options_used), events)


def _time_all(
    nets: Sequence[_Net], base: int | None, batches: Sequence[int], options: BenchOptions
) -> tuple[list[Timing], Conditions, Conditions]:
    """Return the timings of open nets, and the machine's state before and after the measurement.

    The first state is read when all nets are warm, the second after the last run.

    Args:
        nets: what to time.
        base: index of the net that ratios refer to.
        batches: batch sizes to time.
        options: seconds and seed.
    """
    on_gpu = any(net.on_gpu for net in nets)
    rng = np.random.default_rng(options.seed)
    results: list[Timing] = []
    before = None
    for batch in batches:
        inputs = [_random_input(net.runner, batch, rng) for net in nets]
        for net, images in zip(nets, inputs, strict=True):
            _warm_up(net.runner, images, options.warmup_seconds)
        before = before or read_conditions(gpu=on_gpu)
        times = _measure(nets, inputs, options.min_seconds * len(nets), rng)
        for net, samples in zip(nets, times, strict=True):
            results.append(_timing(net, batch, samples, None if base is None else times[base], rng))
    after = read_conditions(gpu=on_gpu)
    return results, before or after, after


def _own_batch(nets: Sequence[_Net]) -> tuple[int]:
    """Return the first batch size that a net has fixed; 1 if there is none."""
    fixed = (net.runner.input_shape[0] for net in nets)
    return (next((size for size in fixed if size is not None), 1),)


def _check_shape(net: _Net, batches: Sequence[int]) -> None:
    name, runner = net.name, net.runner
    fixed, *image = runner.input_shape
    if not all(image):
        raise ConfigError(
            f"{name}: input {runner.input_name} is {list(runner.input_shape)}, expected a fixed "
            f"image size; export it with {option('input_size')}"
        )
    if fixed is not None and any(batch != fixed for batch in batches):
        raise ConfigError(
            f"{name}: takes batch {fixed} only, asked for {', '.join(map(str, batches))}; "
            f"give {option('batches', (fixed,))}, or export it with a free batch size"
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
        file=net.name,
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
        target=net.target,
    )
