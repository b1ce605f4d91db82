"""Exporters' leftovers go, values and output names stay."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

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


def constant_node(b: Builder, name: str, value: np.ndarray) -> str:
    b.nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value)))
    b.channels[name] = 0
    return name


def weight_through_identity() -> onnx.ModelProto:
    b = Builder(channels=4)
    weight = b.node("Identity", [b.parameter("w0", 4, 4, 3, 3)], "w")
    return b.model(b.node("Conv", ["x", weight], "c", kernel_shape=[3, 3]))


def weight_from_a_constant_node() -> onnx.ModelProto:
    b = Builder(channels=4)
    weight = constant_node(b, "w", b.rng.standard_normal((4, 4, 1, 1)).astype(np.float32))
    return b.model(b.node("Conv", ["x", weight], "c"))


def scaled_weight() -> onnx.ModelProto:
    """Weight normalization, as it is exported: arithmetic on constants."""
    b = Builder(channels=4)
    axes = b.constant("axes", np.int64([1, 2, 3]))
    norm = b.node("ReduceL2", [b.parameter("v", 4, 4, 3, 3), axes], "norm")
    unit = b.node("Div", ["v", norm], "unit")
    weight = b.node("Mul", [unit, b.parameter("g", 4, 1, 1, 1)], "w")
    return b.model(b.node("Conv", ["x", weight], "c", kernel_shape=[3, 3]))


def shape_by_concat() -> onnx.ModelProto:
    b = Builder(channels=4)
    shape = b.node(
        "Concat",
        [b.constant("n", np.int64([-1])), b.constant("k", np.int64([256]))],
        "shape",
        axis=0,
    )
    return b.model(b.node("Reshape", ["x", shape], "flat"))


FOLDED: dict[str, Callable[[], onnx.ModelProto]] = {
    "identity": weight_through_identity,
    "constant node": weight_from_a_constant_node,
    "weight norm": scaled_weight,
    "shape": shape_by_concat,
}


@pytest.mark.parametrize("name", list(FOLDED))
def test_what_depends_on_constants_alone_becomes_an_initializer(name: str) -> None:
    assert len(simplified(FOLDED[name]()).graph.nodes) == 1


def test_a_constant_output_stays() -> None:
    b = Builder(channels=4)
    doubled = b.node("Add", [b.parameter("p", 4), "p"], "doubled")
    assert "doubled" in [t.name for t in simplified(b.model(b.relu("x"), doubled)).graph.outputs]


def test_quantized_weights_are_not_evaluated() -> None:
    b = Builder(channels=4)
    b.constant("q", np.ones((4, 4, 1, 1), np.int8))
    b.constant("s", np.float32(0.5))
    weight = b.node("DequantizeLinear", ["q", "s"], "w")
    net = simplified(b.model(b.node("Conv", ["x", weight], "c")))
    assert ops(net) == ["DequantizeLinear", "Conv"]


def test_what_cannot_be_evaluated_stays() -> None:
    """A node from another domain, a random one, one with several outputs."""
    b = Builder(channels=4)
    noise = b.node("RandomNormalLike", [b.parameter("p", 4, 1, 1)], "noise", seed=1.0)
    b.nodes.append(helper.make_node("Split", ["p2"], ["h1", "h2"], axis=0, num_outputs=2))
    b.parameter("p2", 8, 1, 1)
    b.channels |= {"h1": 0, "h2": 0}
    y = b.node("Mul", [b.node("Mul", ["x", "h1"], "m1"), "h2"], "m2")
    model = b.model(y, b.node("Mul", ["x", noise], "n"))
    net = net_from_model(model)
    simplify(net)
    assert ops(net).count("Split") == 1
    assert ops(net).count("RandomNormalLike") == 1


def test_branches_that_read_from_outside_stay() -> None:
    b = Builder(channels=4)
    b.constant("condition", np.bool_(True))
    b.constant("k", np.ones((1, 4, 1, 1), np.float32))
    b.relu("x")
    branches = {
        role: helper.make_graph(
            [helper.make_node(op, ["x.relu", "k"], [role], name=role)],
            role,
            [],
            [helper.make_tensor_value_info(role, onnx.TensorProto.FLOAT, None)],
        )
        for role, op in (("then_branch", "Add"), ("else_branch", "Mul"))
    }
    b.nodes.append(helper.make_node("If", ["condition"], ["r"], name="if", **branches))
    b.channels["r"] = 4
    assert ops(simplified(b.model(b.node("Add", ["x", "r"], "y")))) == ["Relu", "If", "Add"]


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
