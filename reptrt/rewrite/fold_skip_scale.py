"""Fold the factor of a scalar identity split into the scale of its skip, and remove the Mul.

    d0 * DQ(q, s) = DQ(q, d0 s)

The skip is then a residual like any other: TensorRT adds it in the kernel of the convolution,
onnxruntime adds it in INT8. Convolution and skip read the same codes of x with two scales.

Requires: splits of form identity-scalar whose Mul reads a DQ. Ensures: every remaining tensor keeps
its name and, to float rounding, its value. A factor that is not positive stays a Mul, since a scale
has to be positive; `reptrt.rewrite.split_identity` makes no such factor.
"""

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.graph.net import Net, constant_of, producer
from reptrt.graph.splits import read_splits
from reptrt.rewrite.contract import RewriteReport, Skipped


def fold_skip_scale(net: Net) -> RewriteReport:
    """Fold the factors of all scalar identity splits of a Q/DQ net, in place."""
    nodes = {node.name: node for node in net.graph.nodes}
    changed, skipped = [], []
    for split in read_splits(net):
        if split.form != "identity-scalar" or split.side not in nodes:
            continue
        reason = _fold(net, nodes[split.side])
        if reason is None:
            changed.append(split.layer)
        else:
            skipped.append(Skipped(split.layer, reason))
    net.graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return RewriteReport("fold_skip_scale", tuple(changed), tuple(skipped))


def _fold(net: Net, mul: gs.Node) -> str | None:
    """Replace the Mul by a DQ with the same name; return the reason if the Mul has to stay."""
    dequantize = producer(mul.inputs[0])
    if dequantize is None or dequantize.op != "DequantizeLinear":
        return "its input is not quantized"
    factor = constant_of(mul.inputs[1])
    if factor.size != 1 or not factor > 0:
        return "the factor is no positive number"
    codes, scale, zero_point = dequantize.inputs
    product = np.asarray(constant_of(scale) * factor.reshape(()), dtype=np.float32)
    name = net.fresh_name(f"{mul.name}.scale")
    inputs = [codes, gs.Constant(name, product), zero_point]
    outputs = list(mul.outputs)
    mul.inputs.clear()
    mul.outputs.clear()
    net.graph.nodes.append(gs.Node("DequantizeLinear", mul.name, {}, inputs, outputs))
    return None
