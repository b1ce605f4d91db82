"""Store symmetric INT8 activations as UINT8 codes with zero point 128: each code is 128 more.

The x86 kernels of onnxruntime take unsigned activations. onnxruntime makes this change by itself,
except where a tensor has two consumers, or where the layers around have UINT8 codes; it then
computes a layer in float.

Ensures: every tensor keeps its value. A pair in another form, or with codes that a graph output or
another node reads, is left as it is.
"""

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.graph.net import Net
from reptrt.graph.queries import symmetric_int8_scale


def to_unsigned(net: Net) -> None:
    """Change all such pairs of a Q/DQ net, in place."""
    for node in net.graph.nodes:
        make_unsigned(net.graph, node)


def make_unsigned(graph: gs.Graph, quantize: gs.Node) -> None:
    """Change one pair, given its QuantizeLinear; any other node is left as it is."""
    if quantize.op != "QuantizeLinear" or symmetric_int8_scale(quantize) is None:
        return
    codes = quantize.outputs[0]
    if codes in graph.outputs or any(
        symmetric_int8_scale(reader) is None for reader in codes.outputs
    ):
        return
    zero_point = gs.Constant(f"{codes.name}.u8_zero_point", np.array(128, dtype=np.uint8))
    for node in (quantize, *codes.outputs):
        node.inputs[2] = zero_point
    codes.dtype = np.dtype(np.uint8)
