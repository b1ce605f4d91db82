"""The detection part of the demo: mAP of three files, measured; and a picture of the boxes."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reptrt.core.artifacts import read_sidecar, sha256_of
from reptrt.demo import detection, detector, scenes
from reptrt.judge.evaluate import evaluate
from reptrt.judge.options import EvaluateOptions

pytestmark = pytest.mark.slow

if importlib.util.find_spec("faster_coco_eval") is None:
    pytest.skip("faster-coco-eval is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("detection")


@pytest.fixture(scope="module")
def run(folder: Path) -> detection.Detection:
    return detection.detect(folder)


def test_the_net_finds_digits_and_int8_still_does(run: detection.Detection) -> None:
    exact, plain, ours = run.rows
    assert [row.name for row in run.rows] == ["float", "plain INT8", "reptrt INT8"]
    assert exact.map > 0.6
    assert exact.change is None
    for row in (plain, ours):
        assert row.change is not None
        assert row.change["value"] == pytest.approx(row.map - exact.map)
        assert row.change["low"] <= row.change["value"] <= row.change["high"]
        assert row.size_bytes < exact.size_bytes
    assert ours.map > exact.map - 0.01
    assert run.pictures == detection.PICTURES["held_out"]


def test_the_rows_are_what_eval_says(run: detection.Detection, folder: Path) -> None:
    (result,) = evaluate(
        [run.rows[2].file], folder / "held_out", EvaluateOptions(task="detect")
    ).results
    assert run.rows[2].map == pytest.approx(result.measures["map"], abs=1e-3)


def test_calibration_sees_training_pictures_only(run: detection.Detection, folder: Path) -> None:
    for row in run.rows[1:]:
        sidecar = read_sidecar(row.file)
        assert sidecar is not None
        assert set(sidecar.parents) == {"detector.onnx", "train"}
        assert sidecar.parents["detector.onnx"] == sha256_of(folder / "detector.onnx")


def test_the_table_and_the_json_say_the_same(run: detection.Detection) -> None:
    table = run.to_table()
    content = json.loads(json.dumps(run.to_dict()))
    cells = [list(column.cells) for column in table.columns]
    assert cells[1] == [f"{100 * row['map']:.2f}" for row in content["rows"]]
    assert cells[3][0] == "-"
    assert all(re.fullmatch(r"[+-]\d+\.\d\d \([+-]\S+ to [+-]\S+\)", str(c)) for c in cells[3][1:])


def test_boxes_are_drawn_for_both_nets(run: detection.Detection, folder: Path) -> None:
    with Image.open(run.drawn) as opened:
        sheet = np.asarray(opened)
    upper, lower = np.split(sheet, 2)
    assert upper.shape == lower.shape
    assert 0 < (upper != lower).any(axis=2).mean() < 0.5  # other boxes on the same pictures
    for name in ("drawn_detector", "drawn_detector.int8"):
        assert len(list((folder / name).iterdir())) == detection.DRAWN


def test_the_checkpoint_is_small_plain_data_with_the_disease_of_rep_nets() -> None:
    """Most weights of the 3x3 branches are below one code of the fused kernel, as in RepVGG-A0."""
    assert detector.WEIGHTS.stat().st_size < 500_000
    state = {n: v.float() for n, v in torch.load(detector.WEIGHTS, weights_only=True).items()}
    names = [
        name.removesuffix(".rbr_identity.weight") for name in state if "identity.weight" in name
    ]
    assert len(names) == 9
    codes = []
    for name in names:
        factors = {
            branch: state[f"{name}.{bn}.weight"] / (state[f"{name}.{bn}.running_var"] + 1e-3).sqrt()
            for branch, bn in (
                ("dense", "rbr_dense.bn"),
                ("1x1", "rbr_1x1.bn"),
                ("id", "rbr_identity"),
            )
        }
        wide = state[f"{name}.rbr_dense.conv.weight"] * factors["dense"][:, None, None, None]
        fused = wide.clone()
        fused[:, :, 1:2, 1:2] += (
            state[f"{name}.rbr_1x1.conv.weight"] * factors["1x1"][:, None, None, None]
        )
        fused[:, :, 1, 1] += torch.diag(factors["id"])
        step = fused.abs().amax(dim=(1, 2, 3)) / 127
        codes.append((wide.abs().flatten(1).median(dim=1).values / step).median())
    assert torch.stack(codes).median() < 1.5


def test_the_pictures_of_training_are_not_those_of_the_demo() -> None:
    assert set(detection.PICTURES) == set(scenes.SEEDS)
