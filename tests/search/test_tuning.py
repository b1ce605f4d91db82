"""The search on a small net; its labels are the classes that the float net finds."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from reptrt.core.artifacts import read_sidecar
from reptrt.core.errors import ConfigError, DataError
from reptrt.execute.runner import OrtRunner
from reptrt.search import trials
from reptrt.search.judging import Judgement
from reptrt.search.options import TuneOptions
from reptrt.search.record import Tuned
from reptrt.search.tuning import tune
from reptrt.search.workbench import Workbench
from tests.support.helpers import ort_run
from tests.support.small_run import SIZE, refused, reptrt, write_data, write_factory

pytestmark = pytest.mark.slow

FEW = TuneOptions(images=24, overheads=(0.0, 0.1), float_layers=(1,), threads=1, bench_seconds=0.01)
SQNR = replace(FEW, metric="sqnr", min_sqnr=0.0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A float net, calibration images, and other images with labels."""
    folder = tmp_path_factory.mktemp("inputs")
    net, data = folder / "net.onnx", write_data(folder / "calib.npz")
    assert reptrt("export", write_factory(folder), *SIZE, "-o", net).exit_code == 0
    x = np.random.default_rng(1).integers(0, 256, (160, 1, 8, 8), dtype=np.uint8)
    (scores,) = ort_run(onnx.load(net), {"input": x.astype(np.float32) / 255}).values()
    np.savez(folder / "eval.npz", x=x, y=scores.argmax(axis=1))
    return net, data, folder / "eval.npz"


@pytest.fixture(scope="module")
def searched(
    inputs: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tuned, TuneOptions]:
    """A search whose bound lies between plain INT8 and the best."""
    free = tune(*inputs, tmp_path_factory.mktemp("plain"), SQNR)
    assert free.best.judged is not None
    options = replace(SQNR, min_sqnr=free.best.judged.value + 2)
    return tune(*inputs, tmp_path_factory.mktemp("search"), options), options


def test_plain_is_taken_where_it_is_enough(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    tuned = tune(*inputs, tmp_path, replace(FEW, max_drop=50.0))
    assert (tuned.chosen, tuned.met, tuned.looks) == ("plain", True, 1)
    assert [row.name for row in tuned.rows] == ["plain"]
    assert "plain INT8 is enough" in str(tuned)
    best = tuned.best
    assert best.judged is not None
    assert best.confirmed is not None
    assert (best.judged.images, best.confirmed.images) == (80, 80)
    assert best.judged.reference == 1.0


def test_the_choice_meets_the_bound_on_images_that_were_not_tuned_on(
    inputs: tuple[Path, Path, Path], searched: tuple[Tuned, TuneOptions]
) -> None:
    tuned, options = searched
    assert tuned.met
    assert tuned.chosen != "plain"
    assert tuned.best.confirmed is not None
    images = np.load(inputs[2])["x"].astype(np.float32) / 255
    taken = np.random.default_rng([0, 1]).permutation(160)[80:]
    before, after = (
        next(iter(OrtRunner(path).run(images[np.sort(taken)]).values())).astype(np.float64)
        for path in (inputs[0], tuned.path)
    )
    sqnr = 10 * np.log10(np.square(before).sum() / np.square(before - after).sum())
    assert tuned.best.confirmed.value == pytest.approx(sqnr, abs=0.01)
    assert sqnr >= (options.min_sqnr or 0)


def test_the_choice_is_the_cheapest_that_meets_the_bound(
    searched: tuple[Tuned, TuneOptions],
) -> None:
    tuned, _ = searched
    meet = [
        row.cost.ratio
        for row in tuned.rows
        if row.is_final and row.cost and row.judged and row.judged.loss <= tuned.limit
    ]
    assert tuned.best.cost is not None
    assert tuned.best.cost.ratio <= 1.03 * min(meet)
    assert any(row.on_front for row in tuned.rows)


def test_every_trial_has_its_record_and_sidecar(searched: tuple[Tuned, TuneOptions]) -> None:
    tuned, _ = searched
    for row in tuned.rows:
        folder = tuned.folder / "trials" / row.name
        record = json.loads((folder / "trial.json").read_text())
        sidecar = read_sidecar(folder / "int8.onnx")
        assert sidecar is not None
        assert record["sha256"] == sidecar.sha256 == row.sha256
    chosen = read_sidecar(tuned.path)
    assert chosen is not None
    assert chosen.sha256 == tuned.best.sha256
    content = json.loads((tuned.folder / "tune.json").read_text())
    assert content["result"]["chosen"] == tuned.chosen


def test_the_page_loads_nothing_and_shows_the_files_of_the_last_rung(
    searched: tuple[Tuned, TuneOptions],
) -> None:
    tuned, _ = searched
    page = (tuned.folder / "report.html").read_text()
    assert not re.search(r"(src|href)=\"?(http|//|file)", page)
    shown = sum(row.cost is not None for row in tuned.rows)
    assert page.count("<circle") == shown > 1
    assert all(row.name in page for row in tuned.rows)


def test_a_finished_search_is_kept(
    inputs: tuple[Path, Path, Path],
    searched: tuple[Tuned, TuneOptions],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tuned, options = searched
    monkeypatch.delattr(trials, "calibrate")
    monkeypatch.delattr("reptrt.search.workbench.judge")
    again = tune(*inputs, tuned.folder, options)
    assert {row.state for row in again.rows} == {"kept"}
    assert (again.chosen, again.best.judged) == (tuned.chosen, tuned.best.judged)


def test_a_stopped_search_ends_with_the_same_bytes_and_does_nothing_twice(
    inputs: tuple[Path, Path, Path],
    searched: tuple[Tuned, TuneOptions],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tuned, options = searched
    done: list[Path] = []
    original = trials.calibrate

    def calibrate(model: Path, data: Path, output: Path, given: object) -> object:
        if len(done) == 3:
            done.append(output)
            raise KeyboardInterrupt
        done.append(output)
        return original(model, data, output, given)  # type: ignore[arg-type]

    monkeypatch.setattr(trials, "calibrate", calibrate)
    with pytest.raises(KeyboardInterrupt):
        tune(*inputs, tmp_path, options)
    again = tune(*inputs, tmp_path, options)
    assert len(done) == len(tuned.rows) + 1  # the one that was stopped
    assert again.path.read_bytes() == tuned.path.read_bytes()
    assert [row.sha256 for row in again.rows] == [row.sha256 for row in tuned.rows]


def test_what_nothing_meets_keeps_the_best_and_fails(
    inputs: tuple[Path, Path, Path], searched: tuple[Tuned, TuneOptions]
) -> None:
    tuned, _ = searched
    net, data, images = inputs
    result = reptrt(
        *("tune", net, "--data", data, "--eval-data", images, "--metric", "sqnr"),
        *("--min-sqnr", 150, "-n", 24, "--overheads", "0,0.1", "--float-layers", 1),
        *("--bench-seconds", 0.01, "--threads", 1, "-o", tuned.folder),
    )
    assert result.exit_code == 1
    assert "nothing meets the bound (SQNR >= 150 dB)" in result.stdout
    assert re.search(r"would meet a bound of \d+\.\d dB", result.stdout)
    made = json.loads((tuned.folder / "tune.json").read_text())["result"]
    final = [row for row in made["rows"] if row["is_final"]]
    best = max(final, key=lambda row: row["judged"]["value"])
    assert made["chosen"] == best["name"]
    assert not made["met"]
    sidecar = read_sidecar(tuned.folder / "best.onnx")
    assert sidecar is not None
    assert sidecar.sha256 == best["sha256"]


def test_a_choice_that_does_not_hold_on_unseen_images_is_replaced(
    inputs: tuple[Path, Path, Path],
    searched: tuple[Tuned, TuneOptions],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tuned, options = searched
    original = Workbench.confirm

    def confirm(bench: Workbench, name: str) -> Judgement:
        judged = original(bench, name)
        return replace(judged, loss=0.0) if name == tuned.chosen else judged

    monkeypatch.setattr(Workbench, "confirm", confirm)
    again = tune(*inputs, tuned.folder, options)
    assert again.chosen != tuned.chosen
    assert again.looks > 1


def test_what_does_not_fit_the_budget_is_left_out_and_named(
    inputs: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workbench, "expected", lambda bench, recipe: 1e6)
    tuned = tune(*inputs, tmp_path, replace(SQNR, min_sqnr=150.0, budget=1e5))
    assert [row.name for row in tuned.rows if row.sha256] == ["plain"]
    assert tuned.rows[-1].state.startswith("skipped: takes about 1000000 s")
    assert any("did not fit the budget" in hint for hint in tuned.hints)


def test_a_budget_for_no_trial_is_refused(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"budget: got 0.001 s, plain INT8 alone took .* give"):
        tune(*inputs, tmp_path, replace(SQNR, min_sqnr=150.0, budget=0.001))


def test_images_without_labels_are_refused(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    net, data, images = inputs
    bare = tmp_path / "bare.npy"
    np.save(bare, np.load(images)["x"])
    with pytest.raises(DataError, match=r"metric='top1' cannot be measured .* metric='agreement'"):
        tune(net, data, bare, tmp_path / "search", FEW)
    tuned = tune(net, data, bare, tmp_path / "search", replace(FEW, metric="agreement"))
    assert tuned.best.judged is not None


def test_missing_images_are_one_line(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    net, data, _ = inputs
    line = refused(
        *("tune", net, "--data", data, "--eval-data", tmp_path / "none", "-o", tmp_path / "s")
    )
    assert re.match(r"error: .*none: does not exist", line)


def test_latencies_are_measured_where_the_target_runs_here(
    inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    options = replace(FEW, target="onnxruntime", max_drop=100.0)
    tuned = tune(*inputs, tmp_path, options)
    assert tuned.best.cost is not None
    assert tuned.best.cost.median_ms is not None
    assert tuned.of_float is not None
    assert "in onnxruntime" in str(tuned)
