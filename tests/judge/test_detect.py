"""mAP against pycocotools, its interval against the library, and what cannot be judged."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import helper
from PIL import Image

import reptrt
from reptrt.cli import main
from reptrt.core.errors import ConfigError, DataError, MissingDependencyError
from reptrt.data.dataset import open_dataset
from reptrt.judge.detect.bootstrap import FEWEST, RESAMPLES, draws, resampled_map
from reptrt.judge.evaluate import evaluate
from reptrt.judge.options import EvaluateOptions
from reptrt.judge.tasks import open_task
from reptrt.judge.tasks.detect import Found
from reptrt.judge.tasks.protocol import score
from tests.support.coco_sets import (
    IDS,
    ORDERED,
    SIZE,
    constant_detector,
    fits_of,
    outputs_for,
    preprocess,
    pycocotools_map,
    slow_detections,
    write_set,
)
from tests.support.helpers import SHARED, needs_shared

KEYS = ("map", "map50", "map75", "map_small", "map_medium", "map_large")


def found_in(
    folder: Path, outputs: np.ndarray, resize: str = "letterbox", **options: Any
) -> tuple[Any, Found]:
    """Return the task and what it finds in outputs that come in two batches."""
    asked = EvaluateOptions(task="detect", **options)
    task = open_task(asked, folder)
    tally = task.tally("net", open_dataset(folder, preprocess(resize)))
    for part in np.array_split(outputs, 2):
        tally.add({"y": part})
    return task, tally.findings()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path / "val")
    return tmp_path / "val"


@pytest.mark.parametrize("resize", ["letterbox", "stretch", "crop"])
def test_every_number_against_pycocotools(folder: Path, resize: str) -> None:
    """NMS and geometry are those of plain Python; the json goes to pycocotools as it is."""
    path = folder.parent / "instances_val.json"
    outputs = outputs_for(path, resize)
    task, found = found_in(folder, outputs, resize, confidence=0.1, iou=0.5, max_boxes=20)
    slow = slow_detections(outputs, fits_of(path, resize), 0.1, 0.5, 20)
    stats, by_class = pycocotools_map(path, slow)
    assert stats[0] > 0.2
    for key, expected in zip(KEYS, stats, strict=True):
        assert found.measures[key] == pytest.approx(expected, abs=1e-9), key
    assert found.measures["classes"] == pytest.approx(
        dict(zip(ORDERED, by_class, strict=True)), abs=1e-9
    )
    assert score(task, found.measures) == found.measures["map"]


def test_all_detections_of_the_default_options_count(folder: Path) -> None:
    path = folder.parent / "instances_val.json"
    outputs = outputs_for(path, boxes=120)
    _, found = found_in(folder, outputs)
    slow = slow_detections(outputs, fits_of(path), 0.001, 0.65, 100)
    assert [len(of.boxes) for of in found.detections] == [100] * len(outputs)
    assert found.measures["map"] == pytest.approx(pycocotools_map(path, slow)[0][0], abs=1e-9)


def test_no_objects_of_a_size_or_class_is_null(folder: Path) -> None:
    path = folder.parent / "instances_val.json"
    content = json.loads(path.read_text())
    content["annotations"] = [
        a for a in content["annotations"] if a["category_id"] != IDS[0] and a["area"] < 1000
    ]
    path.write_text(json.dumps(content))
    _, found = found_in(folder, outputs_for(path))
    assert found.measures["map_large"] is None
    assert found.measures["classes"]["cat"] is None
    assert found.measures["map"] is not None


def test_nothing_found_is_zero(folder: Path) -> None:
    outputs = outputs_for(folder.parent / "instances_val.json")
    outputs[..., 4] = 0
    _, found = found_in(folder, outputs)
    assert found.measures["map"] == 0.0


def test_clipping_to_the_image(folder: Path) -> None:
    path = folder.parent / "instances_val.json"
    outputs = outputs_for(path)
    outputs[..., 2:4] *= 1.5
    boxes = {clip: found_in(folder, outputs, clip=clip)[1] for clip in (True, False)}
    for whole, cut, fit in zip(
        boxes[False].detections, boxes[True].detections, fits_of(path), strict=True
    ):
        sides = [fit.image_width, fit.image_height] * 2
        np.testing.assert_array_equal(cut.boxes, np.clip(whole.boxes, 0, sides))
    assert boxes[True].measures["map"] != boxes[False].measures["map"]


# --- the interval of a difference ----------------------------------------------------------------


def library_map(found: Found, images: np.ndarray) -> float:
    """The mAP of a resample from scratch: each drawn image is a new image with its own objects."""
    from reptrt.judge.detect.scoring import score_detections

    scores = score_detections(
        [found.objects[i] for i in images], [found.detections[i] for i in images], len(ORDERED), 100
    )
    assert scores.mean is not None
    return scores.mean


def test_resampled_map_is_that_of_the_library(folder: Path) -> None:
    """Only the order of equal scores may differ, and there are none here."""
    _, found = found_in(folder, outputs_for(folder.parent / "instances_val.json"))
    assert found.scores.matches is not None
    weights = draws(len(found.objects))
    assert weights.shape == (RESAMPLES, 12)
    assert draws(5000).shape == (FEWEST, 5000)
    assert (weights.sum(axis=1) == 12).all()
    means = resampled_map(found.scores.matches, weights)
    for index in range(8):
        images = np.repeat(np.arange(12), weights[index])
        assert means[index] == pytest.approx(library_map(found, images), abs=1e-9)
    whole = resampled_map(found.scores.matches, np.ones((1, 12), np.int64))
    assert whole[0] == pytest.approx(found.measures["map"], abs=1e-12)


def test_the_change_is_paired(folder: Path) -> None:
    """The same noise on the same images: the interval is far narrower than that of one mAP."""
    path = folder.parent / "instances_val.json"
    outputs = outputs_for(path, noise=3.0)
    task, reference = found_in(folder, outputs)
    shifted = outputs.copy()
    shifted[..., 0] += np.random.default_rng(0).normal(0, 0.1, shifted.shape[:2])
    _, other = found_in(folder, shifted)
    change = task.compare(reference, other)["map_change"]
    assert change["value"] == other.measures["map"] - reference.measures["map"]
    assert change["low"] <= change["value"] <= change["high"]
    assert reference.resampled is not None
    width = np.ptp(np.percentile(reference.resampled, (2.5, 97.5)))
    assert change["high"] - change["low"] < width / 3
    assert task.compare(None, other) == {"map_change": None}
    assert task.compare(other, other) == {"map_change": None}


# --- whole runs ----------------------------------------------------------------------------------


@pytest.fixture
def net(folder: Path, tmp_path: Path) -> Path:
    outputs = outputs_for(folder.parent / "instances_val.json")[0]
    onnx.save(constant_detector(outputs), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def test_eval_of_a_file(folder: Path, net: Path, tmp_path: Path) -> None:
    other = onnx.load(net)
    values = onnx.numpy_helper.to_array(other.graph.initializer[0]).copy()
    values[..., 0] += 1
    other.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(values, "boxes"))
    onnx.save(other, tmp_path / "other.onnx")
    report = evaluate(
        [net, tmp_path / "other.onnx"],
        folder,
        EvaluateOptions(task="detect", reference=net, threads=1, batch_size=5),
    )
    exact, changed = report.results
    assert exact.images == 12
    assert exact.score == exact.measures["map"]
    assert exact.measures["map_change"] is None
    assert set(changed.measures["map_change"]) == {"value", "low", "high"}
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))["results"][1]
    assert list(content["classes"]) == list(ORDERED)
    assert content["sqnr_db"] > 0
    text = str(report)
    assert f"{100 * exact.measures['map']:.2f}" in text
    assert all(f"  {name}" in text for name in ORDERED)
    assert "change of mAP (95 %)" in text


def test_targets_in_memory_are_a_json(tmp_path: Path, net: Path) -> None:
    """Images of the net's size as files with a json, and as arrays, tensors and a loader."""
    path = write_set(tmp_path / "same", same_size=True, count=6)
    content = json.loads(path.read_text())
    ordered = sorted(content["images"], key=lambda image: image["file_name"])
    files = [np.asarray(Image.open(tmp_path / "same" / i["file_name"])) for i in ordered]
    images = np.stack(files).transpose(0, 3, 1, 2)
    targets = []
    for image in ordered:
        found = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        boxes = torch.tensor([a["bbox"] for a in found], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([sorted(IDS).index(a["category_id"]) for a in found])
        crowds = torch.tensor([a["iscrowd"] for a in found])
        targets.append({"boxes": boxes, "labels": labels, "iscrowd": crowds, "image_id": 3})
    expected = reptrt.evaluate(net, tmp_path / "same", task="detect").to_dict()["results"][0]
    loader = [(tuple(torch.tensor(images[i : i + 4])), targets[i : i + 4]) for i in (0, 4)]
    for data in ((images, targets), loader):
        got = reptrt.evaluate(net, data, task="detect").to_dict()["results"][0]
        assert list(got.pop("classes").values()) == list(expected["classes"].values())
        assert got == {key: value for key, value in expected.items() if key != "classes"}
    few = reptrt.evaluate(net, loader, task="detect", limit=3)
    assert few.results[0].images == 3


TARGET = {"boxes": np.array([[1, 2, 5, 6]]), "labels": np.array([0])}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            {"boxes": [[1, 2, 3, 4]]},
            r"data: target 1 has boxes, expected boxes \(n, 4\) and labels",
        ),
        ({**TARGET, "labels": [0, 1]}, r"boxes have shape \(1, 4\), labels \(2,\)"),
        ({**TARGET, "boxes": [[5, 2, 5, 6]]}, "boxes without width or height, expected x1 y1"),
        ({**TARGET, "labels": [-1]}, "negative, expected classes from 0"),
        ({**TARGET, "labels": [3]}, r"label 3 in the targets, .* 3 classes; .*subtract 1"),
        (None, "2 images and 1 targets"),
    ],
)
def test_targets_that_cannot_be_used(net: Path, target: Any, message: str) -> None:
    images = np.zeros((2, 3, SIZE, SIZE), np.uint8)
    targets = [TARGET] if target is None else [TARGET, target]
    with pytest.raises(DataError, match=message):
        reptrt.evaluate(net, (images, targets), task="detect")


def test_images_in_memory_need_targets(folder: Path, net: Path) -> None:
    images = np.zeros((2, 3, SIZE, SIZE), np.uint8)
    with pytest.raises(DataError, match=r"data: has no annotations of boxes; .* pair of images"):
        reptrt.evaluate(net, images, task="detect")
    sizes = [np.zeros((3, 8, 8)), np.zeros((3, 9, 8))]
    with pytest.raises(DataError, match=r"images of sizes \[\(3, 8, 8\), \(3, 9, 8\)\]"):
        reptrt.evaluate(net, (sizes, [TARGET] * 2), task="detect")
    path = folder.parent / "instances_val.json"
    with pytest.raises(ConfigError, match="beside images with targets"):
        reptrt.evaluate(net, (images, [TARGET] * 2), task="detect", annotations=path)
    assert reptrt.evaluate(net, folder, task="detect", annotations=str(path)).results[0].score


def test_a_limit_judges_on_a_sample(folder: Path, net: Path) -> None:
    options = EvaluateOptions(task="detect", threads=1, limit=4)
    assert evaluate([net], folder, options).results[0].images == 4


def test_on_the_command_line(folder: Path, net: Path) -> None:
    annotations = folder.parent / "instances_val.json"
    moved = annotations.rename(folder.parent / "boxes.json")
    command = ["eval", str(net), "--data", str(folder), "--task", "detect", "--threads", "1"]
    failed = CliRunner().invoke(main, command)
    assert failed.exit_code == 1
    assert "give a COCO json with --annotations" in failed.stderr
    done = CliRunner().invoke(main, [*command, "--annotations", str(moved), "--confidence", "0.1"])
    assert done.exit_code == 0, done.stderr
    assert "mAP" in done.stdout


# --- what cannot be judged -----------------------------------------------------------------------


def refused(folder: Path, *nets: Path, **options: Any) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        evaluate(list(nets), folder, EvaluateOptions(task="detect", threads=1, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder.parent / f"instances_{folder.name}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_images_that_the_annotations_do_not_have(folder: Path, net: Path) -> None:
    (folder / "00.png").rename(folder / "new.png")
    assert "1 of 12 images of" in (message := refused(folder, net))
    assert "have no entry in" in message
    assert "new.png" in message


def test_images_that_are_missing(folder: Path, net: Path) -> None:
    (folder / "03.png").unlink()
    assert "1 of 12 images of" in (message := refused(folder, net))
    assert "instances_val.json are not in" in message
    assert "03.png" in message
    assert "subset=True to judge without them" in message


def test_a_subset_is_judged_as_if_the_json_were_of_it_alone(
    folder: Path, net: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def drop(content: dict[str, Any]) -> None:
        kept = [i for i in content["images"] if i["file_name"] not in ("03.png", "07.png")]
        ids = {image["id"] for image in kept}
        content["images"] = kept
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]

    for name in ("03.png", "07.png"):
        (folder / name).unlink()
    asked = EvaluateOptions(task="detect", threads=1, subset=True)
    part = evaluate([net], folder, asked).to_dict()
    assert "2 of 12 images of" in caplog.text
    caplog.clear()
    edit(folder, drop)
    assert evaluate([net], folder, asked).to_dict() == part
    assert evaluate([net], folder, replace(asked, subset=False)).to_dict() == part
    assert caplog.text == ""
    (folder / "new.png").write_bytes((folder / "00.png").read_bytes())
    assert "have no entry in" in refused(folder, net, subset=True)


def test_names_with_another_folder(folder: Path, net: Path) -> None:
    def prefix(content: dict[str, Any]) -> None:
        for image in content["images"]:
            image["file_name"] = f"images/val/{image['file_name']}"

    before = evaluate([net], folder, EvaluateOptions(task="detect", threads=1)).to_dict()
    edit(folder, prefix)
    assert evaluate([net], folder, EvaluateOptions(task="detect", threads=1)).to_dict() == before


def test_images_of_another_size(folder: Path, net: Path) -> None:
    edit(folder, lambda content: content["images"][1].update(width=480, height=640))
    message = refused(folder, net)
    assert "1 of 12 images have another size: 01.png is 96x64, annotated as 480x640" in message


def test_another_number_of_categories(folder: Path, net: Path) -> None:
    edit(folder, lambda content: content["categories"].append({"id": 99, "name": "cell"}))
    message = refused(folder, net)
    assert "look like xywh-obj-cls (xywh, 3 classes), the annotations have 4 categories" in message


def test_a_classifier(folder: Path, tmp_path: Path) -> None:
    model = constant_detector(np.zeros((4, 8), np.float32))
    model.graph.node[-1].input[1] = "one"
    del model.graph.node[2:4]
    model.graph.node[-1].input[0] = "one"
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, ["N", 1]))
    onnx.save(model, tmp_path / "classifier.onnx")
    message = refused(folder, tmp_path / "classifier.onnx")
    assert "classifier.onnx: its output [N, 1] has no boxes" in message
    assert "task='classify'" in message


def test_a_detector_is_no_classifier(
    folder: Path, net: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluate([net], folder, EvaluateOptions(threads=1))
    assert "net.onnx: its outputs look like those of a detector, xywh-obj-cls" in caplog.text
    labelled = np.zeros((2, 3, SIZE, SIZE), np.uint8)
    np.savez(tmp_path / "data.npz", x=labelled, y=np.zeros(2, np.int64))
    with pytest.raises(ConfigError, match=r"look like those of a detector.*task='detect'"):
        evaluate([net], tmp_path / "data.npz", EvaluateOptions(threads=1))
    path = folder.parent / "instances_val.json"
    with pytest.raises(ConfigError, match=r"annotations: got .*task='detect'"):
        evaluate([net], folder, EvaluateOptions(annotations=path, threads=1))


def test_arrays_have_no_annotations(net: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 3, SIZE, SIZE), np.uint8))
    assert "expected a folder of images" in refused(tmp_path / "x.npy", net)


def test_options_out_of_range() -> None:
    for options in ({"confidence": 2.0}, {"iou": -0.1}, {"max_boxes": 0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            EvaluateOptions(task="detect", **options)  # type: ignore[arg-type]


def test_without_the_library(folder: Path, net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faster_coco_eval", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "reptrt\[detect\]"'):
        evaluate([net], folder, EvaluateOptions(task="detect", threads=1))


# --- the shared net ------------------------------------------------------------------------------


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize(("split", "expected"), [("test", (39.4, 70.0)), ("val", (41.7, 72.7))])
def test_the_shared_yolov6(tmp_path: Path, split: str, expected: tuple[float, float]) -> None:
    nets = []
    for head in ("decoded", "raw"):
        nets.append(tmp_path / f"{head}.onnx")
        weights = ["--weights", str(SHARED / "zoo" / "yolov6n_bccd.pt")]
        sizes = ["--input-size", "3x320x320", "--head", head, "-o", str(nets[-1])]
        done = CliRunner().invoke(main, ["export", "yolov6n", *weights, *sizes])
        assert done.exit_code == 0, done.stderr
    data = SHARED / "bccd" / split
    report = evaluate(nets, data, EvaluateOptions(task="detect", threads=1))
    for result in report.results:
        got = [100 * result.measures[key] for key in ("map", "map50")]
        assert got == pytest.approx(expected, abs=0.06)
