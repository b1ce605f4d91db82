"""Q/DQ graphs: onnxruntime, torch and numpy agree on what every code is."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from reptrt.core.errors import CalibrationError
from reptrt.core.grid import Grid, channel_amax, dequantize
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import model_from_net, net_from_model
from reptrt.graph.placement import place
from reptrt.graph.plan import QuantPlan
from reptrt.graph.qdq import insert_qdq, quantize_weight, quantize_weights
from tests.support.helpers import ort_run
from tests.support.onnx_nets import Builder, basic_block, plain_chain, without_names
from tests.support.qdq_nets import images, quantized, residual_net, with_outputs

NETS = {
    "plain": plain_chain,
    "block": basic_block,
    "downsample": lambda: basic_block(downsample=True),
    "everything": residual_net,
    "unnamed": lambda: without_names(basic_block()),
}


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def code_names(model: onnx.ModelProto) -> list[str]:
    return [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]


@pytest.mark.parametrize("name", list(NETS))
def test_torch_and_onnxruntime_see_the_same_codes(name: str) -> None:
    x = images(size=8)
    model = quantized(NETS[name](), x)
    names = code_names(model)
    expected = ort_run(with_outputs(model, names), {"x": x}, optimize=False)
    output = model.graph.output[0].name
    with torch.inference_mode():
        got = TorchGraph(model).run({"x": torch.from_numpy(x)}, [*names, output])
    for tensor in names:
        codes = got[tensor].numpy()
        assert codes.dtype == expected[tensor].dtype == np.int8
        difference = np.abs(codes.astype(int) - expected[tensor])
        # the two sum up float32 products in another order: a value on the border between two
        # codes may fall on either side, and what depends on it moves with it
        assert difference.max(initial=0) <= 1
        assert (difference > 0).mean() <= 2e-3
    # one such code moves a logit by at most one step of the last layer's accumulator
    scale = max(float(np.abs(expected[output]).max()), 1e-3)
    np.testing.assert_allclose(got[output].numpy(), expected[output], rtol=0, atol=2e-2 * scale)


@pytest.mark.parametrize("name", list(NETS))
def test_codes_are_those_of_the_formula(name: str) -> None:
    """What reaches a Q, divided by its scale in numpy, is what comes out of it."""
    x = images()
    model = quantized(NETS[name](), x)
    quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    tensors = [t for node in quantizers for t in (node.input[0], node.output[0])]
    values = ort_run(with_outputs(model, tensors), {"x": x}, optimize=False) | {"x": x}
    known = constants(model)
    for node in quantizers:
        scale, zero_point = (known[t] for t in node.input[1:])
        assert scale.dtype == np.float32
        assert scale.shape == ()
        assert zero_point.dtype == np.int8
        assert zero_point == 0
        codes = np.clip(np.rint(values[node.input[0]] / scale), -128, 127)
        np.testing.assert_array_equal(values[node.output[0]], codes.astype(np.int8))


def test_the_form_of_the_graph() -> None:
    float_model = residual_net()
    model = quantized(float_model, images())
    known, original = constants(model), constants(float_model)
    makers = {node.output[0]: node for node in model.graph.node}
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == sum(n.op_type in ("Conv", "Gemm") for n in float_model.graph.node)
    for layer in layers:
        activation, weight = (makers[tensor] for tensor in layer.input[:2])
        while activation.op_type in ("MaxPool", "Flatten"):  # the pair goes before them
            activation = makers[activation.input[0]]
        assert activation.op_type == weight.op_type == "DequantizeLinear"
        assert makers[activation.input[0]].op_type == "QuantizeLinear"
        codes, scale, zero_point = (known[tensor] for tensor in weight.input)
        assert codes.dtype == zero_point.dtype == np.int8
        assert not zero_point.any()
        assert codes.min() >= -127
        assert [a.i for a in weight.attribute if a.name == "axis"] == [0]
        values = original[f"{layer.name}.weight"]
        np.testing.assert_allclose(scale, channel_amax(values, 0) / 127, rtol=1e-6)
        assert np.abs(dequantize(codes, scale, 0) - values).max() <= scale.max() / 2 * (1 + 1e-4)
        bias = known[layer.input[2]]
        assert bias.dtype == np.float32
        np.testing.assert_array_equal(bias, original[f"{layer.name}.bias"])
    assert not [t for t in model.graph.initializer if t.data_type == TensorProto.UINT8]


def test_tensors_of_a_concat_have_one_scale() -> None:
    known = constants(quantized(residual_net(), images()))
    scales = {known[f"{t}.scale"].item() for t in ("left.relu", "right.clip", "cat")}
    assert len(scales) == 1


@pytest.mark.parametrize("bits", [2, 4, 6, 7])
def test_fewer_bits_are_simulated_inside_int8(bits: int) -> None:
    x = images()
    model = quantized(residual_net(), x, bits=bits)
    names = code_names(model)
    codes = ort_run(with_outputs(model, names), {"x": 4 * x}, optimize=False)
    limits = [(int(codes[name].min()), int(codes[name].max())) for name in names]
    assert all(low >= -(2 ** (bits - 1)) for low, _ in limits)
    assert all(high <= 2 ** (bits - 1) - 1 for _, high in limits)
    assert limits[names.index("x.q")] == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)  # 4 x saturates
    for node in model.graph.node:
        if node.name.endswith(".weight.dequantize"):
            assert np.abs(constants(model)[node.input[0]]).max() <= 2 ** (bits - 1) - 1


def test_more_bits_are_closer() -> None:
    x = images(16)
    exact = ort_run(residual_net(), {"x": x})["head"]
    errors = [
        float(
            np.square(ort_run(quantized(residual_net(), x, bits=b), {"x": x})["head"] - exact).sum()
        )
        for b in (4, 6, 8)
    ]
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


def test_excluded_layers_keep_their_float_weights() -> None:
    model = quantized(basic_block(), images(), exclude=("c2",))
    (layer,) = (node for node in model.graph.node if node.name == "c2")
    assert layer.input[0] == "c1.relu"
    np.testing.assert_array_equal(
        constants(model)[layer.input[1]], constants(basic_block())["c2.weight"]
    )


def test_two_layers_with_one_weight_get_codes_of_their_own() -> None:
    b = Builder(channels=4)
    weight, bias = b.parameter("w", 4, 4, 3, 3), b.parameter("b", 4)
    y = b.node("Conv", ["x", weight, bias], "c1", kernel_shape=[3, 3], pads=[1] * 4)
    y = b.node("Conv", [b.relu(y), weight, bias], "c2", kernel_shape=[3, 3], pads=[1] * 4)
    x = images(channels=4)
    model = quantized(b.model(b.head(b.relu(y))), x)
    known = constants(model)
    np.testing.assert_array_equal(known["c1.weight.q"], known["c2.weight.q"])
    assert np.isfinite(ort_run(model, {"x": x})["head"]).all()


def test_names_of_pairs_that_the_graph_has_already_do_not_collide() -> None:
    """A tensor ``x`` and a parameter ``x.scale`` (a layer scale, say) in one graph."""
    b = Builder(channels=4)
    y = b.node("Mul", [b.relu(b.conv("x", 4, "c1")), b.parameter("x.scale", 4, 1, 1)], "scaled")
    float_model = b.model(b.head(b.relu(b.conv(y, 4, "c2"))))
    x = images(channels=4)
    model = quantized(float_model, x)
    np.testing.assert_array_equal(
        next(v for v in constants(model).values() if v.shape == (4, 1, 1)),
        constants(float_model)["x.scale"],
    )
    exact, got = (ort_run(m, {"x": x})["head"] for m in (float_model, model))
    assert np.abs(got - exact).max() <= 0.1 * np.abs(exact).max()


def test_quantize_weight_rounds_to_nearest_per_channel() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    weight[2] = 0
    for axis in (0, 1):
        quantized_weight = quantize_weight(weight, axis, Grid.weight(8))
        assert quantized_weight.scale.shape == (weight.shape[axis],)
        values = dequantize(quantized_weight.codes, quantized_weight.scale, axis)
        step = np.moveaxis(np.ones_like(weight), axis, -1) * quantized_weight.scale
        error = np.abs(values - weight)
        assert (error <= np.moveaxis(step, -1, axis) / 2 * (1 + 1e-4)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(bad: float) -> None:
    net = net_from_model(plain_chain())
    weight = net.graph.nodes[2].inputs[1]
    weight.values = np.where(weight.values > 1e9, 0, bad).astype(np.float32)
    with pytest.raises(CalibrationError, match=r"c2: the weight holds NaN or Inf"):
        quantize_weights(net, place(net), Grid.weight(8))


def test_the_same_input_gives_the_same_bytes() -> None:
    x = images()
    first, second = (quantized(residual_net(), x).SerializeToString() for _ in range(2))
    assert first == second


def test_an_empty_plan_changes_nothing() -> None:
    net = net_from_model(plain_chain())
    insert_qdq(net, QuantPlan({}, {}))
    assert [n.op_type for n in model_from_net(net).graph.node] == [
        n.op_type for n in plain_chain().graph.node
    ]
