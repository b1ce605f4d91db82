"""Exporters' leftovers go, values and output names stay."""

import numpy as np
import onnx
import pytest

from reptrt.core.errors import RewriteError
from reptrt.graph.net import Net, model_from_net, net_from_model
from reptrt.rewrite.simplify import narrow_to_float32, simplify
from tests.support.helpers import ort_run
from tests.support.onnx_nets import Builder

X = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32)


def simplified(model: onnx.ModelProto) -> Net:
    net = net_from_model(model)
    simplify(net)
    before, after = ort_run(model, {"x": X}), ort_run(model_from_net(net), {"x": X})
    assert list(before) == list(after)
    for name, value in before.items():
        # constants evaluated by numpy instead of onnxruntime: a few float32 roundings
        np.testing.assert_allclose(after[name], value, rtol=0, atol=1e-6 * np.abs(value).max())
    return net


def ops(net: Net) -> list[str]:
    return [node.op for node in net.graph.nodes]


def test_identity_and_dropout_are_bypassed() -> None:
    b = Builder(channels=4)
    y = b.node("Identity", ["x"], "i1")
    y = b.node("Identity", [b.node("Dropout", [b.relu(y)], "drop")], "i2")
    assert ops(simplified(b.model(b.conv(y, 4, "c")))) == ["Relu", "Conv"]


def test_an_identity_that_is_the_output_keeps_its_name() -> None:
    b = Builder(channels=4)
    net = simplified(b.model(b.node("Identity", [b.conv("x", 4, "c")], "out")))
    assert [tensor.name for tensor in net.graph.outputs] == ["out"]


def test_two_readers_of_an_identity() -> None:
    b = Builder(channels=4)
    same = b.node("Identity", [b.relu("x")], "same")
    net = simplified(b.model(b.node("Add", [b.conv(same, 4, "c"), same], "sum")))
    assert ops(net) == ["Relu", "Conv", "Add"]


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("shape", [(), (1,), (4, 1, 1), (1, 4, 1, 1)], ids=str)
def test_arithmetic_that_changes_nothing_is_bypassed(op: str, shape: tuple[int, ...]) -> None:
    b = Builder(channels=4)
    neutral = np.full(shape, 0.0 if op in ("Add", "Sub") else 1.0, np.float32)
    b.channels[b.constant("neutral", neutral)] = 0
    same = b.node(op, [b.relu("x"), "neutral"], "same")
    assert ops(simplified(b.model(b.conv(same, 4, "c")))) == ["Relu", "Conv"]


@pytest.mark.parametrize(
    ("op", "first", "value"),
    [("Sub", True, 0.0), ("Div", True, 1.0), ("Mul", False, 2.0), ("Add", False, 1e-30)],
    ids=["0 - x", "1 / x", "x * 2", "x + 1e-30"],
)
def test_arithmetic_that_changes_something_stays(op: str, first: bool, value: float) -> None:
    b = Builder(channels=4)
    b.channels[b.constant("k", np.float32(value))] = 0
    operands = ["k", "x"] if first else ["x", "k"]
    assert ops(simplified(b.model(b.relu(b.node(op, operands, "y"))))) == [op, "Relu"]


def test_a_constant_that_widens_its_operand_stays() -> None:
    b = Builder(channels=1)
    b.channels[b.constant("ones", np.ones((1, 4, 1, 1), np.float32))] = 4
    net = net_from_model(b.model(b.relu(b.node("Mul", ["x", "ones"], "wide"))))
    simplify(net)
    assert ops(net) == ["Mul", "Relu"]


def test_dropout_in_training_mode_is_refused() -> None:
    b = Builder(channels=4)
    ratio = b.constant("ratio", np.float32(0.5))
    training = b.constant("training", np.bool_(True))
    y = b.node("Dropout", ["x", ratio, training], "drop")
    with pytest.raises(RewriteError, match=r"drop: dropout in training mode.*net\.eval"):
        simplify(net_from_model(b.model(b.relu(y))))


def test_narrowing_rounds_what_layers_read_and_nothing_else() -> None:
    b = Builder(channels=4)
    b.conv("x", 4, "c")
    net = net_from_model(b.model(b.node("Mul", ["c", b.parameter("s", 4, 1, 1)], "y")))
    conv, mul = net.graph.nodes
    value = np.array([1 + 2.0**-30] * 4)
    conv.inputs[2].values = value
    mul.inputs[1].values = value.reshape(4, 1, 1)
    narrow_to_float32(net)
    assert conv.inputs[2].values.dtype == np.float32
    np.testing.assert_array_equal(conv.inputs[2].values, np.float32(value))
    assert mul.inputs[1].values.dtype == np.float64


@pytest.mark.parametrize("rule", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("size", [7, 8])
def test_padding_by_a_rule_becomes_numbers(rule: str, size: int) -> None:
    """As TensorFlow's exporter writes it: branches can then be compared and merged."""
    b = Builder(channels=4, size=size)
    for name, kernel in (("wide", 3), ("narrow", 1)):
        weight = b.parameter(f"{name}.weight", 4, 4, kernel, kernel)
        b.node("Conv", ["x", weight], name, auto_pad=rule, strides=[2, 2])
        b.channels[name] = 4
    model = b.model("wide", "narrow")
    net = net_from_model(model)
    simplify(net)
    x = {"x": np.random.default_rng(0).standard_normal((2, 4, size, size)).astype(np.float32)}
    before, after = ort_run(model, x), ort_run(model_from_net(net), x)
    for node in net.graph.nodes:
        assert "auto_pad" not in node.attrs
        np.testing.assert_allclose(after[node.name], before[node.name], rtol=1e-6, atol=1e-6)
    begin = {("SAME_LOWER", 8): 1, ("SAME_UPPER", 8): 0}.get((rule, size), int(rule != "VALID"))
    assert net.graph.nodes[0].attrs["pads"][0] == begin
