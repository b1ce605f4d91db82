"""Folding batch norms: outputs stay, in float64 to the last bits; what cannot be folded stays."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper

from reptrt.core.errors import RewriteError
from reptrt.graph.net import Net, model_from_net, net_from_model
from reptrt.rewrite.contract import RewriteReport
from reptrt.rewrite.fold_batchnorm import affine_of, fold_batchnorm
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
    report = fold_batchnorm(net)
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


def after_transposed(groups: int = 1) -> onnx.ModelProto:
    b = Builder(channels=4)
    weight = b.parameter("w", 4, 6 // groups, 2, 2)
    b.node("ConvTranspose", ["x", weight], "t", strides=[2, 2], group=groups)
    b.channels["t"] = 6
    return b.model(norm(b, "t", "bn"))


def after_gemm(**attrs: object) -> onnx.ModelProto:
    b = Builder(channels=4)
    flat = b.node("Flatten", [b.node("GlobalAveragePool", ["x"], "pool")], "flat")
    shape = (6, 4) if attrs.get("transB", 1) else (4, 6)
    inputs = [flat, b.parameter("w", *shape), b.parameter("b", 6)]
    b.node("Gemm", inputs, "g", **{"transB": 1, **attrs})
    b.channels["g"] = 6
    return b.model(norm(b, "g", "bn"))


def two_in_a_row() -> onnx.ModelProto:
    b = Builder(channels=4)
    return b.model(norm(b, norm(b, b.conv("x", 8, "c"), "bn1"), "bn2"))


FOLDED: dict[str, Callable[[], onnx.ModelProto]] = {
    "conv": after_conv,
    "grouped strided conv": lambda: after_conv(group=2, strides=[2, 2]),
    "conv without bias": after_conv_without_bias,
    "transposed conv": after_transposed,
    "gemm": after_gemm,
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
    scale, shift = affine_of(bn)
    epsilon = float(np.float32(1e-3))  # ONNX keeps it in float32
    np.testing.assert_allclose(scale, gamma / np.sqrt(var + epsilon), rtol=1e-15)
    np.testing.assert_allclose(shift, beta - mean * scale, rtol=1e-12, atol=1e-15)
    report = fold_batchnorm(net)
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


LEFT: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "read twice": (read_twice, "the output of c is used elsewhere too"),
    "before the conv": (before_conv, "no convolution or Gemm before it"),
    "grouped transposed conv": (lambda: after_transposed(2), "grouped transposed convolution"),
    "gemm with alpha": (lambda: after_gemm(alpha=0.5), "Gemm with alpha"),
    "gemm untransposed": (lambda: after_gemm(transB=0), "Gemm with alpha, beta or an untransposed"),
    "computed bias": (computed_bias, "not constant"),
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
        fold_batchnorm(net_from_model(model))
