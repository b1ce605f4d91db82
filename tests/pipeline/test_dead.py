"""Tensors that are 0 on all calibration images: named, in float, and refused where all depends."""

import dataclasses
import logging
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import reptrt
from reptrt.core.errors import CalibrationError
from reptrt.graph.model import Model
from reptrt.pipeline import PLAIN_INT8, CalibrateOptions
from reptrt.pipeline.values import Calibrated
from tests.support.helpers import ort_run
from tests.support.onnx_nets import Builder, plain_chain

COUNT = 40
PIXELS = np.random.default_rng(3).integers(0, 256, (COUNT, 3, 8, 8), dtype=np.uint8)
PLAIN = dataclasses.replace(PLAIN_INT8, images=COUNT)
WHOLE = CalibrateOptions(images=COUNT)
IDENTITY = dataclasses.replace(PLAIN, split="identity-scalar", split_precision="int8")


def kill(model: onnx.ModelProto, layer: str) -> onnx.ModelProto:
    """Give a layer such a bias that the ReLU behind it is 0 on all images."""
    for tensor in model.graph.initializer:
        if tensor.name == f"{layer}.bias":
            shape = numpy_helper.to_array(tensor).shape
            tensor.CopyFrom(numpy_helper.from_array(np.full(shape, -1e3, np.float32), tensor.name))
    return model


def gated() -> onnx.ModelProto:
    """A squeeze-excite gate whose squeeze is dead."""
    b = Builder()
    y = b.relu(b.conv("x", 8, "c1"))
    pooled = b.node("GlobalAveragePool", [y], "squeeze")
    gate = b.conv(b.relu(b.conv(pooled, 4, "down", 1, pads=[0] * 4)), 8, "up", 1, pads=[0] * 4)
    y = b.node("Mul", [y, b.node("Sigmoid", [gate], "gate")], "scaled")
    return kill(b.model(b.head(b.relu(b.conv(y, 8, "c2")))), "down")


def added() -> onnx.ModelProto:
    """A residual sum whose main branch is dead; without it, the skip has the convolution."""
    b = Builder()
    y = b.relu(b.conv("x", 8, "c1"))
    dead = b.conv(b.relu(b.conv(y, 8, "down")), 8, "up")
    y = b.node("Add", [b.conv(y, 8, "side", 1, pads=[0] * 4), dead], "add")
    return kill(b.model(b.head(b.relu(b.conv(b.relu(y), 8, "c2")))), "down")


def skipped() -> onnx.ModelProto:
    """A residual sum whose skip is dead."""
    b = Builder()
    y = b.relu(b.conv("x", 8, "c1"))
    y = b.node("Add", [b.conv(y, 8, "main"), b.relu(b.conv(y, 8, "down"))], "add")
    return kill(b.model(b.head(b.relu(b.conv(b.relu(y), 8, "c2")))), "down")


def joined() -> onnx.ModelProto:
    """One of two inputs of a Concat is dead: it shares the scale of the other."""
    b = Builder()
    first, second = b.relu(b.conv("x", 8, "c1")), b.relu(b.conv("x", 8, "down"))
    y = b.node("Concat", [first, second], "cat", axis=1)
    b.channels["cat"] = 16
    return kill(b.model(b.head(b.relu(b.conv(y, 8, "c2")))), "down")


def pooled() -> onnx.ModelProto:
    """A dead tensor that is only pooled and moved before the layer that reads it."""
    b = Builder()
    y = b.relu(b.conv("x", 8, "c1"))
    dead = b.node("MaxPool", [b.relu(b.conv(y, 8, "down"))], "max", kernel_shape=[1, 1])
    y = b.node("Add", [b.conv(y, 8, "side"), b.conv(dead, 8, "up")], "add")
    return kill(b.model(b.head(b.relu(b.conv(b.relu(y), 8, "c2")))), "down")


NETS: dict[Callable[[], onnx.ModelProto], tuple[set[str], set[str]]] = {
    gated: ({"down.relu"}, {"up"}),
    added: ({"down.relu"}, {"up"}),
    skipped: ({"down.relu"}, set()),
    joined: (set(), set()),
    pooled: ({"down.relu"}, {"up"}),
}


def in_memory(model: onnx.ModelProto) -> Model:
    return Model(name="net.onnx", proto=model, sha256="0" * 64)


def calibrated(
    model: onnx.ModelProto, options: CalibrateOptions, pixels: np.ndarray = PIXELS
) -> Calibrated:
    return reptrt.calibrate(in_memory(model), pixels, options=options)


@pytest.mark.parametrize("options", [PLAIN, WHOLE, IDENTITY], ids=["plain", "whole", "identity"])
@pytest.mark.parametrize("make", list(NETS), ids=lambda make: make.__name__)
def test_it_is_named_and_its_layers_stay_in_float(
    make: Callable[[], onnx.ModelProto], options: CalibrateOptions
) -> None:
    dead, idle = NETS[make]
    model = make()
    int8 = calibrated(model, options)
    report = int8.report
    assert (set(report.dead), set(report.idle)) == (dead, idle)
    assert not report.excluded
    assert report.left_float.keys() == {
        label for label, names in (("0 on all images", dead), ("so in float", idle)) if names
    }
    weighted = {tensor.tensor for tensor in report.tensors}
    assert weighted.isdisjoint(dead)
    assert report.to_dict()["dead"] == tuple(report.dead)
    x = PIXELS.astype(np.float32) / 255
    exact = ort_run(model, {"x": x})["head"]
    assert reptrt.lint(int8).has_errors is False
    noise = np.square(np.asarray(int8(PIXELS)) - exact).sum() / np.square(exact).sum()
    assert noise < 0.01


def test_diagnosis_of_a_net_with_a_dead_gate() -> None:
    diagnosis = reptrt.diagnose(in_memory(gated()), PIXELS, options=WHOLE)
    assert {layer.layer for layer in diagnosis.layers} >= {"c1", "down", "c2"}
    assert "up" not in {layer.layer for layer in diagnosis.layers}


def test_a_dead_trunk_is_refused() -> None:
    message = r"c1\.relu: is 0 on all 40 images, and no output depends on them but through it"
    with pytest.raises(CalibrationError, match=message):
        calibrated(kill(plain_chain(), "c1"), PLAIN)


def test_black_images(caplog: pytest.LogCaptureFixture) -> None:
    """Where black is 0 nothing can be measured; elsewhere the ranges of one image are."""
    black = np.zeros_like(PIXELS)
    with pytest.raises(CalibrationError, match=r"x: is 0 on all 40 images.*check the images"):
        calibrated(plain_chain(), PLAIN, black)
    with caplog.at_level(logging.WARNING):
        calibrated(plain_chain(), PLAIN, black + 7)
    assert "all 40 images are equal" in caplog.text
