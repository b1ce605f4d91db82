"""Arithmetic on constants is done at export; everything else is left as it is."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from reptrt.exporter.constants import with_constants_folded
from tests.support.helpers import ort_run
from tests.support.onnx_nets import Builder

X = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32)


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The folded model, its outputs compared."""
    result = with_constants_folded(model)
    before, after = ort_run(model, {"x": X}), ort_run(result, {"x": X})
    assert list(before) == list(after)
    for name, value in before.items():
        # constants evaluated by numpy instead of onnxruntime: a few float32 roundings
        np.testing.assert_allclose(after[name], value, rtol=0, atol=1e-6 * np.abs(value).max())
    return result


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


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
    assert len(folded(FOLDED[name]()).graph.node) == 1


def test_a_constant_output_stays() -> None:
    b = Builder(channels=4)
    doubled = b.node("Add", [b.parameter("p", 4), "p"], "doubled")
    model = folded(b.model(b.relu("x"), doubled))
    assert "doubled" in [value.name for value in model.graph.output]


def test_quantized_weights_are_not_evaluated() -> None:
    b = Builder(channels=4)
    b.constant("q", np.ones((4, 4, 1, 1), np.int8))
    b.constant("s", np.float32(0.5))
    weight = b.node("DequantizeLinear", ["q", "s"], "w")
    model = folded(b.model(b.node("Conv", ["x", weight], "c")))
    assert ops(model) == ["DequantizeLinear", "Conv"]


def test_random_numbers_stay_random() -> None:
    b = Builder(channels=4)
    noise = b.node("RandomNormalLike", [b.parameter("p", 4, 1, 1)], "noise", seed=1.0)
    model = with_constants_folded(b.model(b.node("Mul", ["x", noise], "n")))
    assert ops(model) == ["RandomNormalLike", "Mul"]


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
    assert "Mul" not in ops(folded(b.model(b.node("Add", ["x", "r"], "y"))))


@pytest.mark.parametrize("form", ["Gather", "Slice"])
def test_the_grid_of_a_detector_is_a_constant(form: str) -> None:
    """A YOLO head adds the coordinates of its cells, which follow from a feature map's size.

    The batch is free, height and width are known.
    """
    b = Builder(channels=4)
    feature = b.relu("x")
    shape = b.node("Shape", [feature], "shape")
    for axis, name in ((2, "h"), (3, "w")):
        b.constant(f"axis.{name}", np.int64(axis))
        if form == "Gather":
            size = b.node("Gather", [shape, f"axis.{name}"], f"{name}.size", axis=0)
        else:
            bounds = (
                b.constant(f"{name}.{end}", np.int64([axis + end - 4 * (end and axis == 2)]))
                for end in (0, 1)
            )
            part = b.node("Slice", [shape, *bounds], f"{name}.part")
            size = b.node("Squeeze", [part], f"{name}.size")
        b.constant(f"zero.{name}", np.int64(0))
        b.constant(f"one.{name}", np.int64(1))
        cells = b.node("Range", [f"zero.{name}", size, f"one.{name}"], f"{name}.cells")
        b.node("Cast", [cells], f"{name}.float", to=onnx.TensorProto.FLOAT)
    b.constant("column", np.int64([1]))
    rows = b.node("Unsqueeze", ["h.float", "column"], "rows")
    grid = b.node("Add", [rows, "w.float"], "grid")
    assert ops(folded(b.model(b.node("Add", [feature, grid], "y")))) == ["Relu", "Add"]


def test_the_batch_stays_free() -> None:
    b = Builder(channels=4)
    for name, value in (("first", 0), ("rest", -1)):
        b.constant(name, np.int64([value]))
    batch = b.node("Gather", [b.node("Shape", ["x"], "shape"), "first"], "batch", axis=0)
    target = b.node("Concat", [batch, "rest"], "target", axis=0)
    model = folded(b.model(b.node("Reshape", ["x", target], "y")))
    assert len(ort_run(model, {"x": X[:1]})["y"]) == 1


@pytest.mark.parametrize("form", ["sizes", "attribute", "equal", "uneven"])
def test_parts_of_a_constant_are_constants(form: str) -> None:
    """``p.unbind()`` is one Split of a parameter, of which each part is a factor of a branch."""
    b = Builder(channels=4)
    rows = 5 if form == "uneven" else 4
    inputs = [b.constant("p", np.random.default_rng(0).random((rows, 1, 1, 1), np.float32))]
    inputs += [b.constant("sizes", np.int64([1, 3]))] if form == "sizes" else []
    attrs: dict[str, object] = {"axis": 0}
    attrs |= {"split": [3, 1]} if form == "attribute" else {}
    attrs |= {"num_outputs": 2} if form in ("equal", "uneven") else {}
    b.nodes.append(helper.make_node("Split", inputs, ["u", "v"], name="split", **attrs))
    b.channels |= {"u": 4, "v": 4}
    total = [b.node("ReduceSum", [part], f"{part}.sum", keepdims=0) for part in "uv"]
    y = b.node("Mul", [b.node("Add", ["x", total[0]], "left"), total[1]], "y")
    model = b.model(y, opset=11 if form == "attribute" else 19)
    got = folded(model)
    assert ops(got) == ["Add", "Mul"]
    np.testing.assert_allclose(
        ort_run(got, {"x": X})["y"], ort_run(model, {"x": X})["y"], rtol=1e-6
    )


def dims_of(model: onnx.ModelProto, index: int = 0) -> list[object]:
    dims = model.graph.output[index].type.tensor_type.shape.dim
    return [dim.dim_value or dim.dim_param for dim in dims]


def flattened_level(b: Builder, feature: str) -> str:
    """(N, C, H, W) -> (N, C, H * W), with every size read from the shape, as torch exports it."""
    shape, parts = b.node("Shape", [feature], "shape"), []
    for axis, name in enumerate("nchw"):
        b.constant(f"axis.{name}", np.int64(axis))
        parts.append(b.node("Gather", [shape, f"axis.{name}"], f"{name}.size", axis=0))
    parts[2:] = [b.node("Mul", parts[2:], "cells")]
    b.constant("zero", np.int64([0]))
    sizes = [b.node("Unsqueeze", [part, "zero"], f"{part}.1") for part in parts]
    return b.node("Reshape", [feature, b.node("Concat", sizes, "target", axis=0)], "flat")


@pytest.mark.parametrize("opset", [13, 19])
def test_a_target_with_a_free_batch_is_a_constant(opset: int) -> None:
    b = Builder(channels=4)
    model = b.model(flattened_level(b, b.relu("x")))
    model.opset_import[0].version = opset
    del model.graph.value_info[:]
    model.graph.output[0].type.tensor_type.shape.CopyFrom(
        helper.make_tensor_type_proto(1, ["out_0", "out_1", "out_2"]).tensor_type.shape
    )
    result = folded(model)
    assert ops(result) == ["Relu", "Reshape"]
    (target,) = result.graph.initializer
    assert numpy_helper.to_array(target).tolist() == [0, 4, 64]
    assert dims_of(result) == ["N", 4, 64]
    assert ort_run(result, {"x": X[:1]})["flat"].shape == (1, 4, 64)


def test_a_target_with_two_open_sizes_stays() -> None:
    """(N, C, H, W) -> (C, N, -1): the batch is not where it was."""
    b = Builder(channels=4)
    for name, value in (("first", 0), ("channels", 4), ("rest", -1)):
        b.constant(name, np.int64([value]))
    batch = b.node("Gather", [b.node("Shape", ["x"], "shape"), "first"], "batch", axis=0)
    target = b.node("Concat", ["channels", batch, "rest"], "target", axis=0)
    model = folded(b.model(b.node("Reshape", ["x", target], "y")))
    assert ops(model) == ["Shape", "Gather", "Concat", "Reshape"]


def test_shapes_of_operators_that_onnx_does_not_know_stay() -> None:
    b = Builder(channels=4)
    model = b.model(b.node("Relu", [b.node("MaxPool", ["x"], "p", kernel_shape=[4, 4])], "y"))
    model.graph.node[0].CopyFrom(helper.make_node("Plugin", ["x"], ["p"], domain="nvidia"))
    model.opset_import.append(helper.make_opsetid("nvidia", 1))
    result = with_constants_folded(model)
    assert dims_of(result) == ["N", 4, 5, 5]
    assert "p" in [value.name for value in result.graph.value_info]
