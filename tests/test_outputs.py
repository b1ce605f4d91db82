"""What the outputs choose: --threshold auto, against every choice tried by hand in onnxruntime."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from reptrt.calib.outputs import stride_of
from reptrt.calib.thresholds import ThresholdOptions
from reptrt.data import open_dataset
from reptrt.graph import model_from_net, net_from_model
from reptrt.pipeline import CalibrateOptions, CalibrateReport, calibrate
from reptrt.placement import place
from reptrt.preprocess import read_preprocess
from reptrt.qdq import insert_qdq
from tests.helpers import ort_run
from tests.learned_nets import SIZE, rep_net, write_images, write_net

RULES = ("max", "percentile", "mse", "kl")
COUNT = 96
OPTIONS = CalibrateOptions(
    images=COUNT, equalize=False, split="none", correct_bias=False, activation_bits=5
)
STEP = 2 ** (1 / 8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "d.npz", COUNT)


def parts(path: Path, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the images that ranges are from, and every eighth, which judges."""
    preprocess = read_preprocess(net_from_model(onnx.load(str(path))))
    (x,) = open_dataset(data, preprocess).batches(COUNT)
    judges = np.arange(COUNT) % 8 == 7
    return x[~judges], x[judges]


def error_of(
    path: Path, x: np.ndarray, scales: Mapping[str, float], full_range: tuple[str, ...]
) -> float:
    """Of the outputs with quantized activations, weights in float."""
    model = onnx.load(str(path))
    net = net_from_model(model)
    (exact,) = ort_run(model, {"x": x}, optimize=False).values()
    placement = replace(place(net), weights=())
    insert_qdq(net, placement, scales, {}, OPTIONS.grids[0], full_range)
    (found,) = ort_run(model_from_net(net), {"x": x}, optimize=False).values()
    return float(np.square(found.astype(float) - exact).sum())


def scales_of(report: CalibrateReport, margin: float = 1.0) -> dict[str, float]:
    return {tensor.tensor: margin * tensor.scale for tensor in report.tensors}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("full_range", [True, False])
def test_auto_takes_the_rule_and_margin_that_keep_outputs_nearest_on_images_not_seen(
    seed: int, full_range: bool, data: Path, tmp_path: Path
) -> None:
    path = write_net(tmp_path / "m.onnx", rep_net(3, seed))
    seen, judges = parts(path, data)
    np.savez(tmp_path / "seen.npz", x=seen)
    options = replace(OPTIONS, full_range=full_range)
    by_rule, errors = {}, {}
    for rule in RULES:
        given = replace(options, images=len(seen), threshold=ThresholdOptions(rule))  # type: ignore[arg-type]
        report = calibrate(path, tmp_path / "seen.npz", tmp_path / "o.onnx", given)
        assert (report.threshold, report.margin) == (rule, 1.0)
        assert bool(report.full_range) == full_range
        by_rule[rule] = report
        errors[rule] = error_of(path, judges, scales_of(report), report.full_range)
    chosen = calibrate(path, data, tmp_path / "o.onnx", options)
    assert errors[chosen.threshold] == pytest.approx(min(errors.values()), rel=1e-3)
    assert max(errors.values()) > 1.05 * min(errors.values())
    found = by_rule[chosen.threshold]
    assert chosen.full_range == found.full_range
    assert scales_of(chosen) == pytest.approx(scales_of(found, chosen.margin), rel=1e-6)
    steps = round(8 * np.log2(chosen.margin))
    assert chosen.margin == pytest.approx(STEP**steps)
    tried = [
        error_of(path, judges, scales_of(found, STEP**k), found.full_range)
        for k in range(steps + 2)
    ]
    assert all(np.diff(tried[:-1]) < 0)  # every step came nearer
    assert tried[-1] > (1 - 1e-3) * tried[-2]  # and the next one did not


def test_few_images_get_a_wide_margin(tmp_path: Path) -> None:
    path = write_net(tmp_path / "m.onnx", rep_net(3))
    rng = np.random.default_rng(0)
    contrast = np.exp(rng.normal(0, 0.5, (512, 1, 1, 1)))
    x = contrast * rng.normal(0, 1, (512, 3, SIZE, SIZE))
    np.savez(tmp_path / "d.npz", x=x.astype(np.float32))
    images, options = tmp_path / "d.npz", replace(OPTIONS, activation_bits=8, equalize=True)
    few, many = (
        calibrate(path, images, tmp_path / "o.onnx", replace(options, images=count)).margin
        for count in (16, 512)
    )
    assert few > 1.2 * many


def test_different_widths_get_different_rules(data: Path, tmp_path: Path) -> None:
    path = write_net(tmp_path / "m.onnx", rep_net(3))
    chosen = {
        calibrate(path, data, tmp_path / "o.onnx", replace(OPTIONS, activation_bits=bits)).threshold
        for bits in (4, 5, 6, 7, 8)
    }
    assert len(chosen) > 1


@pytest.mark.parametrize(
    ("length", "judges"), [(2, 1), (8, 4), (16, 8), (33, 8), (64, 8), (128, 16), (512, 64)]
)
def test_how_many_images_judge(length: int, judges: int) -> None:
    assert length // stride_of(length) == judges


@pytest.mark.parametrize("length", [513, 1000, 1024, 50_000])
def test_no_more_than_some_64_judge(length: int) -> None:
    assert 64 <= length // stride_of(length) <= 72


def test_one_image_is_enough(tmp_path: Path) -> None:
    path = write_net(tmp_path / "m.onnx", rep_net(3))
    images = write_images(tmp_path / "d.npz", 1)
    assert calibrate(path, images, tmp_path / "o.onnx", replace(OPTIONS, images=1)).images == 1
