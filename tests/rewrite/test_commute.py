"""Affines on their way past pools, means, Flatten and Concat: outputs stay, to float rounding."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from tests.rewrite.test_absorb_affines import assert_same_outputs, folded, norm, ops
from tests.support.onnx_nets import Builder


def rows(b: Builder, x: str, positions: int, kind: str = "Flatten") -> str:
    if kind == "Flatten":
        b.node("Flatten", [x], "rows")
    else:
        target = [0, -1] if kind == "Reshape" else [-1, b.channels[x] * positions]
        b.node("Reshape", [x, b.constant("target", np.int64(target))], "rows")
    b.channels["rows"] = b.channels[x] * positions
    return "rows"


def flat_behind(kind: str) -> Callable[[], onnx.ModelProto]:
    def make() -> onnx.ModelProto:
        b = Builder(channels=4)
        y = rows(b, norm(b, b.relu("x"), "bn"), 64, kind)
        return b.model(b.gemm(y, 5, "g"))

    return make


def pooled_behind(op: str, **attrs: object) -> Callable[[], onnx.ModelProto]:
    def make() -> onnx.ModelProto:
        b = Builder(channels=4)
        pooled = b.node(op, [norm(b, b.relu("x"), "bn")], "pool", **attrs)
        return b.model(b.conv(pooled, 5, "c", 1, pads=[0] * 4))

    return make


def mean_behind(keepdims: int) -> Callable[[], onnx.ModelProto]:
    def make() -> onnx.ModelProto:
        b = Builder(channels=4)
        axes = b.constant("axes", np.int64([2, 3]))
        mean = b.node("ReduceMean", [norm(b, b.relu("x"), "bn"), axes], "mean", keepdims=keepdims)
        if keepdims:
            mean = b.node("Squeeze", [mean, axes], "squeezed")
        return b.model(b.gemm(mean, 5, "g"))

    return make


def whole_head() -> onnx.ModelProto:
    """Norm -> global average -> Flatten -> Gemm, two readers of the rows."""
    b = Builder(channels=4)
    y = norm(b, b.relu("x"), "bn")
    y = rows(b, b.node("GlobalAveragePool", [y], "pool"), 1)
    return b.model(b.gemm(y, 5, "g"), b.gemm(y, 3, "h"))


def before_pool(op: str, **attrs: object) -> Callable[[], onnx.ModelProto]:
    def make() -> onnx.ModelProto:
        b = Builder(channels=4)
        y = b.node(op, [b.conv("x", 6, "c")], "pool", **attrs)
        return b.model(norm(b, y, "bn"))

    return make


def joined(*sizes: int) -> Callable[[], onnx.ModelProto]:
    """Batch norm behind a Concat of convolutions, as in MixNet; one of them is a sum."""

    def make() -> onnx.ModelProto:
        b = Builder(channels=4)
        parts = [b.conv("x", size, f"c{i}", 2 * i + 1) for i, size in enumerate(sizes)]
        parts[0] = b.node("Add", [parts[0], b.conv("x", sizes[0], "other")], "sum")
        y = b.node("Concat", parts, "cat", axis=1)
        b.channels["cat"] = sum(sizes)
        return b.model(b.relu(norm(b, y, "bn")))

    return make


WINDOW = {"kernel_shape": [2, 2], "strides": [2, 2]}
PADDED = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4}
PASSES = {
    "flatten": flat_behind("Flatten"),
    "reshape": flat_behind("Reshape"),
    "reshape to a known row": flat_behind("known"),
    "mean": mean_behind(0),
    "mean, squeeze": mean_behind(1),
    "head": whole_head,
    "average": pooled_behind("AveragePool", **WINDOW),
    "average without its padding": pooled_behind("AveragePool", **PADDED),
    "average, ceil": pooled_behind("AveragePool", kernel_shape=[3, 3], ceil_mode=1),
    "maximum": pooled_behind("MaxPool", **PADDED),
    "global maximum": pooled_behind("GlobalMaxPool"),
    "behind an average": before_pool("AveragePool", **PADDED),
    "behind a maximum": before_pool("MaxPool", **WINDOW),
    "behind a global average": before_pool("GlobalAveragePool"),
    "concat": joined(4, 6, 2),
    "concat of one": joined(4),
}


@pytest.mark.parametrize("name", list(PASSES))
def test_it_is_absorbed(name: str) -> None:
    model = PASSES[name]()
    net, report = folded(model)
    assert "BatchNormalization" not in ops(net)
    assert not report.skipped
    assert len(ops(net)) == len(model.graph.node) - 1
    assert_same_outputs(model, net)


def counted_padding() -> onnx.ModelProto:
    return pooled_behind("AveragePool", **PADDED, count_include_pad=1)()


def negative_maximum() -> onnx.ModelProto:
    b = Builder(channels=4)
    y = b.node(
        "Mul", [b.relu("x"), b.constant("f", np.float32([[[-1]], [[2]], [[1]], [[3]]]))], "m"
    )
    y = b.node("MaxPool", [y], "pool", **WINDOW)
    return b.model(b.conv(y, 5, "c", 1, pads=[0] * 4))


def other_axis() -> onnx.ModelProto:
    b = Builder(channels=4)
    y = b.node("Concat", [b.conv("x", 4, "c1"), b.conv("x", 4, "c2")], "cat", axis=2)
    return b.model(norm(b, y, "bn"))


def with_the_input() -> onnx.ModelProto:
    """DenseNet: a part of the Concat is no output of a layer."""
    b = Builder(channels=4)
    y = b.node("Concat", [b.conv("x", 4, "c1"), b.relu("x")], "cat", axis=1)
    b.channels["cat"] = 8
    return b.model(b.relu(norm(b, y, "bn")))


def joined_twice() -> onnx.ModelProto:
    b = Builder(channels=4)
    c = b.conv("x", 4, "c1")
    y = b.node("Concat", [c, c], "cat", axis=1)
    b.channels["cat"] = 8
    return b.model(b.relu(norm(b, y, "bn")))


STAYS: dict[Callable[[], onnx.ModelProto], str] = {
    counted_padding: "no layer next to it",
    negative_maximum: "no layer next to it",
    other_axis: "no layer next to it",
    with_the_input: "an input of the Concat before it is more than the output of a layer",
    joined_twice: "an input of the Concat before it is more than the output of a layer",
}


@pytest.mark.parametrize("make", list(STAYS), ids=lambda make: make.__name__)
def test_it_stays_and_is_named(make: Callable[[], onnx.ModelProto]) -> None:
    model = make()
    net, report = folded(model)
    assert len(ops(net)) == len(model.graph.node)
    assert [skip.reason for skip in report.skipped] == [STAYS[make]]
    assert_same_outputs(model, net)


def test_a_factor_passes_where_a_shift_does_not() -> None:
    b = Builder(channels=4)
    y = b.node("Mul", [b.relu("x"), b.constant("f", np.float32(-1.5))], "m")
    y = b.node("AveragePool", [y], "pool", **PADDED, count_include_pad=1)
    model = b.model(b.conv(y, 5, "c", 1, pads=[0] * 4))
    net, _ = folded(model)
    assert ops(net) == ["Relu", "AveragePool", "Conv"]
    assert_same_outputs(model, net)
