"""What the tool writes breaks none of the linter's rules, whatever the blocks and functions."""

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reptrt.graph.net import net_from_model
from reptrt.linter import lint_net
from reptrt.rewrite.to_fp16 import to_fp16
from tests.support.lint_graphs import findings, quantized, rules
from tests.support.placed_nets import ACTIVATIONS, BLOCKS, TAILS, placed_net

INHERENT = {"QDQ204", "QDQ205"}  # few channels; FP32 around the layers, until the engine is built
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
POOLS = ("AveragePool", "GlobalAveragePool", "ReduceMean")


def useless_pairs(graph: onnx.GraphProto) -> list[str]:
    """Return the QuantizeLinear nodes from which no layer or pool is reached, on any way."""
    useful: set[str] = set()
    for node in reversed(graph.node):
        if node.op_type in (*LAYERS, *POOLS) or useful.intersection(node.output):
            useful.update(node.input)
    return [
        node.name
        for node in graph.node
        if node.op_type == "QuantizeLinear" and not useful.intersection(node.output)
    ]


def assert_placed_well(model: onnx.ModelProto) -> None:
    """No warning, all layers and pools in INT8, every pair of use, no pair right at an output."""
    int8 = quantized(model)
    report = findings(int8)
    assert rules(report) == []
    assert set(rules(report, "info")) <= INHERENT
    assert report.int8_layers == report.layers
    assert useless_pairs(int8.graph) == []
    half = net_from_model(int8)
    to_fp16(half)
    assert rules(lint_net(half)) == []
    dequantized = {n.output[0] for n in int8.graph.node if n.op_type == "DequantizeLinear"}
    assert dequantized.isdisjoint(tensor.name for tensor in int8.graph.output)
    for node in int8.graph.node:
        if node.op_type in POOLS:
            assert _from_pair(int8.graph, node.input[0])


def _from_pair(graph: onnx.GraphProto, name: str) -> bool:
    """Return whether a pair makes a tensor, past a MaxPool."""
    (maker,) = (node for node in graph.node if name in node.output)
    if maker.op_type == "MaxPool":
        return _from_pair(graph, maker.input[0])
    return bool(maker.op_type == "DequantizeLinear")


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_function_in_residual_blocks(activation: str) -> None:
    blocks = [(block, activation) for block in ("residual", "excite", "two skips", "pools")]
    assert_placed_well(placed_net(blocks, "classes"))


@pytest.mark.slow
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_in_front_of_every_tail(block: str, tail: str) -> None:
    assert_placed_well(placed_net([(block, "relu"), (block, "silu")], tail))


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from([*BLOCKS]), st.sampled_from([*ACTIVATIONS])), max_size=5),
    st.sampled_from([*TAILS]),
)
def test_random_nets(blocks: list[tuple[str, str]], tail: str) -> None:
    assert_placed_well(placed_net(blocks, tail))
