"""The ranking of layers by the task, against nets with one quantized layer in onnxruntime."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

import reptrt
from reptrt.core.clock import Clock
from reptrt.core.errors import ConfigError, DataError
from reptrt.graph.net import model_from_net, net_from_model
from reptrt.graph.preprocess import Preprocess, write_preprocess
from reptrt.judge.diagnose.ranking import Ranking, rank_layers
from reptrt.judge.evaluate import evaluate
from reptrt.judge.options import EvaluateOptions, RankOptions
from reptrt.pipeline import CalibrateOptions, calibration_images, float_model
from reptrt.pipeline.planning import Planned, plan_net
from tests.quantize.test_sensitivity import only
from tests.support.detector_nets import SIZE, detector
from tests.support.helpers import ort_run
from tests.support.qdq_nets import images, residual_net
from tests.support.small_run import refused
from tests.support.small_run import reptrt as ran

COUNT = 24
CALIBRATE = CalibrateOptions(images=COUNT, split="none", weight_bits=4)


def planned(source: Path, data: Path, options: CalibrateOptions = CALIBRATE) -> Planned:
    model = float_model(source)
    dataset = calibration_images(model, data, options)
    return plan_net(model.to_net(), dataset, options, Clock())


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("classifier")
    onnx.save(residual_net(), str(folder / "m.onnx"))
    x = images(COUNT)
    scores = ort_run(residual_net(), {"x": x})["head"]
    np.savez(folder / "x.npz", x=x, y=scores.argmax(axis=1))
    return folder / "m.onnx", folder / "x.npz"


def test_classifiers_are_ranked_by_agreement(classifier: tuple[Path, Path]) -> None:
    source, data = classifier
    found = rank_layers(source, data, data, RankOptions(layers=5, calibrate=CALIBRATE))
    plan = planned(source, data)
    with np.load(data) as arrays:
        x, y = arrays["x"], arrays["y"]
    judged = [layer for layer in found.layers if layer.judged is not None]
    assert len(judged) == 5
    assert len(found.layers) == len(plan.layers)
    assert [layer.cost for layer in judged] == sorted((la.cost for la in judged), reverse=True)
    assert min(la.error for la in judged) >= max(la.error for la in found.layers if not la.judged)
    for layer in judged:
        got = ort_run(only(plan, layer.layer), {"x": x}, optimize=False)["head"]
        same = (got.argmax(axis=1) == y).mean()
        assert layer.judged is not None
        assert layer.judged.measures["agreement"] == pytest.approx(same, abs=1e-9)
        assert layer.cost == pytest.approx(1.0 - same, abs=1e-9)
    whole = ort_run(model_from_net(plan.quantized()), {"x": x}, optimize=False)["head"]
    assert found.nets[1].measures["top1"] == pytest.approx((whole.argmax(axis=1) == y).mean())
    assert found.nets[0].measures["top1"] == 1.0
    assert found.nets[0].sqnr_db is None
    assert sum(layer.share for layer in found.layers) == pytest.approx(1.0)


def test_outputs_without_a_meaning_are_ranked_by_noise(classifier: tuple[Path, Path]) -> None:
    source, data = classifier
    options = RankOptions(task="any", layers=3, calibrate=CALIBRATE)
    found = rank_layers(source, data, data, options)
    ratios = [layer.judged.sqnr_db for layer in found.layers if layer.judged is not None]
    assert ratios == sorted(ratios)
    assert found.nets[1].sqnr_db < ratios[0]  # all of them together


@pytest.fixture(scope="module")
def detection(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_detection(tmp_path_factory.mktemp("detection"))


def write_detection(folder: Path) -> tuple[Path, Path]:
    """Write a detector, and images on which what the float net finds is what there is."""
    net = net_from_model(detector("yolov6"))
    write_preprocess(net, Preprocess(3, SIZE, SIZE, (0.0,) * 3, (1.0,) * 3, "letterbox"))
    onnx.save(model_from_net(net), str(folder / "d.onnx"))
    (folder / "val").mkdir()
    rng = np.random.default_rng(0)
    listed, boxes = [], []
    for index in range(COUNT):
        pixels = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "val" / f"{index:02d}.png")
        listed.append({"id": index, "file_name": f"{index:02d}.png", "height": SIZE, "width": SIZE})
        x = pixels.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
        found = ort_run(onnx.load(str(folder / "d.onnx")), {"x": x})["y"]
        best = found[0][np.argsort(-found[0][:, 5:].max(axis=1))[:6]]
        for *corners, _, a, b, c in best.tolist():
            x1, y1, x2, y2 = np.clip(corners, 0, SIZE).tolist()
            if x2 - x1 > 2 and y2 - y1 > 2:
                box, area = [x1, y1, x2 - x1, y2 - y1], (x2 - x1) * (y2 - y1)
                made = {"id": len(boxes) + 1, "image_id": index, "bbox": box, "area": area}
                boxes.append({**made, "category_id": int(np.argmax([a, b, c])), "iscrowd": 0})
    names = [{"id": index, "name": f"c{index}"} for index in range(3)]
    content = {"images": listed, "annotations": boxes, "categories": names}
    (folder / "instances_val.json").write_text(json.dumps(content))
    return folder / "d.onnx", folder / "val"


def test_detectors_are_ranked_by_map(detection: tuple[Path, Path], tmp_path: Path) -> None:
    source, data = detection
    options = RankOptions(
        task="detect",
        boxes="xyxy",
        clip=True,
        layers=3,
        calibrate=replace(CALIBRATE, weight_bits=3),
    )
    found = rank_layers(source, data, data, options)
    plan = planned(source, data, options.calibrate)
    judging = EvaluateOptions(task="detect", boxes="xyxy", clip=True)
    before = evaluate([source], data, judging).results[0].measures["map"]
    assert before > 0.1
    assert found.nets[0].measures["map"] == pytest.approx(before, abs=1e-6)
    judged = [layer for layer in found.layers if layer.judged is not None]
    assert [layer.cost for layer in judged] == sorted((la.cost for la in judged), reverse=True)
    for layer in judged:
        path = tmp_path / f"{layer.layer}.onnx"
        onnx.save(only(plan, layer.layer), str(path))
        expected = evaluate([path], data, judging).results[0].measures
        assert layer.judged is not None
        assert layer.judged.measures["map"] == pytest.approx(expected["map"], abs=2e-3)
        assert layer.cost == pytest.approx(before - layer.judged.measures["map"], abs=1e-6)
        change = layer.judged.measures["map_change"]
        assert change["low"] <= change["value"] <= change["high"]


def test_the_command_line_and_the_function_say_the_same(
    detection: tuple[Path, Path], tmp_path: Path
) -> None:
    source, data = detection
    asked = ("--task", "detect", "--boxes", "xyxy", "--layers", 2, "--split", "none")
    more = ("--annotations", data.parent / "instances_val.json", "--eval-data", data)
    result = ran("diagnose", source, "--data", data, *asked, *more, "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    assert "2 of 6 layers, each alone in INT8, on 24 images" in result.output
    assert "change of mAP" in result.output
    written = json.loads((tmp_path / "r.json").read_text())
    found = reptrt.rank_layers(
        str(source), str(data), task="detect", boxes="xyxy", layers=2, split="none"
    )
    assert isinstance(found, Ranking)
    stored = json.loads(json.dumps(found.to_dict()))
    assert {**written, "seconds": 0} == {**stored, "seconds": 0}
    assert [net["name"] for net in written["nets"]] == ["float", "all layers"]
    assert [row["cost"] is None for row in written["layers"]] == [False] * 2 + [True] * 4


def test_what_cannot_be_is_one_line(detection: tuple[Path, Path], tmp_path: Path) -> None:
    source, data = detection
    with pytest.raises(ConfigError, match="layers: got 0, expected 1 or more"):
        RankOptions(layers=0)
    line = refused("diagnose", source, "--data", data, "--task", "detect", "--layers", 0)
    assert line == "error: --layers: got 0, expected 1 or more"
    np.savez(tmp_path / "x.npz", x=np.zeros((8, 3, SIZE, SIZE), np.uint8))
    with pytest.raises(DataError, match="has no annotations of boxes"):
        rank_layers(source, tmp_path / "x.npz", data, RankOptions(task="detect"))
