"""The demo as a newcomer runs it: the table, the files, the engine, and what may be missing."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from reptrt.core.artifacts import read_sidecar, sha256_of
from reptrt.core.errors import MissingDependencyError
from reptrt.demo import comparison, digits
from reptrt.demo.__main__ import main
from reptrt.pipeline import ExportOptions, Source, export

pytestmark = pytest.mark.slow

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
NAMES = ("float", "plain INT8", "reptrt INT8, no split", "reptrt INT8", "reptrt INT8 for CPUs")


class Run(NamedTuple):
    folder: Path
    stdout: str
    content: dict[str, Any]

    def rung(self, name: str) -> dict[str, Any]:
        return next(rung for rung in self.content["rows"] if rung["name"] == name)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    command = [sys.executable, "-m", "reptrt.demo", "-o", str(folder)]
    done = subprocess.run(
        [*command, "--json", str(folder / "table.json")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return Run(folder, done.stdout, json.loads((folder / "table.json").read_text()))


def test_the_table_has_every_rung_and_column(run: Run) -> None:
    _, header, *lines = run.stdout.splitlines()
    assert header.split("  ") != []
    for title in ("top-1", "agreement", "SQNR dB", "median ms", "ratio", "KiB"):
        assert title in header
    for line, name in zip(lines, NAMES, strict=False):
        assert re.match(rf"{name}\s+\d+\.\d\d %\s+\d+\.\d\d %\s+(-|\d+\.\d\d)\s+[\d.]+\s+", line), (
            line
        )
    assert "898 held-out images" in run.stdout


def test_the_net_is_accurate_and_int8_keeps_it_so(run: Run) -> None:
    assert tuple(rung["name"] for rung in run.content["rows"]) == NAMES
    assert run.rung("float")["top1"] > 0.98
    assert run.rung("float")["sqnr_db"] is None
    assert run.rung("reptrt INT8")["top1"] >= run.rung("float")["top1"] - 0.01


def test_plain_int8_shows_the_disease_and_the_recipe_is_better(run: Run) -> None:
    plain, free, ours, for_cpu = (run.rung(name)["sqnr_db"] for name in NAMES[1:])
    assert 15 < plain < 22  # what trained rep-nets have; a healthy net would be at 30 and more
    assert free > plain + 2
    assert min(ours, for_cpu) > free + 3


def test_int8_files_are_small_and_timed(run: Run) -> None:
    for rung in run.content["rows"]:
        assert rung["median_ms"] > 0
        assert rung["size_bytes"] == (run.folder / Path(rung["file"]).name).stat().st_size
    assert run.rung("float")["ratio"] == 1
    assert run.rung("reptrt INT8")["size_bytes"] < run.rung("float")["size_bytes"] / 2


def test_the_file_for_cpus_is_as_fast_as_plain_int8(run: Run) -> None:
    """The other one sums in float, which takes half as long again; timings may be disturbed."""
    assert run.rung("reptrt INT8 for CPUs")["ratio"] < 0.9 * run.rung("reptrt INT8")["ratio"]


def test_the_detector_follows(run: Run) -> None:
    table = run.stdout.partition("A YOLOv6 that finds digits in pictures:\n")[2]
    for row in run.content["detection"]["rows"]:
        percent = f"{100 * row['map']:.2f}"
        assert re.search(rf"^{row['name']} +{percent} ", table, re.MULTILINE), row["name"]
    assert "200 held-out pictures" in table
    assert re.search(r"^\S+detections\.png: boxes of the float net above", table, re.MULTILINE)
    assert (run.folder / "detections.png").is_file()


def test_the_ladder_of_the_last_file_follows(run: Run) -> None:
    rungs = run.content["ladder"]["rungs"]
    assert rungs[0]["name"] == "train-form"
    int8 = rungs[-2]
    assert int8["name"].startswith("INT8")
    assert int8["runs_in"] == "onnxruntime"
    assert int8["top1"] == run.rung("reptrt INT8")["top1"]
    sqnr = run.rung("reptrt INT8")["sqnr_db"]
    assert int8["from_first"]["sqnr_db"] == pytest.approx(sqnr, abs=1e-3)
    assert re.search(r"^INT8\S*.* onnxruntime +\d+\.\d\d % ", run.stdout, re.MULTILINE)
    assert re.search(r"^engine +tensorrt ", run.stdout, re.MULTILINE)


def test_calibration_sees_training_images_only(run: Run) -> None:
    for name in ("digits.int8.onnx", "digits.nosplit.onnx", "digits.plain.onnx", "digits.cpu.onnx"):
        sidecar = read_sidecar(run.folder / name)
        assert sidecar is not None
        assert set(sidecar.parents) == {"digits.onnx", "train.npz"}
        assert sidecar.parents["digits.onnx"] == sha256_of(run.folder / "digits.onnx")


@pytest.mark.skipif(not HAS_RTX, reason="tensorrt-rtx is not installed")
def test_a_real_engine_is_built(run: Run) -> None:
    engine = run.folder / "digits.engine"
    sidecar = read_sidecar(engine)  # checks the sha256
    assert sidecar is not None
    assert sidecar.parents["digits.int8.onnx"] == sha256_of(run.folder / "digits.int8.onnx")
    assert engine.stat().st_size == run.content["engine"]["size_bytes"] > 100_000
    assert len(run.content["engine"]["int8_layers"]) >= 12  # every convolution and the classifier
    assert re.search(r"engine \S+digits\.engine: tensorrt-rtx \S+, \d+ KiB, built in ", run.stdout)


def test_without_tensorrt_rtx_one_line_says_what_to_install(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    engine, reason = comparison.try_engine(run.folder / "digits.int8.onnx", tmp_path / "d.engine")
    assert engine is None
    assert re.search(r"pip install 'reptrt\[rtx\]'", reason or "")
    assert not list(tmp_path.iterdir())


def test_without_scikit_learn_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'reptrt\[demo\]'"):
        digits.load_digits()
    result = CliRunner().invoke(main, ["-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert re.fullmatch(r"error: .*reptrt\[demo\]'\n", result.stderr)
    assert not list((tmp_path / "out").iterdir())


def test_an_output_that_cannot_be_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(main, ["-o", str(tmp_path / "file" / "below")])
    assert result.exit_code == 1
    assert re.fullmatch(r"error: \S+below: cannot be created \(.*\)\n", result.stderr)


def test_the_parts_share_no_image() -> None:
    split = digits.load_digits()
    assert len(split.train.x) + len(split.held_out.x) == 1797
    assert split.train.x.shape[1:] == split.held_out.x.shape[1:] == digits.INPUT_SIZE
    assert split.train.x.dtype == np.uint8
    assert split.train.x.max() == 255
    seen = {image.tobytes() for image in split.train.x}
    assert not [image for image in split.held_out.x if image.tobytes() in seen]
    assert set(split.held_out.y.tolist()) == set(range(10))


def test_the_checkpoint_is_small_plain_data() -> None:
    assert digits.WEIGHTS.stat().st_size < 1_000_000
    state = torch.load(digits.WEIGHTS, weights_only=True)
    assert {"stage1.0.rbr_identity.weight", "stage1.0.rbr_1x1.conv.weight"} <= set(state)


def test_the_identity_tap_sets_the_scale(tmp_path: Path) -> None:
    source = Source("repvgg", digits.WEIGHTS, digits.ARCHITECTURE)
    options = ExportOptions(digits.INPUT_SIZE, digits.MEAN, digits.STD)
    export(source, tmp_path / "m.onnx", options)
    model = onnx.load(tmp_path / "m.onnx")
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    strides = {
        node.input[1]: a.ints[0] for node in convs for a in node.attribute if a.name == "strides"
    }
    square = [w for n, w in weights.items() if strides.get(n) == 1 and w.shape[0] == w.shape[1]]
    assert len(square) == 8  # the others change width or resolution: no identity branch
    for weight in square:
        diagonal = np.abs(np.diagonal(weight[:, :, 1, 1]))
        around = np.delete(weight.reshape(*weight.shape[:2], 9), 4, axis=2)
        assert np.median(diagonal) > 20 * around.std()
