import gc
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from reptrt import bench as bench_module
from reptrt.bench import (
    MIN_ROUNDS,
    RESAMPLES,
    BenchReport,
    bench,
    cpu_name,
    median_interval,
    resampled_medians,
)
from reptrt.errors import ConfigError, DataError
from tests.tiny_nets import classifier, make_model

QUICK = {"min_seconds": 0.0, "warmup_seconds": 0.0, "threads": 1}


@pytest.fixture
def net(tmp_path: Path) -> Path:
    onnx.save(classifier(), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


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
    return bench([Path(name) for name in names], baseline=base, **options)  # type: ignore


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


@pytest.mark.parametrize("samples", [(1.0, 2.0, 5.0), (1.0, 2.0, 5.0, 11.0)], ids=["odd", "even"])
def test_resampled_medians_follow_the_exact_distribution(samples: tuple[float, ...]) -> None:
    every = [np.median(draw) for draw in itertools.product(samples, repeat=len(samples))]
    exact = {value: count / len(every) for value, count in Counter(every).items()}
    drawn = Counter(resampled_medians(np.array(samples)[::-1], np.random.default_rng(0)).tolist())
    assert set(drawn) <= set(exact)
    for value, probability in exact.items():
        error = 5 * np.sqrt(probability * (1 - probability) / RESAMPLES)
        assert drawn[value] / RESAMPLES == pytest.approx(probability, abs=error)


def test_the_interval_is_the_bootstrap_interval() -> None:
    rng = np.random.default_rng(1)
    samples = rng.lognormal(0, 0.5, 200)
    found = median_interval(samples, rng)
    medians = np.median(rng.choice(samples, (10_000, 200)), axis=1)
    low, high = np.percentile(medians, (2.5, 97.5))
    assert found.median == np.median(samples)
    # the error of a 2.5 % quantile of 10,000 draws is 0.7 % of the width; twice, and 5 of them
    assert found.low == pytest.approx(low, abs=0.05 * (high - low))
    assert found.high == pytest.approx(high, abs=0.05 * (high - low))


def test_one_sample_has_no_width() -> None:
    found = median_interval(np.array([3.0]), np.random.default_rng(0))
    assert (found.median, found.low, found.high) == (3, 3, 3)


# --- real files --------------------------------------------------------------------------------


def test_real_files_give_the_whole_report(net: Path, tmp_path: Path) -> None:
    onnx.save(classifier(seed=1), tmp_path / "other.onnx")
    report = bench([net, tmp_path / "other.onnx"], batches=(1, 4), baseline=net, **QUICK)
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert content["cpu"] == cpu_name() != ""
    assert content["onnxruntime"].count(".") >= 2
    assert len(content["results"]) == 4
    for row in content["results"]:
        assert (row["runner"], row["device"], row["threads"]) == ("onnxruntime", "cpu", 1)
        assert 0 < row["median_low_ms"] <= row["median_ms"] <= row["median_high_ms"]
        assert row["median_ms"] <= row["p90_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert row["throughput_ips"] == pytest.approx(1000 * row["batch"] / row["median_ms"])
        assert row["rounds"] >= MIN_ROUNDS
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]


def test_a_fixed_batch_takes_no_other(net: Path, tmp_path: Path) -> None:
    onnx.save(classifier(batch=4), tmp_path / "fixed.onnx")
    report = bench([net, tmp_path / "fixed.onnx"], batches=(4,), **QUICK)
    assert [result.batch for result in report.results] == [4, 4]
    with pytest.raises(
        ConfigError, match=r"fixed.onnx: takes batch 4 only, asked for 1, 4; use --b"
    ):
        bench([net, tmp_path / "fixed.onnx"], batches=(1, 4), **QUICK)


def test_a_free_image_size_cannot_be_timed(tmp_path: Path) -> None:
    model = classifier()
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"size{axis}"
    onnx.save(model, tmp_path / "free.onnx")
    with pytest.raises(ConfigError, match=r"\[None, 3, None, None\], expected a fixed image size"):
        bench([tmp_path / "free.onnx"], **QUICK)


@pytest.mark.parametrize("batches", [(), (0,), (1, -2)])
def test_batch_sizes_must_be_positive(net: Path, batches: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="expected positive batch sizes"):
        bench([net], batches=batches, **QUICK)


def test_a_file_that_fails_is_an_error_not_a_time(net: Path, tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["logits"], name="one image only")]
    shape = numpy_helper.from_array(np.array([1, 192]), "shape")
    onnx.save(make_model(nodes, [shape], ["N", 3, 8, 8], [1, 192], None), tmp_path / "bad.onnx")
    with pytest.raises(DataError, match=r"bad.onnx: onnxruntime failed on a float32 batch \(2, 3"):
        bench([net, tmp_path / "bad.onnx"], batches=(2,), **QUICK)
    assert gc.isenabled()


def test_the_table_has_ratios_only_with_a_baseline(fake) -> None:  # type: ignore[no-untyped-def]
    fake({"a": [2.0], "b": [3.0]})
    with_ratio = run_fake("ab", "a", min_seconds=0, warmup_seconds=0).to_table()
    without = run_fake("ab", min_seconds=0, warmup_seconds=0).to_table()
    assert [column.header for column in with_ratio.columns][-2:] == ["ratio", "95 %"]
    assert len(with_ratio.columns) == len(without.columns) + 2
    assert list(with_ratio.columns[-2].cells) == ["1.000", "1.500"]
