"""The mean of a distribution over bins is arithmetic, not a layer."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from reptrt.graph.heads import heads_of
from reptrt.graph.net import constant_of, model_from_net, net_from_model, weighted_nodes
from reptrt.pipeline.calibrating import float_model
from reptrt.rewrite.sum_bins import sum_bins
from tests.support.helpers import ort_run
from tests.support.onnx_nets import Builder

BINS = 16
X = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)


def detector(
    op: str = "Conv", weight: np.ndarray | None = None, spread: str = "Softmax", moved: bool = True
) -> onnx.ModelProto:
    """Sides (N, 4, A) from bins (N, 4 R, H, W), as YOLOv8 writes them; and logits."""
    b = Builder(channels=4)
    bins = b.conv("x", 4 * BINS, "bins")
    shape = [b.constant("split", np.int64([0, 4, BINS, 64]))]
    split = b.node("Reshape", [bins, *shape], "split.bins")
    weight = np.arange(BINS, dtype=np.float32) if weight is None else weight
    last = op == "MatMul"
    order = [0, 1, 3, 2] if last else [0, 2, 1, 3]
    turned = b.node("Transpose", [split], "turned", perm=order)
    axis = {"axis": -1 if last else 1} if spread == "Softmax" else {}
    p = b.node(spread, [turned], "p", **axis)
    if moved:
        p = b.node("Identity", [p], "same")
    b.constant("numbers", weight.reshape((BINS, -1) if last else (-1, BINS, 1, 1)))
    sides = b.node(op, [p, "numbers"], "mean", **({} if last else {"kernel_shape": [1, 1]}))
    return b.model(sides, b.conv("x", 3, "logits"))


@pytest.mark.parametrize("op", ["Conv", "MatMul"])
@pytest.mark.parametrize("moved", [False, True], ids=["direct", "moved"])
def test_a_mean_becomes_a_product_and_a_sum(op: str, moved: bool) -> None:
    model = detector(op, moved=moved)
    net = net_from_model(model)
    assert sum_bins(net).changed == ("mean",)
    assert [node.name for node in weighted_nodes(net.graph)] == ["bins", "logits"]
    before, after = ort_run(model, {"x": X}), ort_run(model_from_net(net), {"x": X})
    assert list(before) == list(after)
    for name, value in before.items():
        assert after[name].shape == value.shape
        np.testing.assert_allclose(after[name], value, rtol=1e-5, atol=1e-5)


def test_a_mean_in_int8_would_cost_a_part_of_a_cell_and_is_float(tmp_path: Path) -> None:
    """The step of UINT8 probabilities, times the bins, summed: what the rewrite saves."""
    onnx.save(detector(), tmp_path / "net.onnx")
    net = float_model(tmp_path / "net.onnx").to_net()
    assert {node.op for node in weighted_nodes(net.graph)} == {"Conv"}
    assert len(weighted_nodes(net.graph)) == 2
    assert "mean" not in heads_of(net).names
    generator = np.random.default_rng(0)
    p = generator.dirichlet(np.full(BINS, 0.2), 1000)
    codes = np.rint(p * 255) / 255
    errors = (codes - p) @ np.arange(BINS)
    assert np.sqrt(np.mean(errors**2)) > 0.01  # of a cell, which has up to 32 pixels


@pytest.mark.parametrize(
    "model",
    [
        detector(weight=np.arange(BINS, dtype=np.float32) + 1),
        detector(weight=np.arange(2 * BINS, dtype=np.float32) % BINS),
        detector(spread="Sigmoid"),
        detector("MatMul", weight=np.arange(2 * BINS, dtype=np.float32)),
    ],
    ids=["other numbers", "two outputs", "sigmoid", "matrix"],
)
def test_other_layers_stay(model: onnx.ModelProto) -> None:
    net = net_from_model(model)
    assert sum_bins(net).changed == ()
    assert constant_of(net.graph.tensors()["numbers"]).size >= BINS


def test_a_bias_or_padding_is_no_mean() -> None:
    for change in ("bias", "pads", "strides"):
        model = detector()
        node = next(node for node in model.graph.node if node.name == "mean")
        if change == "bias":
            model.graph.initializer.append(
                onnx.numpy_helper.from_array(np.ones(1, np.float32), "shift")
            )
            node.input.append("shift")
        else:
            values = [1] * 4 if change == "pads" else [2, 2]
            node.attribute.append(onnx.helper.make_attribute(change, values))
        assert sum_bins(net_from_model(model)).changed == ()
