"""Affines go into the layers around them: outputs stay; what no layer can take is named."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper

from reptrt.core.errors import RewriteError
from reptrt.graph.net import Net, model_from_net, net_from_model
from reptrt.rewrite.absorb_affines import absorb_affines
from reptrt.rewrite.contract import RewriteReport
from reptrt.rewrite.linear_nodes import affine_of
from reptrt.rewrite.simplify import narrow_to_float32
from tests.support.helpers import ort_run
from tests.support.onnx_nets import Builder

X = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32)


def norm(b: Builder, x: str, name: str, **attrs: object) -> str:
    channels = b.channels[x]
    values = {
        "gamma": b.rng.uniform(0.5, 2.0, channels),
        "beta": b.rng.standard_normal(channels),
        "mean": b.rng.standard_normal(channels),
        "var": b.rng.uniform(0.1, 2.0, channels),
    }
    names = [b.constant(f"{name}.{k}", v.astype(np.float32)) for k, v in values.items()]
    return b.node("BatchNormalization", [x, *names], name, **attrs)


def folded(model: onnx.ModelProto) -> tuple[Net, RewriteReport]:
    net = net_from_model(model)
    report = absorb_affines(net)
    narrow_to_float32(net)
    net.graph.cleanup()
    return net, report


def ops(net: Net) -> list[str]:
    return [node.op for node in net.graph.nodes]


def assert_same_outputs(before: onnx.ModelProto, net: Net) -> None:
    expected, got = ort_run(before, {"x": X}), ort_run(model_from_net(net), {"x": X})
    for name, value in expected.items():
        # float32 sums of a few hundred terms in another order: 1e-5 of the largest value
        np.testing.assert_allclose(got[name], value, rtol=0, atol=1e-5 * np.abs(value).max())


def after_conv(**attrs: object) -> onnx.ModelProto:
    b = Builder(channels=4)
    return b.model(norm(b, b.conv("x", 8, "c", **attrs), "bn", epsilon=1e-3))


def after_conv_without_bias() -> onnx.ModelProto:
    b = Builder(channels=4)
    b.node("Conv", ["x", b.parameter("w", 6, 4, 3, 3)], "c", kernel_shape=[3, 3])
    b.channels["c"] = 6
    return b.model(norm(b, "c", "bn"))


def after_transposed(groups: int = 1, outputs: int = 6) -> onnx.ModelProto:
    b = Builder(channels=4)
    weight = b.parameter("w", 4, outputs // groups, 3, 3)
    geometry = {"strides": [2, 2], "pads": [1] * 4, "output_padding": [1, 1]}
    b.node("ConvTranspose", ["x", weight], "t", group=groups, **geometry)
    b.channels["t"] = outputs
    return b.model(norm(b, "t", "bn"))


def after_gemm(**attrs: object) -> onnx.ModelProto:
    b = Builder(channels=4)
    flat = b.node("Flatten", [b.node("GlobalAveragePool", ["x"], "pool")], "flat")
    shape = (6, 4) if attrs.get("transB", 1) else (4, 6)
    inputs = [flat, b.parameter("w", *shape), b.parameter("b", 6)]
    b.node("Gemm", inputs, "g", **{"transB": 1, **attrs})
    b.channels["g"] = 6
    return b.model(norm(b, "g", "bn"))


def after_matmul() -> onnx.ModelProto:
    b = Builder(channels=4)
    flat = b.node("Flatten", [b.node("GlobalAveragePool", ["x"], "pool")], "flat")
    b.node("MatMul", [flat, b.parameter("w", 4, 6)], "m")
    b.channels["m"] = 6
    return b.model(norm(b, b.node("Add", ["m", b.parameter("b", 6)], "a"), "bn"))


def two_in_a_row() -> onnx.ModelProto:
    b = Builder(channels=4)
    return b.model(norm(b, norm(b, b.conv("x", 8, "c"), "bn1"), "bn2"))


FOLDED: dict[str, Callable[[], onnx.ModelProto]] = {
    "conv": after_conv,
    "grouped strided conv": lambda: after_conv(group=2, strides=[2, 2]),
    "conv without bias": after_conv_without_bias,
    "transposed conv": after_transposed,
    "grouped transposed conv": lambda: after_transposed(2),
    "depthwise transposed conv": lambda: after_transposed(4, outputs=4),
    "gemm": after_gemm,
    "gemm with alpha and beta": lambda: after_gemm(alpha=0.5, beta=2.0),
    "gemm untransposed": lambda: after_gemm(transB=0),
    "matrix product": after_matmul,
    "two in a row": two_in_a_row,
}


@pytest.mark.parametrize("name", list(FOLDED))
def test_folded_into_the_layer_before(name: str) -> None:
    model = FOLDED[name]()
    net, report = folded(model)
    assert "BatchNormalization" not in ops(net)
    assert report.skipped == ()
    assert_same_outputs(model, net)
    assert net.graph.outputs[0].name == model.graph.output[0].name


def test_the_formula_in_float64() -> None:
    model = after_conv()
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    gamma, beta, mean, var = (
        constants[f"bn.{k}"].astype(np.float64) for k in ("gamma", "beta", "mean", "var")
    )
    net = net_from_model(model)
    (bn,) = (node for node in net.graph.nodes if node.op == "BatchNormalization")
    affine = affine_of(bn)
    scale, shift = affine.kernel.reshape(-1), affine.bias
    epsilon = float(np.float32(1e-3))  # ONNX keeps it in float32
    np.testing.assert_allclose(scale, gamma / np.sqrt(var + epsilon), rtol=1e-15)
    np.testing.assert_allclose(shift, beta - mean * scale, rtol=1e-12, atol=1e-15)
    report = absorb_affines(net)
    assert report.changed == ("c",)
    (conv,) = net.graph.nodes[:1]
    weight, bias = (tensor.values for tensor in conv.inputs[1:])
    assert weight.dtype == bias.dtype == np.float64
    expected = constants["c.weight"].astype(np.float64) * scale[:, None, None, None]
    np.testing.assert_allclose(weight, expected, rtol=1e-15)
    np.testing.assert_allclose(
        bias, constants["c.bias"].astype(np.float64) * scale + shift, rtol=1e-12
    )


def read_twice() -> onnx.ModelProto:
    b = Builder(channels=4)
    conv = b.conv("x", 8, "c")
    return b.model(b.node("Add", [norm(b, conv, "bn"), conv], "sum"))


def before_conv() -> onnx.ModelProto:
    b = Builder(channels=4)
    return b.model(b.conv(b.relu(norm(b, "x", "bn")), 8, "c"))


def computed_bias() -> onnx.ModelProto:
    b = Builder(channels=4)
    bias = b.node(
        "Squeeze",
        [
            b.node("ReduceMean", ["x", b.constant("all", np.int64([0, 2, 3]))], "mean"),
            b.constant("keep", np.int64([0, 2, 3])),
        ],
        "bias",
    )
    b.node("Conv", ["x", b.parameter("w", 4, 4, 3, 3), bias], "c", kernel_shape=[3, 3])
    return b.model(norm(b, "c", "bn"))


def unknown_statistics() -> onnx.ModelProto:
    b = Builder(channels=4)
    model = b.model(norm(b, b.conv("x", 8, "c"), "bn"))
    mean = model.graph.node[-1].input[3]
    model.graph.node.insert(0, helper.make_node("Abs", [mean], ["computed"], "abs"))
    model.graph.node[-1].input[3] = "computed"
    return model


LEFT: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "read twice": (read_twice, "the output of the layer before it is used elsewhere too"),
    "before the activation": (before_conv, "no layer next to it"),
    "computed bias": (computed_bias, "the layer before it: its weights are not constant"),
    "computed statistics": (unknown_statistics, "its statistics are not constant"),
}


@pytest.mark.parametrize("name", list(LEFT))
def test_left_alone_with_the_reason(name: str) -> None:
    make, reason = LEFT[name]
    model = make()
    net, report = folded(model)
    assert ops(net).count("BatchNormalization") == 1
    assert [skip.node for skip in report.skipped] == ["bn"]
    assert reason in report.skipped[0].reason
    assert report.changed == ()
    assert_same_outputs(model, net)


# Arithmetic with constants -----------------------------------------------------------------------

SHAPES = [(), (1,), (8, 1, 1), (1, 8, 1, 1)]


def arithmetic(b: Builder, x: str, shape: tuple[int, ...], op: str, first: bool) -> str:
    """One node whose constant operand has a shape, and is the first or the second."""
    name = f"{op}{first}"
    constant = b.constant(f"{name}.k", b.rng.uniform(0.5, 2.0, shape).astype(np.float32))
    b.channels[constant] = 0
    return b.node(op, [constant, x] if first else [x, constant], name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("op", "first"),
    [
        *(("Add", False), ("Add", True), ("Sub", False), ("Sub", True)),
        *(("Mul", False), ("Mul", True), ("Div", False)),
    ],
)
def test_arithmetic_behind_a_layer(op: str, first: bool, shape: tuple[int, ...]) -> None:
    b = Builder(channels=4)
    model = b.model(b.relu(arithmetic(b, b.conv("x", 8, "c"), shape, op, first)))
    net, report = folded(model)
    assert ops(net) == ["Conv", "Relu"]
    assert (report.changed, report.skipped) == (("c",), ())
    assert_same_outputs(model, net)


@pytest.mark.parametrize("op", ["Neg", "Sum"])
def test_neg_and_sums_with_constants_behind_a_layer(op: str) -> None:
    b = Builder(channels=4)
    inputs = [b.conv("x", 8, "c"), b.parameter("k1", 8, 1, 1), b.parameter("k2", 1)]
    model = b.model(b.relu(b.node(op, inputs[: 1 if op == "Neg" else 3], "y")))
    net, _ = folded(model)
    assert ops(net) == ["Conv", "Relu"]
    assert_same_outputs(model, net)


def test_a_constant_divided_by_a_layer_stays() -> None:
    b = Builder(channels=4)
    positive = b.node("Exp", [b.conv("x", 8, "c")], "exp")
    model = b.model(arithmetic(b, positive, (), "Div", first=True))
    net, _ = folded(model)
    assert ops(net) == ["Conv", "Exp", "Div"]
    assert_same_outputs(model, net)


def sum_of(b: Builder, *tensors: str) -> str:
    total = tensors[0]
    for op, tensor in zip(("Add", "Sub", "Add"), tensors[1:], strict=False):
        total = b.node(op, [total, tensor], f"{total}{tensor}")
    return total


def test_a_norm_behind_a_sum_of_layers_goes_into_each() -> None:
    """norm(c1 + c2 - c3): all are scaled, one takes the shift."""
    b = Builder(channels=4)
    y = b.relu("x")
    convs = [b.conv(t, 8, name) for t, name in (("x", "c1"), (y, "c2"), (y, "c3"))]
    model = b.model(b.relu(norm(b, sum_of(b, *convs), "bn")))
    net, report = folded(model)
    assert sorted(ops(net)) == ["Add", "Conv", "Conv", "Conv", "Relu", "Relu", "Sub"]
    assert set(report.changed) == {"c1", "c2", "c3"}
    assert not {"c1", "c2", "c3", "c1c2", "c1c2c3"} & set(net.graph.tensors())  # other values
    assert_same_outputs(model, net)


def test_a_norm_behind_a_residual_sum_stays() -> None:
    b = Builder(channels=4)
    total = sum_of(b, b.conv("x", 4, "c"), "x")
    model = b.model(b.relu(norm(b, total, "bn")))
    net, report = folded(model)
    assert ops(net) == ["Conv", "Add", "BatchNormalization", "Relu"]
    assert "a summand before it is more than the output of a layer" in report.skipped[0].reason


# Affines before layers ---------------------------------------------------------------------------


def before(op: str, **attrs: object) -> onnx.ModelProto:
    """relu(x) -> batch norm, a factor or a shift -> two convolutions."""
    b = Builder(channels=4)
    x = b.relu("x")
    if op == "norm":
        y = norm(b, x, "n")
    else:
        y = b.node(op, [b.constant("k", b.rng.uniform(1, 2, (4, 1, 1)).astype(np.float32)), x], "n")
    return b.model(b.conv(y, 8, "c1", **attrs), b.conv(y, 4, "c2", **attrs))


@pytest.mark.parametrize("op", ["norm", "Mul", "Add", "Sub"])
@pytest.mark.parametrize(
    "attrs",
    [{}, {"group": 2}, {"strides": [2, 2], "dilations": [2, 2]}],
    ids=["plain", "grouped", "strided"],
)
def test_before_layers_that_do_not_pad(op: str, attrs: dict[str, object]) -> None:
    model = before(op, pads=[0] * 4, **attrs)
    net, report = folded(model)
    assert ops(net) == ["Relu", "Conv", "Conv"]
    assert set(report.changed) == {"c1", "c2"}
    assert_same_outputs(model, net)


def test_a_factor_before_layers_that_pad() -> None:
    model = before("Mul")
    net, _ = folded(model)
    assert ops(net) == ["Relu", "Conv", "Conv"]
    assert_same_outputs(model, net)


@pytest.mark.parametrize("op", ["norm", "Add"])
def test_a_shift_before_layers_that_pad_stays(op: str) -> None:
    model = before(op)
    net, report = folded(model)
    assert len(ops(net)) == 4
    (skip,) = report.skipped
    assert skip.node == "n"
    assert "pads with zeros where the bias before it would have to continue" in skip.reason


@pytest.mark.parametrize("kind", ["gemm", "transposed", "matrix"])
def test_before_other_layers(kind: str) -> None:
    b = Builder(channels=4)
    if kind == "transposed":
        scaled = b.node("Mul", [b.relu("x"), b.parameter("k", 4, 1, 1)], "n")
        b.node("ConvTranspose", [scaled, b.parameter("w", 4, 3, 2, 2)], "y", group=2)
        b.channels["y"] = 6
    else:
        flat = b.node("Flatten", [b.node("GlobalAveragePool", ["x"], "pool")], "flat")
        normed = norm(b, b.relu(flat), "n")
        b.node("Gemm" if kind == "gemm" else "MatMul", [normed, b.parameter("w", 4, 6)], "y")
    model = b.model("y")
    net, _ = folded(model)
    assert not {"Mul", "BatchNormalization"} & set(ops(net))
    assert_same_outputs(model, net)


def test_a_shift_before_a_transposed_convolution_stays() -> None:
    b = Builder(channels=4)
    shifted = b.node("Add", [b.relu("x"), b.parameter("k", 4, 1, 1)], "n")
    model = b.model(b.node("ConvTranspose", [shifted, b.parameter("w", 4, 6, 2, 2)], "y"))
    net, report = folded(model)
    assert ops(net) == ["Relu", "Add", "ConvTranspose"]
    assert (
        report.skipped[0].reason == "a transposed convolution spreads the shift before it unevenly"
    )


def test_what_others_read_too_stays() -> None:
    b = Builder(channels=4)
    y = b.node("Mul", [b.relu("x"), b.parameter("k", 4, 1, 1)], "n")
    model = b.model(b.conv(y, 4, "c"), b.node("Exp", [y], "exp"))
    net, report = folded(model)
    assert "Mul" in ops(net)
    assert report.skipped[0].reason == "its result is read by more than layers"
    assert_same_outputs(model, net)


def test_the_last_factor_of_an_activation_function_stays() -> None:
    """GELU is x * (1 + erf(x / sqrt(2))) * 0.5: engines know it by its form."""
    b = Builder(channels=4)
    x = b.conv("x", 4, "c1")
    for name, value in (("root", 2**0.5), ("one", 1.0), ("half", 0.5)):
        b.channels[b.constant(name, np.float32(value))] = 0
    inner = b.node("Add", [b.node("Erf", [b.node("Div", [x, "root"], "d")], "e"), "one"], "a")
    gelu = b.node("Mul", [b.node("Mul", [x, inner], "m"), "half"], "h")
    model = b.model(b.conv(gelu, 4, "c2"))
    net, report = folded(model)
    assert ops(net) == ["Conv", "Div", "Erf", "Add", "Mul", "Mul", "Conv"]
    assert not report.skipped  # they are part of the function


def test_a_weight_that_two_layers_share_is_folded_in_one() -> None:
    b = Builder(channels=4)
    weight, bias = b.parameter("w", 4, 4, 3, 3), b.parameter("b", 4)
    first = b.node("Conv", ["x", weight, bias], "c1", kernel_shape=[3, 3], pads=[1] * 4)
    second = b.node(
        "Conv", [norm(b, first, "bn"), weight, bias], "c2", kernel_shape=[3, 3], pads=[1] * 4
    )
    model = b.model(second)
    net, report = folded(model)
    assert report.changed == ("c1",)
    assert_same_outputs(model, net)


@pytest.mark.parametrize("form", ["attribute", "outputs"])
def test_training_mode_is_refused(form: str) -> None:
    model = after_conv()
    bn = model.graph.node[-1]
    if form == "attribute":
        bn.attribute.append(helper.make_attribute("training_mode", 1))
    bn.output.extend(["running_mean", "running_var"])
    with pytest.raises(RewriteError, match=r"bn .*training mode.*after net\.eval\(\)"):
        absorb_affines(net_from_model(model))
