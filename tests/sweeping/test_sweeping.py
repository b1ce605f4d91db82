"""Sweeps of a small net in this process, and what they keep."""

import hashlib
import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import reptrt as package
from reptrt.core.artifacts import read_sidecar
from reptrt.core.errors import ConfigError, MissingDependencyError
from reptrt.execute.runner import OrtRunner
from reptrt.sweeping import work
from reptrt.sweeping.options import SweepOptions
from reptrt.sweeping.reading import read_sheet
from reptrt.sweeping.record import Swept
from reptrt.sweeping.sweeping import sweep
from tests.support.helpers import ort_run
from tests.support.small_run import refused, reptrt
from tests.sweeping.sheets import FILE, write_inputs, write_sheet

pytestmark = pytest.mark.slow

HERE = SweepOptions(workers=0)
BAD = """
[nets.bad]
source = "bad.py:make"
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def swept(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    return sweep(read_sheet(file), tmp_path_factory.mktemp("swept"), HERE)


def test_every_trial_is_a_row_with_its_file(swept: Swept, file: Path) -> None:
    assert [row.name for row in swept.rows] == [
        *("made/tensorrt/plain", "made/tensorrt/fast"),
        *("made/onnxruntime/plain", "made/onnxruntime/fast", "given/tensorrt/fast"),
    ]
    assert {row.state for row in swept.rows} == {"finished"}
    assert swept.is_complete
    data = np.load(file.parent / "eval.npz")
    x = data["x"].astype(np.float32) / 255
    (expected,) = ort_run(onnx.load(file.parent / "given.onnx"), {"input": x}).values()
    for row in swept.rows:
        path = Path(swept.store) / str(row.file)
        sidecar = read_sidecar(path)
        assert sidecar is not None
        assert sidecar.sha256 == row.sha256
        found = next(iter(OrtRunner(path).run(x).values())).astype(np.float64)
        noise = 10 * np.log10(np.square(expected).sum() / np.square(expected - found).sum())
        assert row.sqnr_db == pytest.approx(noise, abs=0.02)
        assert row.change == pytest.approx(100 * ((found.argmax(1) == data["y"]).mean() - 1))
        assert row.bytes == path.stat().st_size
        assert (row.lint is None) == (row.target == "onnxruntime")
    by_name = {row.name: row for row in swept.rows}
    plain, fast = (by_name[f"made/tensorrt/{recipe}"] for recipe in ("plain", "fast"))
    assert (fast.sqnr_db or 0) > (plain.sqnr_db or 0) + 6


def test_artifacts_are_named_by_what_is_in_them(swept: Swept) -> None:
    folders = list((Path(swept.store) / "artifacts").iterdir())
    for folder in folders:
        lines = [
            f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.name}\n"
            for path in sorted(folder.iterdir())
        ]
        assert folder.name == hashlib.sha256("".join(lines).encode()).hexdigest()
    named = {str(row.file).split("/")[1] for row in swept.rows}
    floats = {str(net["file"]).split("/")[1] for net in swept.nets.values()}
    assert {folder.name for folder in folders} == named | floats
    assert list((Path(swept.store) / "work").iterdir()) == []


def test_finished_trials_are_kept_and_the_table_has_the_same_bytes(
    swept: Swept, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = (swept.folder / "sweep.json").read_bytes()
    for name in ("export", "evaluate", "Trials"):
        monkeypatch.delattr(work, name)
    again = sweep(read_sheet(file), swept.folder, HERE)
    assert again.kept == len(again.rows)
    assert (swept.folder / "sweep.json").read_bytes() == record
    assert [again.cells(row) for row in again.rows] == [swept.cells(row) for row in swept.rows]
    assert again.titles == swept.titles


def test_another_eval_calibrates_nothing_again(
    swept: Swept, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(work, "Trials")
    options = SweepOptions(workers=0, store=swept.store)
    fewer = write_sheet(file.parent, FILE + "[eval]\nlimit = 50\n")
    again = sweep(read_sheet(fewer), tmp_path, options)
    write_sheet(file.parent, FILE)
    assert again.kept == 0
    for row, before in zip(again.rows, swept.rows, strict=True):
        assert row.sha256 == before.sha256
        assert row.judged is not None
        assert row.judged["int8"]["images"] == 50


def test_damaged_and_lost_files_are_made_again_with_the_same_bytes(
    swept: Swept, file: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(swept.store, store)
    damaged, lost = (store / str(swept.rows[i].file) for i in (0, 1))
    damaged.write_bytes(b"something else")
    lost.unlink()
    again = sweep(read_sheet(file), tmp_path / "out", SweepOptions(workers=0, store=str(store)))
    assert again.kept == len(again.rows) - 3  # two rows have the second file
    for row in swept.rows:
        expected = (Path(swept.store) / str(row.file)).read_bytes()
        assert (store / str(row.file)).read_bytes() == expected


def test_a_failure_is_a_row_and_the_others_go_on(file: Path, tmp_path: Path) -> None:
    (file.parent / "bad.py").write_text("def make():\n    raise OSError('no\\nnet')\n")
    path = write_sheet(file.parent, FILE + BAD)
    result = reptrt("sweep", path, "-o", tmp_path, "--workers", 0, "--json", tmp_path / "r.json")
    assert result.exit_code == 1
    content = json.loads((tmp_path / "r.json").read_text())
    states = {row["name"]: row["state"] for row in content["rows"]}
    assert states["made/tensorrt/fast"] == "finished"
    for name in (name for name in states if name.startswith("bad/")):
        assert re.fullmatch(r"failed: export: .*the factory raised OSError: no net", states[name])
    assert "4 failed" in result.stdout
    page = (tmp_path / "report.html").read_text()
    assert "Failures" in page
    (file.parent / "bad.py").write_text((file.parent / "net_of_a_small_run.py").read_text())
    mended = sweep(read_sheet(path), tmp_path, HERE)
    assert not mended.failed
    assert mended.kept == 5
    write_sheet(file.parent, FILE)


def test_trials_that_are_equal_are_done_once(file: Path, tmp_path: Path) -> None:
    text = FILE.partition("[nets.given]")[0] + "[variants.a]\nseed = 0\n[variants.b]\n"
    path = write_sheet(file.parent, text)
    twins = sweep(read_sheet(path), tmp_path, HERE)
    write_sheet(file.parent, FILE)
    assert len(twins.rows) == 8
    assert len({row.sha256 for row in twins.rows}) <= 4
    records = (Path(twins.store) / "records").glob("*.calibrate.json")
    assert len(list(records)) == 4


def test_a_dry_run_says_what_there_is_to_do(file: Path, tmp_path: Path) -> None:
    result = reptrt("-v", "sweep", file, "-o", tmp_path, "--dry-run")
    assert result.exit_code == 0
    assert "sweep: 5 trials of 2 nets, 0 are finished already; 5 to do" in result.stderr
    assert result.stdout.count("to do") == 5
    assert not (tmp_path / "sweep.json").exists()
    assert not (tmp_path / "store" / "records").exists()


def test_the_page_loads_nothing_and_shows_every_trial(swept: Swept) -> None:
    page = (swept.folder / "report.html").read_text()
    assert not re.search(r"(src|href)=\"?(http|//|file)", page)
    assert page.count("<circle") == len(swept.rows)
    assert all(row.name in page for row in swept.rows)


def test_a_mapping_is_a_sheet_too(file: Path, swept: Swept, tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "data": str(file.parent / "calib.npz"),
        "eval_data": str(file.parent / "eval.npz"),
        "calibrate": {"images": 24},
        "nets": {"given": {"source": str(file.parent / "given.onnx")}},
        "export": {"input_size": (1, 8, 8)},
    }
    one = package.sweep(content, tmp_path, workers=0, store=swept.store)
    assert (one.kept, len(one.rows)) == (1, 1)
    with pytest.raises(ConfigError, match="workers: got -1"):
        package.sweep(content, tmp_path, workers=-1)


def test_a_store_of_another_format_is_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "store.json").write_text('{"format": 99}')
    line = refused("sweep", file, "-o", tmp_path)
    assert re.search(r"store: a store of format 99, expected 1; give another --store", line)


ENGINES = """
[engine]
shapes = "1:2:4"
placement = { cpus = 1, gpus = 0 }
"""


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)
def test_engines_are_built_from_files_for_tensorrt_and_kept(
    file: Path, swept: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_sheet(file.parent, FILE + ENGINES)
    sheet, options = read_sheet(path), SweepOptions(workers=0, store=swept.store)
    write_sheet(file.parent, FILE)
    built = sweep(sheet, tmp_path, options)
    assert built.kept == len(built.rows)
    for row in built.rows:
        assert list(row.engines) == (["any GPU"] if row.target == "tensorrt" else [])
        for made in row.engines.values():
            assert made["state"] == "finished"
            sidecar = read_sidecar(Path(built.store) / made["file"])
            assert sidecar is not None
            assert sidecar.sha256 == made["sha256"]
            assert row.sha256 in sidecar.parents.values()
    monkeypatch.delattr(work, "build_engine")
    again = sweep(sheet, tmp_path, options)
    assert again.to_dict() == built.to_dict()
    assert "Engines" in (tmp_path / "report.html").read_text()


def test_an_engine_that_cannot_be_built_is_said_and_the_trial_stays(
    file: Path, swept: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MissingDependencyError("no TensorRT is installed")

    monkeypatch.setattr(work, "build_engine", refuse)
    path = write_sheet(file.parent, FILE + ENGINES.replace("1:2:4", "1:1:1"))
    sheet = read_sheet(path)
    write_sheet(file.parent, FILE)
    tried = sweep(sheet, tmp_path, SweepOptions(workers=0, store=swept.store))
    assert {row.state for row in tried.rows} == {"finished"}
    assert not tried.is_complete
    assert "engine for any GPU: failed: no TensorRT is installed" in str(tried)
