"""What layers cost by their shapes, against numbers worked out by hand."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from reptrt.graph.layer_costs import LayerCost, layer_costs
from tests.support.lint_graphs import QdqGraph
from tests.support.onnx_nets import basic_block
from tests.support.qdq_graphs import qdq_model


def one_layer(
    op: str,
    weight: tuple[int, ...],
    shape: list[int | str],
    kind: int = TensorProto.FLOAT,
    **attributes: object,
) -> onnx.ModelProto:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    node = helper.make_node(op, ["x", "w"], ["y"], name="layer", **attributes)
    graph = helper.make_graph(
        [node],
        "net",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.zeros(weight, dtype), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])


@pytest.mark.parametrize(
    ("model", "macs", "values"),
    [
        (one_layer("Conv", (8, 4, 3, 3), ["N", 4, 10, 10]), 8 * 4 * 9 * 64, (400, 512, 288)),
        (
            one_layer("Conv", (4, 1, 3, 3), ["N", 4, 10, 10], group=4, strides=[2, 2]),
            4 * 9 * 16,
            (400, 64, 36),
        ),
        (
            one_layer("ConvTranspose", (4, 8, 2, 2), ["N", 4, 10, 10], strides=[2, 2]),
            4 * 8 * 4 * 100,
            (400, 3200, 128),
        ),
        (one_layer("Gemm", (64, 10), ["N", 64]), 640, (64, 10, 640)),
        (one_layer("MatMul", (16, 8), ["N", 5, 16]), 16 * 8 * 5, (80, 40, 128)),
    ],
    ids=["conv", "depthwise", "transposed", "gemm", "matmul"],
)
def test_each_operator(model: onnx.ModelProto, macs: int, values: tuple[int, int, int]) -> None:
    source, result, weight = values
    for batch in (1, 32):
        moved = 4 * (batch * (source + result) + weight)
        assert layer_costs(model, batch) == (LayerCost("layer", batch * macs, moved, False),)


def test_half_types_move_half_the_bytes() -> None:
    full, half = (
        layer_costs(one_layer("Conv", (8, 4, 3, 3), [1, 4, 8, 8], kind), 1)[0]
        for kind in (TensorProto.FLOAT, TensorProto.FLOAT16)
    )
    assert half.bytes_moved * 2 == full.bytes_moved
    assert half.intensity == 2 * full.intensity


def test_int8_layers_move_one_byte_a_value() -> None:
    first, second = layer_costs(qdq_model(), 2)
    assert first == LayerCost("conv0", 2 * 16 * 27 * 64, 2 * 64 * (3 + 16) + 16 * 27, True)
    assert second == LayerCost("conv1", 2 * 16 * 144 * 64, 2 * 64 * 32 + 16 * 144, True)


def test_a_depthwise_layer_waits_for_memory_and_a_dense_one_does_not() -> None:
    """9 multiply-accumulates for two bytes; 9 * 64 for two."""
    g = QdqGraph((1, 64, 256, 256))
    depthwise = g.node("Conv", g.qdq("x"), g.weight(64, 1, 3, 3), group=64, pads=[1] * 4)
    dense = g.node("Conv", g.qdq(depthwise), g.weight(64, 64, 3, 3), pads=[1] * 4)
    costs = layer_costs(g.model(dense), 1)
    assert [round(cost.intensity, 1) for cost in costs] == [4.5, 286.7]
    assert [cost.time(200.0) == cost.bytes_moved for cost in costs] == [True, False]
    assert costs[1].time(200.0) == costs[1].macs / 200.0


def test_layers_of_unknown_size_are_left_out() -> None:
    assert layer_costs(one_layer("Conv", (8, 4, 3, 3), ["N", 4, "H", "W"]), 1) == ()
    assert len(layer_costs(basic_block(downsample=True), 1)) == 5
