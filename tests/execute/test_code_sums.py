"""Sums of codes: exact, against integer arithmetic, and refused where float32 is too short."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from reptrt.execute.code_sums import sum_codes
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import Net, model_from_net
from tests.support.helpers import ort_run

F32 = np.float32


def layer(
    weight: np.ndarray,
    bias: np.ndarray,
    *,
    zero_point: np.ndarray,
    weight_zero_point: int = 0,
    step: float | None = None,
    in_channels: int,
    **attrs: object,
) -> Net:
    """DQ(x), DQ(W), b -> Conv -> y, or -> Q with a step -> DQ -> y; x are codes."""
    b = gs.Constant
    x = gs.Variable("x", zero_point.dtype, ["N", in_channels, 7, 6])
    dx, dw, y = (gs.Variable(name, F32) for name in ("dx", "dw", "conv"))
    scales = b("sw", np.linspace(0.01, 0.07, len(weight), dtype=F32))
    pair_x = [b("sx", np.array(0.037, F32)), b("z", zero_point)]
    nodes = [
        gs.Node("DequantizeLinear", "dqx", {}, [x, *pair_x], [dx]),
        gs.Node(
            "DequantizeLinear",
            "dqw",
            {"axis": 0},
            [
                b("w", weight),
                scales,
                b("zw", np.full(len(weight), weight_zero_point, weight.dtype)),
            ],
            [dw],
        ),
        gs.Node("Conv", "conv", attrs, [dx, dw, b("b", bias)], [y]),
    ]
    if step is not None:
        q, out = gs.Variable("q", np.uint8), gs.Variable("out", F32)
        pair = [b("sy", np.array(step, F32)), b("zy", np.array(3, np.uint8))]
        nodes.append(gs.Node("QuantizeLinear", "quantize", {}, [y, *pair], [q]))
        nodes.append(gs.Node("DequantizeLinear", "dequantize", {}, [q, *pair], [out]))
        y = out
    return Net(gs.Graph(nodes, inputs=[x], outputs=[y], opset=19, ir_version=9, name="layer"))


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1, 3, 5]),
    stride=st.sampled_from([1, 2]),
    depthwise=st.booleans(),
    signed=st.booleans(),
    shift=st.booleans(),
    step=st.sampled_from([None, 0.4]),
    on_grid=st.booleans(),
)
def test_a_convolution_of_codes_is_exact(
    seed: int,
    size: int,
    stride: int,
    depthwise: bool,
    signed: bool,
    shift: bool,
    step: float | None,
    on_grid: bool,
) -> None:
    rng = np.random.default_rng(seed)
    dtype = np.int8 if signed else np.uint8
    low, high = (-128, 127) if signed else (0, 255)
    zero = np.array((5 if signed else 128) if shift else 0, dtype)
    outputs, group = (4, 4) if depthwise else (5, 1)
    weight = rng.integers(-127, 128, (outputs, 4 // group, size, size)).astype(np.int8)
    scale = F32(0.037) * np.linspace(0.01, 0.07, outputs, dtype=F32)
    bias = rng.normal(0, 2, outputs).astype(F32)
    bias = np.rint(bias / scale) * scale if on_grid else np.floor(bias / scale) * scale + scale / 2
    x = rng.integers(low, high + 1, (3, 4, 7, 6)).astype(dtype)
    attrs = {"pads": [size // 2] * 4, "strides": [stride] * 2, "group": group}
    attrs["kernel_shape"] = [size, size]
    net = layer(weight, bias, zero_point=zero, step=step, in_channels=4, **attrs)
    as_written = model_from_net(net.copy())
    conv = next(node for node in net.graph.nodes if node.op == "Conv")
    assert sum_codes(net.graph, conv)
    model = model_from_net(net)

    sums = F.conv2d(  # float64 holds all of them
        torch.from_numpy(x).double() - float(zero),
        torch.from_numpy(weight).double(),
        None,
        stride,
        size // 2,
        1,
        group,
    ).numpy()
    assert np.abs(sums).max() < 2**24
    scale, bias = scale.reshape(-1, 1, 1), bias.reshape(-1, 1, 1)
    bias_codes = np.rint(bias.astype(np.float64) / scale)
    if step is None and not on_grid:
        expected = sums.astype(F32) * scale + bias
    elif step is None:
        expected = (sums + bias_codes).astype(F32) * scale
    else:
        sums += bias_codes
        codes = np.rint(sums.astype(F32) * (scale / F32(step))) + 3
        expected = (np.clip(codes, 0, 255).astype(F32) - 3) * F32(step)
    output = model.graph.output[0].name
    found = ort_run(model, {"x": x}, optimize=False)[output]
    np.testing.assert_array_equal(found, expected)
    by_torch = TorchGraph(model).run({"x": torch.from_numpy(x)}, [output])[output].numpy()
    np.testing.assert_array_equal(by_torch, expected)
    written = ort_run(as_written, {"x": x}, optimize=False)[output]
    np.testing.assert_allclose(found, written, rtol=0, atol=(step or 0) * 1.01 + 1e-3)


def dense(channels: int, code: int) -> Net:
    weight = np.full((2, channels, 1, 1), code, np.int8)
    zero = np.array(0, np.uint8)
    return layer(weight, np.zeros(2, F32), zero_point=zero, in_channels=channels)


@pytest.mark.parametrize(("channels", "exact"), [(518, True), (519, False)])
def test_sums_that_float32_cannot_hold_stay(channels: int, exact: bool) -> None:
    """255 x 127 x 518 is the last multiple below 2^24."""
    assert (255 * 127 * channels < 2**24) == exact
    net = dense(channels, -127)
    before = onnx.printer.to_text(model_from_net(net.copy()))
    assert sum_codes(net.graph, net.graph.nodes[-1]) == exact
    after = onnx.printer.to_text(model_from_net(net))
    assert (before == after) != exact


def test_signs_that_cancel_count_by_themselves() -> None:
    """Whatever the order of summation."""
    net = dense(800, 127)
    codes = next(t for t in net.graph.tensors().values() if t.name == "w")
    codes.values = codes.values * np.where(np.arange(800) % 2, 1, -1).reshape(1, -1, 1, 1)
    codes.values = codes.values.astype(np.int8)
    assert sum_codes(net.graph, net.graph.nodes[-1])


def test_layers_in_float_stay() -> None:
    net = dense(4, 1)
    conv = net.graph.nodes[-1]
    conv.inputs[1] = gs.Constant("float", np.ones((2, 4, 1, 1), F32))
    assert not sum_codes(net.graph, conv)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_weights_with_a_zero_point_are_left_alone(dtype: type) -> None:
    """UINT8 codes less 128 are INT8 numbers, but the codes themselves are not."""
    zero_point = 128 if dtype == np.uint8 else 3
    weight = (np.arange(4 * 3 * 9).reshape(4, 3, 3, 3) % 100 + 10).astype(dtype)
    net = layer(
        weight,
        np.zeros(4, F32),
        zero_point=np.array(0, np.uint8),
        weight_zero_point=zero_point,
        in_channels=3,
    )
    conv = next(node for node in net.graph.nodes if node.op == "Conv")
    assert not sum_codes(net.graph, conv)
