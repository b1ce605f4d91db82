"""The recipes of papers do the parts of their paper and no others."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from reptrt.core.choices import Effort, Recipe, TargetName
from reptrt.core.errors import ConfigError
from reptrt.core.grid import Grid
from reptrt.data.dataset import open_dataset
from reptrt.graph.net import get_json, net_from_model, read_model
from reptrt.graph.plan import QuantPlan
from reptrt.graph.preprocess import read_preprocess
from reptrt.graph.quantized import layer_weights, plan_from_net
from reptrt.pipeline import PLAIN_INT8, CalibrateOptions, CalibrateReport, calibrate
from reptrt.pipeline.recipes import RECIPES, Parts
from reptrt.quantize.calib.options import ThresholdOptions
from tests.support.helpers import ort_run
from tests.support.learned_nets import rep_net, write_images, write_net
from tests.support.qdq_nets import with_outputs

COUNT = 64
LAYERS = ("stem", "block0", "block1", "block2")
CFWS = CalibrateOptions(images=COUNT, recipe="cfws")
REPAPQ = CalibrateOptions(images=COUNT, recipe="repapq", iterations=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("papers")
    write_net(folder / "m.onnx", rep_net())
    write_images(folder / "d.npz", COUNT)
    return folder


def made(folder: Path, options: CalibrateOptions, name: str) -> CalibrateReport:
    return calibrate(folder / "m.onnx", folder / "d.npz", folder / name, options)


def plan_of(folder: Path, name: str) -> QuantPlan:
    return plan_from_net(net_from_model(read_model(folder / name)))


def constants(folder: Path) -> dict[str, np.ndarray]:
    initializers = onnx.load(folder / "m.onnx").graph.initializer
    return {t.name: numpy_helper.to_array(t).astype(np.float64) for t in initializers}


def nearest(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and steps per output channel, by numpy."""
    steps = np.abs(weight).reshape(len(weight), -1).max(1) / 127
    shape = (-1, *[1] * (weight.ndim - 1))
    return np.rint(weight / steps.reshape(shape)), steps


def largest(folder: Path, tensors: Mapping[str, Any]) -> dict[str, float]:
    """The largest |x| of tensors on the calibration images, by onnxruntime."""
    model = onnx.load(folder / "m.onnx")
    preprocess = read_preprocess(net_from_model(read_model(folder / "m.onnx")))
    (x,) = open_dataset(folder / "d.npz", preprocess).batches(COUNT)
    values = ort_run(with_outputs(model, list(tensors)), {"x": x}, optimize=False) | {"x": x}
    return {name: float(np.abs(values[name]).max()) for name in tensors}


def assert_biases_are_floats_own(folder: Path, name: str) -> None:
    """Up to the accumulator's grid: corrected or equalized biases are further away."""
    weights, plan = constants(folder), plan_of(folder, name)
    for layer, found in layer_weights(net_from_model(read_model(folder / name))).items():
        if (bias := found.bias) is None or not bias.any():
            continue  # the coarse part has none
        steps = max(a.scale for a in plan.activations.values()) * plan.weights[layer].scale
        assert np.abs(bias - weights[f"{layer.removesuffix('.fine')}.bias"]).max() <= steps.max()


def assert_no_full_range(plan: QuantPlan) -> None:
    assert {activation.grid for activation in plan.activations.values()} == {Grid.activation(8)}


# Coarse and fine ---------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_cfws_splits_every_kernel_and_rounds_to_nearest(folder: Path, target: TargetName) -> None:
    report = made(folder, replace(CFWS, target=target), "cfws.onnx")
    assert (report.threshold, report.margin, report.equalized) == ("kl", 1.0, 0)
    assert (report.learned, report.ranges) == (None, ())
    assert {s.layer: (s.form, s.precision) for s in report.splits} == dict.fromkeys(
        LAYERS, ("coarse-fine", "float")
    )
    plan, floats = plan_of(folder, "cfws.onnx"), constants(folder)
    assert len(plan.weights) == 2 * len(LAYERS) + 1  # and the head, which has no spatial kernel
    for split in report.splits:
        weight = floats[f"{split.layer}.weight"]
        codes, steps = nearest(weight[:, :, 1:2, 1:2])
        fine = weight.copy()
        fine[:, :, 1:2, 1:2] -= codes * steps[:, None, None, None]
        for node, expected in ((split.side, (codes, steps)), (split.main, nearest(fine))):
            np.testing.assert_allclose(plan.weights[node].scale, expected[1], rtol=1e-5)
            different = plan.weights[node].codes != expected[0]
            assert different.mean() < 1e-3, node  # at ties, float32 may round the other way
    assert np.array_equal(plan.weights["head"].codes, nearest(floats["head.weight"])[0])
    assert_biases_are_floats_own(folder, "cfws.onnx")
    if target == "tensorrt":
        assert_no_full_range(plan)


def test_cfws_takes_the_thresholds_of_kl(folder: Path) -> None:
    made(folder, CFWS, "cfws.onnx")
    made(folder, replace(PLAIN_INT8, images=COUNT, threshold=ThresholdOptions("kl")), "kl.onnx")
    scales = [
        {name: a.scale for name, a in plan_of(folder, file).activations.items()}
        for file in ("cfws.onnx", "kl.onnx")
    ]
    assert scales[0] == pytest.approx(scales[1], rel=1e-5)


# Learned by blocks -------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_repapq_learns_from_plain_int8(folder: Path, target: TargetName) -> None:
    options = replace(REPAPQ, target=target)
    report = made(folder, replace(options, keep_affine=True), "repapq.onnx")
    assert (report.threshold, report.margin, report.equalized) == ("max", 1.0, 0)
    assert (report.splits, report.ranges) == ((), ())
    assert report.learned is not None
    net = net_from_model(read_model(folder / "repapq.onnx"))
    assert (get_json(net, "affines", dict) or {}).keys() == {*LAYERS, "head"}
    plan, floats = plan_of(folder, "repapq.onnx"), constants(folder)
    changed = 0
    for layer in (*LAYERS, "head"):
        weight = floats[f"{layer}.weight"]
        codes, steps = nearest(weight)
        np.testing.assert_allclose(plan.weights[layer].scale, steps, rtol=1e-5)
        exact = weight / steps.reshape(-1, *[1] * (weight.ndim - 1))
        assert np.abs(plan.weights[layer].codes - exact).max() < 1 + 1e-3  # floor or ceiling
        changed += int((plan.weights[layer].codes != codes).sum())
    assert changed > 0
    found = {name: a.scale for name, a in plan.activations.items()}
    maxima = largest(folder, found)
    ratios = np.array([found[name] * 127 / maxima[name] for name in found])
    assert np.abs(ratios - 1).max() < 0.05  # steps start at the largest values, and are learned
    assert np.abs(ratios - 1).max() > 1e-4
    if target == "tensorrt":
        assert_no_full_range(plan)


def test_repapq_without_learning_is_plain_int8(folder: Path) -> None:
    made(folder, REPAPQ.without_learning, "start.onnx")
    made(folder, replace(PLAIN_INT8, images=COUNT), "plain.onnx")
    assert (folder / "start.onnx").read_bytes() == (folder / "plain.onnx").read_bytes()


def test_repapq_is_supervised_by_stages_with_mae(folder: Path) -> None:
    learning = REPAPQ.learning
    assert learning is not None
    assert (learning.rounding, learning.affine, learning.steps) == (True, True, True)
    assert (learning.loss, learning.stage_weight, learning.iterations) == ("mae", 1.0, 8)
    made(folder, REPAPQ, "with.onnx")
    made(folder, replace(REPAPQ, learn=replace(learning, stage_weight=0.0)), "without.onnx")
    assert (folder / "with.onnx").read_bytes() != (folder / "without.onnx").read_bytes()


def test_both_papers_together(folder: Path) -> None:
    both = replace(REPAPQ, split="coarse-fine", threshold=ThresholdOptions("kl"))
    report = made(folder, both, "both.onnx")
    assert {split.layer for split in report.splits} == {*LAYERS}
    assert report.threshold == "kl"
    assert report.learned is not None
    made(folder, CFWS, "cfws.onnx")
    before, after = (plan_of(folder, name).weights for name in ("cfws.onnx", "both.onnx"))
    assert any(not np.array_equal(after[name].codes, before[name].codes) for name in before)


# Options come before the recipe ------------------------------------------------------------------

OVERRIDES: dict[str, Any] = {
    "threshold": ThresholdOptions("mse"),
    "equalize": True,
    "split": "identity",
    "split_precision": "int8",
    "full_range": True,
    "correct_bias": True,
    "rounding": "gptq",
    "qprep": False,
}


@pytest.mark.parametrize("recipe", ["cfws", "repapq"])
def test_an_option_takes_the_place_of_one_part(recipe: Recipe) -> None:
    plain = CalibrateOptions(recipe=recipe)
    assert plain.parts == RECIPES[recipe]
    assert OVERRIDES.keys() | {"learn"} == {item.name for item in fields(Parts)}
    for name, value in OVERRIDES.items():
        changed = replace(plain, **{name: value}).parts
        assert changed == replace(RECIPES[recipe], **{name: value})


def test_auto_can_be_asked_for() -> None:
    options = replace(CFWS, threshold=ThresholdOptions("auto"), split="auto")
    assert options.is_auto
    assert (options.split_form, options.parts.split) == ("none", "auto")


def test_what_our_recipes_are_has_not_changed() -> None:
    for recipe in get_args(Effort):
        parts = CalibrateOptions(recipe=recipe).parts
        assert parts.threshold == ThresholdOptions("auto")
        assert (parts.equalize, parts.full_range, parts.correct_bias) == (True, True, True)
        assert (parts.split, parts.split_precision) == ("auto", None)
        assert parts.rounding == ("gptq" if recipe == "fast" else "learned")


def test_cfws_learns_nothing() -> None:
    with pytest.raises(ConfigError, match="iterations: nothing is learned with recipe='cfws'"):
        replace(CFWS, iterations=5)
