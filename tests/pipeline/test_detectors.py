"""Calibration of detectors, whose float tails have the forms of well-known families."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import net_from_model, read_model
from reptrt.graph.splits import read_splits
from reptrt.judge.diagnose import diagnose
from reptrt.pipeline import CalibrateOptions, calibrate
from reptrt.quantize.calib.measure import Measure, relative
from tests.support.detector_nets import FORMS, SIZE, detector
from tests.support.helpers import ort_run
from tests.support.learned_nets import write_images

COUNT = 32


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "d.npz", COUNT, size=SIZE)


def pixels(images: Path) -> np.ndarray:
    return np.load(images)["x"] / np.float32(255)


def error_of(model: Path, int8: Path, x: np.ndarray) -> float:
    """Return the error at the raw heads, each group in its own unit."""
    exact, rounded = (TorchGraph(onnx.load(path)) for path in (model, int8))
    measure = Measure(exact)
    with torch.inference_mode():
        values = [
            graph.run({"x": torch.from_numpy(x)}, measure.names) for graph in (exact, rounded)
        ]
    return sum(float(relative(*pair)) for pair in measure.sums(*values).values())


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recipe", ["fast", "balanced"])
def test_every_form_is_calibrated_and_its_outputs_stay_near(
    tmp_path: Path, images: Path, form: str, recipe: str
) -> None:
    paths = tmp_path / "m.onnx", tmp_path / "o.onnx"
    onnx.save(detector(form), paths[0])
    iterations = 4 if recipe == "balanced" else None
    options = CalibrateOptions(images=COUNT, recipe=recipe, iterations=iterations)
    report = calibrate(paths[0], images, paths[1], options)
    x = pixels(images)
    assert error_of(*paths, x) < 0.01
    exact, int8 = (ort_run(onnx.load(path), {"x": x}, optimize=False) for path in paths)
    for name in exact.keys() - {"kept"}:  # which of two near peaks is higher may change
        value = exact[name]
        noise = np.square(value - int8[name]).sum()
        assert noise < 1e-2 * np.square(value).sum()
    if report.learned is not None:
        learned = {layer for unit in report.learned.units for layer in unit.layers}
        splits = read_splits(
            net_from_model(read_model(paths[1]))
        )  # a side is learned with its main
        assert len(learned) == report.layers - len(splits)


@pytest.mark.slow
def test_learning_brings_the_heads_nearer_on_other_images(tmp_path: Path) -> None:
    model, fast, learned = (tmp_path / f"{name}.onnx" for name in ("m", "fast", "learned"))
    onnx.save(detector("yolov6"), model)
    many = write_images(tmp_path / "many.npz", 128, size=SIZE)  # few would be learned by heart
    options = CalibrateOptions(images=128, weight_bits=3, split="none")
    calibrate(model, many, fast, options)
    report = calibrate(model, many, learned, replace(options, recipe="accurate"))
    assert report.learned is not None
    other = pixels(write_images(tmp_path / "other.npz", COUNT, seed=1, size=SIZE))
    errors = [error_of(model, path, other) for path in (fast, learned)]
    assert errors[1] < errors[0]


def test_diagnose_compares_the_heads(tmp_path: Path, images: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(detector("yolov6"), path)
    found = diagnose(path, images, CalibrateOptions(images=COUNT, split="none"))
    assert [corner.agreement for corner in found.corners] == [None] * 4
    assert all(20 < corner.sqnr_db < 60 for corner in found.corners)
