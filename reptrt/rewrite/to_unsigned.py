"""Store symmetric INT8 activations as UINT8 codes, which the x86 kernels of onnxruntime take.

    x >= 0 behind a ReLU     the same codes with zero point 0
    any other                zero point 128: each code is 128 more

onnxruntime makes the second change by itself, except where a tensor has two consumers, or where the
layers around have UINT8 codes; it then computes a layer in float. It drops a ReLU only where the
codes begin at 0, and computes the layer before any other ReLU in float too.

Ensures: every tensor keeps its value, but one behind a ReLU is not cut off at code 127. A pair in
another form, or with codes that a graph output or another node reads, is left as it is.
"""

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.graph.net import Net, producer
from reptrt.graph.queries import symmetric_int8_scale


def to_unsigned(net: Net) -> None:
    """Change all such pairs of a Q/DQ net, in place."""
    for node in net.graph.nodes:
        source = producer(node.inputs[0]) if node.op == "QuantizeLinear" else None
        make_unsigned(net.graph, node, 0 if source is not None and source.op == "Relu" else 128)


def make_unsigned(graph: gs.Graph, quantize: gs.Node, zero_point: int = 128) -> None:
    """Change one pair, given its QuantizeLinear; any other node is left as it is."""
    if quantize.op != "QuantizeLinear" or symmetric_int8_scale(quantize) is None:
        return
    codes = quantize.outputs[0]
    if codes in graph.outputs or any(
        symmetric_int8_scale(reader) is None for reader in codes.outputs
    ):
        return
    constant = gs.Constant(f"{codes.name}.u8_zero_point", np.array(zero_point, dtype=np.uint8))
    for node in (quantize, *codes.outputs):
        node.inputs[2] = constant
    codes.dtype = np.dtype(np.uint8)
