"""Round biases to multiples of the accumulator's step, so that every runtime adds the same bias.

    b[o] = round(b[o] / g[o]) g[o]        g[o] = s_x s_w[o]

An INT8 layer sums codes in INT32, in steps of g. The kernels of onnxruntime round the bias to such
a step; torch and TensorRT add it unrounded. The difference is at most g / 2, far below a step of
the output, but each output that it moves from one code to the next changes hundreds of sums in the
next layer. With biases that are rounded beforehand, runtimes do not differ here. Ours.

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
            continue  # a Gemm whose bias no kernel adds in INT32
        step, per_channel = (np.asarray(scale, dtype=np.float64) for scale in scales)
        grid = step.reshape(()) * per_channel.reshape(-1)
        if grid.size not in (1, bias.size):
            continue  # a ConvTranspose with groups: channels share scales
        exact = bias.astype(np.float64)
        add_to_bias(net, node, np.rint(exact / grid) * grid - exact)
        changed.append(node.name)
    return RewriteReport("round_biases", tuple(changed))


def _source(tensor: gs.Tensor) -> gs.Node | None:
    """Return the node that computes the values of a tensor, in front of nodes that move them."""
    node = producer(tensor)
    while node is not None and moves_values(node):
        node = producer(node.inputs[0])
    return node
