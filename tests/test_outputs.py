"""What the outputs choose: --threshold auto, against every rule tried by hand in onnxruntime."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from reptrt.calib.thresholds import ThresholdOptions
from reptrt.data import open_dataset
from reptrt.graph import model_from_net, net_from_model
from reptrt.pipeline import CalibrateOptions, calibrate
from reptrt.placement import place
from reptrt.preprocess import read_preprocess
from reptrt.qdq import insert_qdq
from tests.helpers import ort_run
from tests.learned_nets import rep_net, write_images, write_net

RULES = ("max", "percentile", "mse", "kl")
OPTIONS = CalibrateOptions(images=96, equalize=False, split="none", activation_bits=5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "d.npz", 96)


def error_of(path: Path, data: Path, scales: dict[str, float], full_range: list[str]) -> float:
    """Of the outputs of 64 images with quantized activations, weights in float."""
    model = onnx.load(str(path))
    net = net_from_model(model)
    (x,) = open_dataset(data, read_preprocess(net), limit=96, seed=0).batches(96)
    (exact,) = ort_run(model, {"x": x[:64]}, optimize=False).values()
    placement = replace(place(net), weights=())
    insert_qdq(net, placement, scales, {}, OPTIONS.grids[0], full_range)
    (found,) = ort_run(model_from_net(net), {"x": x[:64]}, optimize=False).values()
    return float(np.square(found.astype(float) - exact).sum())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("full_range", [True, False])
def test_auto_takes_the_rule_that_keeps_the_outputs_nearest(
    seed: int, full_range: bool, data: Path, tmp_path: Path
) -> None:
    path = write_net(tmp_path / "m.onnx", rep_net(3, seed))
    options = replace(OPTIONS, full_range=full_range)
    errors, tensors = {}, {}
    for rule in RULES:
        given = replace(options, threshold=ThresholdOptions(rule))  # type: ignore[arg-type]
        report = calibrate(path, data, tmp_path / "o.onnx", given)
        assert report.threshold == rule
        scales = {tensor.tensor: tensor.scale for tensor in report.tensors}
        errors[rule] = error_of(path, data, scales, list(report.full_range))
        assert bool(report.full_range) == full_range
        tensors[rule] = report.tensors
    chosen = calibrate(path, data, tmp_path / "o.onnx", options)
    assert errors[chosen.threshold] == pytest.approx(min(errors.values()), rel=1e-3)
    assert max(errors.values()) > 1.05 * min(errors.values())
    assert chosen.tensors == tensors[chosen.threshold]


def test_different_widths_get_different_rules(data: Path, tmp_path: Path) -> None:
    path = write_net(tmp_path / "m.onnx", rep_net(3))
    chosen = {
        calibrate(path, data, tmp_path / "o.onnx", replace(OPTIONS, activation_bits=bits)).threshold
        for bits in (4, 5, 6, 7, 8)
    }
    assert len(chosen) > 1
