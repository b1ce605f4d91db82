"""A ReLU behind a gate gets all codes; what is not used leaves no trace."""

import dataclasses

import numpy as np
import onnx
import pytest

import reptrt
from reptrt.core.metrics import sqnr_db
from reptrt.graph.model import Model
from reptrt.graph.net import model_from_net, net_from_model
from reptrt.graph.placement import place
from reptrt.pipeline import CalibrateOptions
from reptrt.pipeline.values import Calibrated
from reptrt.quantize.calib.options import ThresholdOptions
from reptrt.rewrite.insert_offsets import insert_offsets, remove_offsets
from tests.support.helpers import ort_run
from tests.support.onnx_nets import Builder

PIXELS = np.random.default_rng(3).integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
X = PIXELS.astype(np.float32) / 255
OPTIONS = CalibrateOptions(images=40, threshold=ThresholdOptions("max"))


def gated(*, read_twice: bool = False, by_constant: bool = False) -> onnx.ModelProto:
    """Conv -> product with a gate, or a constant factor -> ReLU -> conv."""
    b = Builder()
    y = b.relu(b.conv("x", 16, "c1"))
    y = b.conv(y, 16, "c2")
    gate = b.conv(b.node("GlobalAveragePool", [y], "squeeze"), 16, "excite", 1, pads=[0] * 4)
    factor = b.constant("f", np.float32(0.7)) if by_constant else b.node("Sigmoid", [gate], "gate")
    b.channels["f"] = 0
    y = b.relu(b.node("Mul", [y, factor], "scaled"))
    outputs = [b.head(b.relu(b.conv(y, 16, "c3")))]
    return b.model(*outputs, *([b.node("Exp", [y], "exp")] if read_twice else []))


def calibrated(model: onnx.ModelProto, **changes: object) -> Calibrated:
    options = dataclasses.replace(OPTIONS, **changes)
    made = Model(name="net.onnx", proto=model, sha256="0" * 64)
    return reptrt.calibrate(made, PIXELS, options=options)


def names_of(model: onnx.ModelProto) -> set[str]:
    return {node.name for node in model.graph.node}


def test_a_gated_tensor_gets_all_codes_and_no_node_more() -> None:
    model = gated()
    int8 = calibrated(model)
    assert "scaled.relu" in int8.report.full_range
    names = names_of(int8.proto)
    assert "scaled.relu.offset" in names
    assert "scaled.relu" not in names  # Q saturates in its place
    assert not reptrt.lint(int8).has_errors
    half = calibrated(model, full_range=False)
    exact = ort_run(model, {"x": X})["head"]
    ratios = [sqnr_db(exact, np.asarray(made(PIXELS))) for made in (int8, half)]
    assert ratios[0] > ratios[1] + 1  # dB
    assert ratios[0] > 35


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (gated(), {"full_range": False}),
        (gated(read_twice=True), {}),
        (gated(by_constant=True), {}),
    ],
    ids=["not asked for", "read in float", "a constant factor"],
)
def test_what_is_not_used_is_gone(model: onnx.ModelProto, changes: dict[str, object]) -> None:
    int8 = calibrated(model, **changes)
    assert "scaled.relu" in names_of(int8.proto)
    assert "scaled.relu.offset" not in names_of(int8.proto)
    assert "scaled.relu" not in int8.report.full_range


def test_outputs_stay_and_the_way_back_is_exact() -> None:
    model = gated()
    net = net_from_model(model)
    added = insert_offsets(net, place(net))
    assert added == ("scaled.relu.offset",)
    expected = ort_run(model, {"x": X})
    shifted = ort_run(model_from_net(net), {"x": X})
    np.testing.assert_allclose(shifted["head"], expected["head"], rtol=1e-6, atol=1e-6)
    kept = net.copy()
    remove_offsets(kept, added, ["scaled.relu"])
    assert added[0] in {node.name for node in kept.graph.nodes}
    remove_offsets(net, added, [])
    before = [(n.op, n.name) for n in net_from_model(model).graph.nodes]
    assert sorted((n.op, n.name) for n in net.graph.nodes) == sorted(before)
