"""Put biases on the grid of the accumulator, so that every runtime adds the same ones.

    b[o] = round(b[o] / g[o]) g[o]        g[o] = s_x s_w[o]

An INT8 layer sums codes in INT32, in steps of g. onnxruntime's kernels round the bias to it; torch
and TensorRT add it as it is. The rounding is at most half such a step, far below a step of the
output, but each value that it moves across the middle between two codes moves hundreds of sums of
the next layer. Rounded beforehand, there is nothing left to differ in. Ours.

Requires: a Q/DQ net whose scales are final. Ensures: a bias moves by g / 2 at most.
"""

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.graph.flow import moves_values
from reptrt.graph.layers import add_to_bias, has_bias
from reptrt.graph.net import Net, constant_value, producer
from reptrt.rewrite.contract import RewriteReport


def round_biases(net: Net) -> RewriteReport:
    """Round the biases of all INT8 layers, in place."""
    changed = []
    for node in net.graph.nodes:
        if node.op not in ("Conv", "ConvTranspose", "Gemm") or not has_bias(node):
            continue
        sources = [_source(tensor) for tensor in node.inputs[:2]]
        if any(source is None or source.op != "DequantizeLinear" for source in sources):
            continue
        scales = [constant_value(source.inputs[1]) for source in sources if source is not None]
        bias = constant_value(node.inputs[2])
        if bias is None or bias.ndim != 1 or any(scale is None for scale in scales):
            continue
        if any(float(node.attrs.get(name, 1.0)) != 1.0 for name in ("alpha", "beta")):
            continue  # of a Gemm: no kernel adds its bias in INT32
        step, per_channel = (np.asarray(scale, dtype=np.float64) for scale in scales)
        grid = step.reshape(()) * per_channel.reshape(-1)
        if grid.size not in (1, bias.size):
            continue  # of a ConvTranspose with groups, which share scales
        exact = bias.astype(np.float64)
        add_to_bias(net, node, np.rint(exact / grid) * grid - exact)
        changed.append(node.name)
    return RewriteReport("round_biases", tuple(changed))


def _source(tensor: gs.Tensor) -> gs.Node | None:
    """Return what makes the values of a tensor, past what only moves them."""
    node = producer(tensor)
    while node is not None and moves_values(node):
        node = producer(node.inputs[0])
    return node
