"""Nets that amplify the rounding of their images are said to be ill-conditioned; others are not."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

import reptrt
from reptrt.core.metrics import sqnr_db
from reptrt.data.dataset import open_dataset
from reptrt.data.from_user import images_from
from reptrt.demo import digits
from reptrt.execute.runner import OrtRunner
from reptrt.graph.model import Model
from reptrt.graph.preprocess import Preprocess
from reptrt.judge.conditioning import LEAST_DB, Conditioning, with_pixel_noise
from reptrt.judge.rungs import Step, measure
from tests.support.onnx_nets import Builder
from tests.support.timm_nets import timm_net

GENERATOR = np.random.default_rng(4)
# Flat images with a texture of one grey level.
PIXELS = GENERATOR.integers(40, 200, (48, 3, 1, 1)) + GENERATOR.integers(0, 2, (48, 3, 8, 8))
IMAGES = PIXELS.astype(np.uint8)
PREPROCESS = Preprocess(3, 8, 8, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def net(*, high_pass: bool) -> Model:
    """Averages, or differences between a pixel and its neighbours, in a small net."""
    b = Builder()
    y = b.conv("x", 8, "c1", pads=[0] * 4)
    weight = onnx.numpy_helper.to_array(b.constants[0]).copy()
    if high_pass:
        weight -= weight.mean((2, 3), keepdims=True)
    b.constants[0].CopyFrom(onnx.numpy_helper.from_array(weight, b.constants[0].name))
    b.constants[1].CopyFrom(onnx.numpy_helper.from_array(np.zeros(8, np.float32), "c1.bias"))
    b.channels[y] = 8
    model = b.model(b.head(b.relu(b.conv(b.relu(y), 8, "c2"))))
    for constant in model.graph.initializer:
        if constant.name in ("c2.bias", "head.bias"):
            zeros = np.zeros_like(onnx.numpy_helper.to_array(constant))
            constant.CopyFrom(onnx.numpy_helper.from_array(zeros, constant.name))
    return Model(name="net.onnx", proto=model, sha256="0" * 64)


@pytest.mark.parametrize("high_pass", [False, True])
def test_eval_diagnose_and_ladder_say_it(high_pass: bool) -> None:
    model = net(high_pass=high_pass)
    int8 = reptrt.calibrate(model, IMAGES, images=48)
    report = reptrt.evaluate([int8], IMAGES, reference=model, task="any")
    diagnosis = reptrt.diagnose(model, IMAGES, images=48)
    dataset = open_dataset(images_from(IMAGES, labels=False), model.preprocess)
    ladder = measure([Step("float", "onnxruntime", lambda: OrtRunner(model))], dataset)
    assert report.noise_db == pytest.approx(ladder.noise_db, abs=1e-3)
    assert report.noise_db == pytest.approx(diagnosis.noise_db, abs=0.5)  # other images
    assert (report.noise_db < LEAST_DB) is high_pass
    text = "ill-conditioned: one grey level at one pixel in twelve moves the float net's outputs to"
    for said in (str(report), str(ladder), "\n".join(diagnosis.reading)):
        assert (text in said) is high_pass
    for content in (report.to_dict(), ladder.to_dict()):
        assert (json.loads(json.dumps(content))["ill_conditioned"] is not None) is high_pass


def test_without_a_reference_nothing_is_said() -> None:
    report = reptrt.evaluate([net(high_pass=True)], IMAGES, task="any")
    assert report.noise_db is None
    assert report.to_dict()["ill_conditioned"] is None


def test_the_measure_is_that_of_the_first_images_in_batches_of_any_size() -> None:
    model = net(high_pass=False)
    reports = [
        reptrt.evaluate([model], IMAGES[:n], reference=model, task="any", batch_size=size)
        for n, size in ((48, 1), (48, 64), (48, 7), (16, 5))
    ]
    assert len({round(report.noise_db, 3) for report in reports}) == 1


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("values", ["normalized", "pixels", "bytes"])
def test_the_noise_is_that_of_rounding(layout: str, values: str) -> None:
    preprocess = replace(PREPROCESS, layout=layout)
    if values != "normalized":
        preprocess = replace(preprocess, values=values, mean=(0.0,) * 3, std=(1.0,) * 3)
    dataset = open_dataset(images_from(IMAGES, labels=False), preprocess)
    batch = next(dataset.batches(48))
    noise = with_pixel_noise(batch, preprocess, np.random.default_rng(0)) - batch
    level = 1.0 if values != "normalized" else 1 / (255 * np.array(preprocess.std))
    if layout == "NCHW" and values == "normalized":
        level = level[:, None, None]
    levels = noise / level
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-3)
    assert np.abs(levels).max() == pytest.approx(1, abs=1e-3)
    assert np.square(levels).mean() == pytest.approx(1 / 12, rel=0.1)


def test_pixels_stay_pixels() -> None:
    preprocess = replace(PREPROCESS, values="bytes", mean=(0.0,) * 3, std=(1.0,) * 3)
    batch = GENERATOR.choice([0.0, 255.0], (4, 3, 8, 8)).astype(np.float32)
    noisy = with_pixel_noise(batch, preprocess, np.random.default_rng(0))
    assert noisy.min() >= 0
    assert noisy.max() <= 255


def test_a_trained_net_is_well_conditioned() -> None:
    exported = reptrt.export(
        "repvgg",
        weights=digits.WEIGHTS,
        input_size=digits.INPUT_SIZE,
        mean=digits.MEAN,
        std=digits.STD,
        **digits_architecture(),
    )
    held_out = digits.load_digits().held_out
    report = reptrt.evaluate([exported], (held_out.x, held_out.y), reference=exported)
    assert report.noise_db > 35
    assert report.to_lines() == []


def digits_architecture() -> dict[str, object]:
    fields = ("widths", "blocks", "strides", "num_classes")
    return {name: getattr(digits.ARCHITECTURE, name) for name in fields}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "is_ill"), [("mobileone_s4", True), ("mobileone_s0", False)])
def test_mobileone_with_random_statistics(name: str, is_ill: bool) -> None:
    """S4 with random batch norms on noise, 1 dB with quantized activations alone."""
    module = timm_net(name)
    preprocess = Preprocess(3, 128, 128, (0.45,) * 3, (0.225,) * 3)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 128, 128)).astype(np.float32)
    images = (pixels / 255 - 0.45) / np.float32(0.225)

    def run(batch: np.ndarray) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            return {"logits": module(torch.from_numpy(batch)).numpy()}

    conditioning = Conditioning(preprocess)
    conditioning.add(images, run(images), run)
    assert conditioning.sqnr_db is not None
    assert (conditioning.sqnr_db < LEAST_DB) is is_ill
    noisy = with_pixel_noise(images, preprocess, np.random.default_rng(0))
    exact = run(images)["logits"]
    assert conditioning.sqnr_db == pytest.approx(sqnr_db(exact, run(noisy)["logits"]), abs=1e-3)
