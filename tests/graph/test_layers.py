"""Weights and biases of layers: axes, sums, constants added."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from reptrt.graph.layers import add_to_bias, has_bias, output_axis, weight_sums
from reptrt.graph.net import Net, model_from_net
from tests.support.helpers import ort_run

F32 = np.float32


@pytest.mark.parametrize(
    ("op", "attrs", "rank", "axis"),
    [
        ("Conv", {}, 4, 0),
        ("ConvTranspose", {}, 4, 1),
        ("Gemm", {"transB": 1}, 2, 0),
        ("Gemm", {}, 2, 1),
        ("MatMul", {}, 2, 1),
        ("MatMul", {}, 3, 2),
    ],
)
def test_axis_of_the_output_channels(op: str, attrs: dict[str, int], rank: int, axis: int) -> None:
    assert output_axis(gs.Node(op, "n", attrs), rank) == axis


def one_layer(op: str, weight: np.ndarray, *bias: np.ndarray, **attrs: object) -> Net:
    """x -> the layer "layer" -> y."""
    channels = 2 * int(attrs.get("group", 1)) if op == "Conv" else 2
    shape = ["N", 2] if op == "Gemm" else ["N", channels, 1, 1]
    x, y = gs.Variable("x", F32, shape), gs.Variable("y", F32)
    constants = [gs.Constant(f"c{i}", v.astype(F32)) for i, v in enumerate((weight, *bias))]
    node = gs.Node(op, "layer", attrs, [x, *constants], [y])
    return Net(gs.Graph([node], inputs=[x], outputs=[y], opset=17, ir_version=9, name="g"))


LAYERS = {
    "conv": one_layer("Conv", np.ones((3, 2, 1, 1))),
    "conv with groups": one_layer("Conv", np.ones((4, 2, 1, 1)), np.arange(4), group=2),
    "transposed": one_layer("ConvTranspose", np.ones((2, 3, 1, 1)), np.arange(6), group=2),
    "gemm": one_layer("Gemm", np.ones((2, 3)), np.ones((1, 3)), beta=2.0),
    "gemm with one bias": one_layer("Gemm", np.ones((3, 2)), np.ones(1), transB=1, alpha=3.0),
    "gemm without bias": one_layer("Gemm", np.ones((2, 3)), beta=2.0),
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_added_to_a_bias_is_added_to_the_output(name: str) -> None:
    net = LAYERS[name].copy()
    node = net.graph.nodes[0]
    x = np.random.default_rng(0).standard_normal((3, *node.inputs[0].shape[1:])).astype(F32)
    before = ort_run(model_from_net(net.copy()), {"x": x})["y"]
    channels = before.shape[1]
    delta = np.linspace(-1, 2, channels)
    add_to_bias(net, node, delta)
    assert has_bias(node)
    after = ort_run(model_from_net(net), {"x": x})["y"]
    expected = before + delta.reshape(1, -1, *[1] * (before.ndim - 2))
    np.testing.assert_allclose(after, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["conv", "gemm", "gemm with one bias"])
def test_the_sum_of_the_weights_is_the_output_for_ones(name: str) -> None:
    net = LAYERS[name].copy()
    node = net.graph.nodes[0]
    x = np.ones((1, *node.inputs[0].shape[1:]), F32)
    zeros = np.zeros_like(x)
    out, bias = (ort_run(model_from_net(net.copy()), {"x": v})["y"] for v in (x, zeros))
    np.testing.assert_allclose((out - bias).ravel(), weight_sums(node), rtol=1e-6)
