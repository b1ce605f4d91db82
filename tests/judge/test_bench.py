import gc
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import reptrt
from reptrt.core.errors import ConfigError, DataError
from reptrt.core.intervals import RESAMPLES, percentile_interval, resampled_percentiles
from reptrt.judge import bench as bench_module
from reptrt.judge.bench import MIN_ROUNDS, bench
from reptrt.judge.bench_report import BenchReport
from reptrt.judge.options import BenchOptions
from reptrt.pipeline import CalibrateOptions, calibrate
from reptrt.trt.machine import Conditions, GpuState, cpu_name
from tests.support.learned_nets import rep_net, write_images, write_net
from tests.support.tiny_nets import classifier, make_model

QUICK = {"min_seconds": 0.0, "warmup_seconds": 0.0, "threads": 1}


@pytest.fixture
def net(tmp_path: Path) -> Path:
    onnx.save(classifier(), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def test_a_net_that_was_made_for_another_runtime_is_named(tmp_path: Path) -> None:
    net, data = write_net(tmp_path / "m.onnx", rep_net(1)), write_images(tmp_path / "d.npz", 16)
    for target in ("tensorrt", "onnxruntime"):
        options = CalibrateOptions(images=16, target=target)
        calibrate(net, data, tmp_path / f"{target}.onnx", options)
    files = [net, tmp_path / "tensorrt.onnx", tmp_path / "onnxruntime.onnx"]
    in_memory = reptrt.calibrate(net, data, images=16)
    report = bench([*files, in_memory], BenchOptions(**QUICK))
    made_for = [row.target for row in report.results]
    assert made_for == [None, "tensorrt", "onnxruntime", "tensorrt"]
    here = "and timed in onnxruntime on cpu"
    names = [str(files[1]), report.results[3].file]
    assert report.warnings == tuple(f"{n} was made for tensorrt {here}" for n in names)
    assert "made for tensorrt" in " ".join(str(report).split())
    assert bench([net], BenchOptions(**QUICK)).warnings == ()


# --- a clock that only runs as the fake nets say -------------------------------------------------


class Clock:
    """Stands in for the time module; counts nanoseconds."""

    def __init__(self) -> None:
        self.now_ns = 0

    def perf_counter(self) -> float:
        return self.now_ns / 1e9

    def perf_counter_ns(self) -> int:
        return self.now_ns


class FakeRunner:
    """Takes the given milliseconds, one after the other, over and over."""

    name, device, threads = "fake", "cpu", None
    input_name, input_shape, output_names = "x", [None, 3, 8, 8], ["y"]

    def __init__(self, name: str, times_ms: list[float], clock: Clock, log: list[str]) -> None:
        self.path, self.times = name, itertools.cycle(times_ms)
        self.clock, self.log = clock, log

    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        self.log.append(self.path)
        self.clock.now_ns += round(next(self.times) * 1e6)
        return {"y": batch}

    def __enter__(self) -> "FakeRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self.log.append(f"close {self.path}")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Return a function: times of each file in ms -> the log that the bench will write."""

    def install(times_ms: dict[str, list[float]]) -> list[str]:
        clock, log = Clock(), []
        monkeypatch.setattr(bench_module, "time", clock)
        monkeypatch.setattr(
            bench_module,
            "open_runner",
            lambda path, **_: FakeRunner(path.name, times_ms[path.name], clock, log),
        )
        return log

    return install


def run_fake(names: str, baseline: str | None = None, **options: object) -> BenchReport:
    base = None if baseline is None else Path(baseline)
    return bench([Path(name) for name in names], BenchOptions(baseline=base, **options))  # type: ignore


def test_statistics_of_known_times(fake) -> None:  # type: ignore[no-untyped-def]
    a = [float(t) for t in range(1, 101)]
    # the warm-up takes the first value, so 101 values keep rounds and values in step
    fake({"a": [7.0, *a], "b": [9.0, *(2.5 * t for t in a)]})
    report = run_fake("ab", "a", batches=(8,), warmup_seconds=0, min_seconds=17.67 / 2)
    first, second = report.results
    assert first.rounds == second.rounds == 100
    assert first.median_ms == pytest.approx(50.5)
    assert first.p90_ms == pytest.approx(np.percentile(a, 90))
    assert first.p95_ms == pytest.approx(np.percentile(a, 95))
    assert first.p99_ms == pytest.approx(np.percentile(a, 99))
    assert first.throughput_ips == pytest.approx(8 / 50.5e-3)
    assert (first.ratio, first.ratio_low, first.ratio_high) == (1, 1, 1)
    assert second.ratio == pytest.approx(2.5)
    # +-1.96 standard deviations of the median of a uniform 1..100, n = 100: about 9.8
    assert first.median_low_ms == pytest.approx(50.5 - 9.8, abs=2)
    assert first.median_high_ms == pytest.approx(50.5 + 9.8, abs=2)


def test_the_ratio_pairs_times_of_the_same_round(fake) -> None:  # type: ignore[no-untyped-def]
    drift = [1.0, 10.0, 2.0, 50.0, 3.0]  # hits both files in the same round
    fake({"a": drift, "b": [1.1 * t for t in drift]})
    report = run_fake("ab", "a", warmup_seconds=0, min_seconds=1)
    result = report.results[1]
    assert result.ratio == pytest.approx(1.1)
    assert result.ratio_low == pytest.approx(1.1)
    assert result.ratio_high == pytest.approx(1.1)


def test_every_round_runs_every_file_once_in_a_new_order(fake) -> None:  # type: ignore
    log = fake({name: [1.0] for name in "abc"})
    report = run_fake("abc", batches=(1,), warmup_seconds=0.0045, min_seconds=0.1995, seed=3)
    warm, rest = log[:15], log[15:-3]
    assert Counter(warm) == {"a": 5, "b": 5, "c": 5}
    rounds = [tuple(rest[i : i + 3]) for i in range(0, len(rest), 3)]
    assert len(rounds) == 200
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) == 6  # all orders occur
    assert log[-3:] == ["close c", "close b", "close a"]
    assert {result.rounds for result in report.results} == {200}


def test_the_seed_fixes_the_order(fake) -> None:  # type: ignore[no-untyped-def]
    logs = []
    for seed in (0, 0, 1):
        logs.append(fake({name: [1.0] for name in "abc"}))
        run_fake("abc", warmup_seconds=0, min_seconds=0.05, seed=seed)
    assert logs[0] == logs[1] != logs[2]


def test_slow_files_still_get_enough_rounds(fake) -> None:  # type: ignore[no-untyped-def]
    fake({"a": [60_000.0]})
    assert run_fake("a", min_seconds=1, warmup_seconds=0).results[0].rounds == MIN_ROUNDS


def test_results_come_by_batch_then_by_file(fake) -> None:  # type: ignore[no-untyped-def]
    fake({name: [1.0] for name in "abc"})
    report = run_fake("ab", "c", batches=(1, 8), min_seconds=0, warmup_seconds=0)
    rows = [(result.batch, result.file) for result in report.results]
    assert rows == [(1, "c"), (1, "a"), (1, "b"), (8, "c"), (8, "a"), (8, "b")]
    assert report.baseline == "c"
    assert report.onnxruntime is None


# --- the interval ------------------------------------------------------------------------------


@pytest.mark.parametrize("percent", [0, 10, 50, 90, 100])
@pytest.mark.parametrize("samples", [(1.0, 2.0, 5.0), (1.0, 2.0, 5.0, 11.0)], ids=["odd", "even"])
def test_resampled_percentiles_follow_the_exact_distribution(
    samples: tuple[float, ...], percent: float
) -> None:
    every = np.array(list(itertools.product(samples, repeat=len(samples))))
    values = np.percentile(every, percent, axis=1).round(9).tolist()
    exact = {value: count / len(every) for value, count in Counter(values).items()}
    rng = np.random.default_rng(0)
    found = resampled_percentiles(np.array(samples)[::-1], percent, rng).round(9)
    drawn = Counter(found.tolist())
    assert set(drawn) <= set(exact)
    for value, probability in exact.items():
        error = 5 * np.sqrt(probability * (1 - probability) / RESAMPLES)
        assert drawn[value] / RESAMPLES == pytest.approx(probability, abs=error)


@pytest.mark.parametrize("percent", [50, 90])
def test_the_interval_is_the_bootstrap_interval(percent: float) -> None:
    rng = np.random.default_rng(1)
    samples = rng.lognormal(0, 0.5, 200)
    found = percentile_interval(samples, percent, rng)
    values = np.percentile(rng.choice(samples, (10_000, 200)), percent, axis=1)
    low, high = np.percentile(values, (2.5, 97.5))
    assert found.value == np.percentile(samples, percent)
    # the error of a 2.5 % quantile of 10,000 draws is 0.7 % of the width; twice, and 5 of them
    assert found.low == pytest.approx(low, abs=0.05 * (high - low))
    assert found.high == pytest.approx(high, abs=0.05 * (high - low))


@pytest.mark.parametrize("percent", [50, 99])
def test_one_sample_has_no_width(percent: float) -> None:
    found = percentile_interval(np.array([3.0]), percent, np.random.default_rng(0))
    assert (found.value, found.low, found.high) == (3, 3, 3)


# --- clocks, load, copies ------------------------------------------------------------------------


def test_conditions_are_read_when_warm_and_at_the_end(fake, monkeypatch) -> None:  # type: ignore
    log = fake({"a": [1.0]})
    moments = []

    def read(*, gpu: bool) -> Conditions:
        moments.append((len(log), gpu))
        return Conditions(3000.0 - 1000 * len(moments), None, GpuState(None, None, None, None, ()))

    monkeypatch.setattr(bench_module, "read_conditions", read)
    report = run_fake("a", batches=(1, 8), warmup_seconds=0.0025, min_seconds=0.0195)
    assert moments == [(3, False), (46, False)]  # 3 to warm up and 20 rounds, for each batch size
    remark = "the CPU clock changed from 2000 to 1000 MHz"
    assert report.remarks == (remark,)
    content = json.loads(json.dumps(report.to_dict()))
    assert content["before"]["cpu_mhz"] == 2000
    assert content["after"]["gpu"]["held_back_by"] == []
    assert content["remarks"] == [remark]
    assert remark in str(report.to_table().caption)


class GpuRunner(FakeRunner):
    """Takes 1 ms, of which the copies take 0.6."""

    device = "Fake GPU"

    def time_ms(self, batch: np.ndarray, repeats: int, *, host_copies: bool = False) -> np.ndarray:
        self.log.append(f"{self.path} by events")
        self.clock.now_ns += 10**6
        return np.full(repeats, 1.0 if host_copies else 0.4)


@pytest.mark.parametrize("host_copies", [True, False])
def test_copies_are_left_out_where_asked_for_and_possible(
    fake, monkeypatch: pytest.MonkeyPatch, host_copies: bool
) -> None:  # type: ignore[no-untyped-def]
    log = fake({"gpu": [1.0], "cpu": [2.0]})
    clock = bench_module.time
    open_cpu = bench_module.open_runner
    monkeypatch.setattr(
        bench_module,
        "open_runner",
        lambda path, **_: (
            GpuRunner("gpu", [1.0], clock, log) if path.name == "gpu" else open_cpu(path)
        ),
    )
    report = bench(
        [Path("cpu"), Path("gpu")],
        BenchOptions(
            host_copies=host_copies,
            baseline=Path("cpu"),
            warmup_seconds=0,
            min_seconds=0.05,
        ),
    )
    cpu, gpu = report.results
    assert (cpu.median_ms, cpu.host_copies) == (2.0, None)
    assert (gpu.median_ms, gpu.host_copies) == ((1.0, True) if host_copies else (0.4, False))
    assert gpu.ratio == pytest.approx(0.5 if host_copies else 0.2)
    assert ("gpu by events" in log) != host_copies


# --- real files --------------------------------------------------------------------------------


def test_real_files_give_the_whole_report(net: Path, tmp_path: Path) -> None:
    onnx.save(classifier(seed=1), tmp_path / "other.onnx")
    report = bench(
        [net, tmp_path / "other.onnx"], BenchOptions(batches=(1, 4), baseline=net, **QUICK)
    )
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["cpu"] == cpu_name() != ""
    assert content["onnxruntime"].count(".") >= 2
    assert len(content["results"]) == 4
    for row in content["results"]:
        assert (row["runner"], row["device"], row["threads"]) == ("onnxruntime", "cpu", 1)
        assert 0 < row["median_low_ms"] <= row["median_ms"] <= row["median_high_ms"]
        assert row["median_ms"] <= row["p90_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert row["throughput_ips"] == pytest.approx(1000 * row["batch"] / row["median_ms"])
        for name in ("median", "p90", "p95", "p99", "ratio"):
            unit = "" if name == "ratio" else "_ms"
            bounds = [row[f"{name}{part}{unit}"] for part in ("_low", "", "_high")]
            assert bounds == sorted(bounds)
        assert row["host_copies"] is None
        assert row["rounds"] >= MIN_ROUNDS
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]


def test_a_fixed_batch_takes_no_other(net: Path, tmp_path: Path) -> None:
    onnx.save(classifier(batch=4), tmp_path / "fixed.onnx")
    report = bench([net, tmp_path / "fixed.onnx"], BenchOptions(batches=(4,), **QUICK))
    assert [result.batch for result in report.results] == [4, 4]
    with pytest.raises(
        ConfigError, match=r"fixed.onnx: takes batch 4 only, asked for 1, 4; give batches=\(4,\)"
    ):
        bench([net, tmp_path / "fixed.onnx"], BenchOptions(batches=(1, 4), **QUICK))


def test_the_fixed_batch_of_a_file_is_the_default(net: Path, tmp_path: Path) -> None:
    onnx.save(classifier(batch=4), tmp_path / "fixed.onnx")
    report = bench([net, tmp_path / "fixed.onnx"], BenchOptions(**QUICK))
    assert [result.batch for result in report.results] == [4, 4]
    (alone,) = bench([net], BenchOptions(**QUICK)).results
    assert alone.batch == 1


def test_a_free_image_size_cannot_be_timed(tmp_path: Path) -> None:
    model = classifier()
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"size{axis}"
    onnx.save(model, tmp_path / "free.onnx")
    with pytest.raises(ConfigError, match=r"\[None, 3, None, None\], expected a fixed image size"):
        bench([tmp_path / "free.onnx"], BenchOptions(**QUICK))


@pytest.mark.parametrize("batches", [(), (0,), (1, -2)])
def test_batch_sizes_must_be_positive(net: Path, batches: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="expected positive batch sizes"):
        bench([net], BenchOptions(batches=batches, **QUICK))


def test_a_file_that_fails_is_an_error_not_a_time(net: Path, tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["logits"], name="one image only")]
    shape = numpy_helper.from_array(np.array([1, 192]), "shape")
    onnx.save(make_model(nodes, [shape], ["N", 3, 8, 8], [1, 192], None), tmp_path / "bad.onnx")
    with pytest.raises(DataError, match=r"bad.onnx: onnxruntime failed on a float32 batch \(2, 3"):
        bench([net, tmp_path / "bad.onnx"], BenchOptions(batches=(2,), **QUICK))
    assert gc.isenabled()


def test_the_table_has_ratios_only_with_a_baseline(fake) -> None:  # type: ignore[no-untyped-def]
    fake({"a": [2.0], "b": [3.0]})
    with_ratio = run_fake("ab", "a", min_seconds=0, warmup_seconds=0).to_table()
    without = run_fake("ab", min_seconds=0, warmup_seconds=0).to_table()
    assert [column.header for column in with_ratio.columns][-2:] == ["ratio", "95 %"]
    assert len(with_ratio.columns) == len(without.columns) + 2
    assert list(with_ratio.columns[-2].cells) == ["1.000", "1.500"]
