"""Write the mean of a distribution over bins as a product and a sum, which is no layer.

    Conv(p, w) = ReduceSum(p * w, channels),   MatMul(p, w) = ReduceSum(p * w^T, last axis),
    w = 0, 1, 2, ..., R - 1

Detectors whose box sides are distributions (DFL) compute the mean in their decoding, and some write
it as a 1x1 convolution or a product with a matrix. In INT8 it would cost whole pixels: a step of
1/255 in each of R probabilities, times their bins. As a product and a sum it is part of the
decoding, which stays in float.

A node is rewritten if

1. its weight is exactly 0, 1, ..., R - 1 for one output channel, R at least 2, and it has no bias;
2. a convolution is 1x1 with stride 1, without padding;
3. its input comes from a Softmax through nodes that only move values.

Ensures: its output keeps its name and, to float rounding, its value.
"""

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.graph.net import Net, constant_value, producer, weighted_nodes
from reptrt.graph.queries import moves
from reptrt.rewrite.contract import RewriteReport


def sum_bins(net: Net) -> RewriteReport:
    """Rewrite every mean over bins of a float net, in place."""
    changed = [node.name for node in weighted_nodes(net.graph) if _is_mean(node)]
    for node in [node for node in net.graph.nodes if node.name in changed]:
        _rewrite(net, node)
    net.graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return RewriteReport("sum_bins", tuple(changed))


def _is_mean(node: gs.Node) -> bool:
    """Return whether a layer is the mean of a distribution."""
    weight = constant_value(node.inputs[1])
    if weight is None or len(node.inputs) > 2 or node.op not in ("Conv", "MatMul"):
        return False
    bins = weight.size
    shape = (1, bins, *(1,) * (weight.ndim - 2)) if node.op == "Conv" else (bins, 1)
    if bins < 2 or weight.shape != shape or not np.array_equal(weight.flat, np.arange(bins)):
        return False
    ones = (*node.attrs.get("strides", ()), node.attrs.get("group", 1))
    is_plain = set(ones) == {1} and not any(node.attrs.get("pads", ()))
    return is_plain and _is_distribution(node.inputs[0])


def _is_distribution(tensor: gs.Tensor) -> bool:
    node = producer(tensor)
    while node is not None and (moves(node) or node.op in ("Identity", "Cast")):
        node = producer(node.inputs[0])
    return node is not None and node.op == "Softmax"


def _rewrite(net: Net, node: gs.Node) -> None:
    """Replace a mean by a Mul and a ReduceSum, which gets its name."""
    weight = np.asarray(constant_value(node.inputs[1]))
    axis = 1 if node.op == "Conv" else -1
    factors = weight if node.op == "Conv" else weight.T
    dtype = factors.dtype
    product = gs.Variable(net.fresh_name(f"{node.name}.terms"), dtype=dtype)
    bins = gs.Constant(net.fresh_name(f"{node.name}.bins"), np.ascontiguousarray(factors))
    axes = gs.Constant(net.fresh_name(f"{node.name}.axes"), np.array([axis], np.int64))
    name = net.fresh_name(f"{node.name}.weighed")
    net.graph.nodes.append(gs.Node("Mul", name, {}, [node.inputs[0], bins], [product]))
    outputs = list(node.outputs)
    node.inputs.clear()
    node.outputs.clear()
    attributes = {"keepdims": 1}
    net.graph.nodes.append(gs.Node("ReduceSum", node.name, attributes, [product, axes], outputs))
