"""What each layer costs by its shapes: multiply-accumulates, and bytes that have to move.

The bytes are those of input, weight and output, each moved once: the least that a layer can do.
A layer planned INT8 moves one byte a value (its output too, as if the next Q were fused), any other
as many as the graph's types have.

Intensity is multiply-accumulates per byte. A processor that can do R of them in the time in which
it moves one byte is kept waiting by every layer whose intensity is below R (the roofline model,
doi 10.1145/1498765.1498785): a dense 3x3 convolution of 64 channels has 288 in INT8 on a large
image, a depthwise one 4.5.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import onnx

from reptrt.graph.intent import node_name, planned_int8
from reptrt.graph.net import WEIGHTED_OPS

_DEFAULT_BYTES = 4
_BYTES: dict[int, int] = {
    onnx.TensorProto.FLOAT: 4,
    onnx.TensorProto.FLOAT16: 2,
    onnx.TensorProto.BFLOAT16: 2,
    onnx.TensorProto.DOUBLE: 8,
}


class _Activation(NamedTuple):
    kind: int  # onnx.TensorProto.DataType
    shape: tuple[int, ...]  # a dimension that can change is 0

    @property
    def values(self) -> int:
        """Number of values of one image."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One layer at one batch size."""

    layer: str  # name of the node
    macs: int  # multiply-accumulates
    bytes_moved: int
    is_int8: bool  # planned INT8

    @property
    def intensity(self) -> float:
        """Multiply-accumulates per byte."""
        return self.macs / self.bytes_moved

    def time(self, macs_per_byte: float) -> float:
        """Return its time by the roofline, in units of the time to move one byte."""
        return max(self.macs / macs_per_byte, float(self.bytes_moved))


def layer_costs(model: onnx.ModelProto, batch: int) -> tuple[LayerCost, ...]:
    """Return the cost of every Conv, ConvTranspose, Gemm and MatMul with a constant weight.

    Layers whose shapes are not known beside the batch are left out.

    Args:
        model: a float or Q/DQ graph; the first dimension of activations is the batch.
        batch: number of images.
    """
    model = onnx.shape_inference.infer_shapes(model)
    graph = model.graph
    known = {i.name: _activation(i) for i in (*graph.value_info, *graph.input, *graph.output)}
    weights = _weights(graph)
    int8 = set(planned_int8(model))
    costs = []
    for node in graph.node:
        if node.op_type not in WEIGHTED_OPS or node.input[1] not in weights:
            continue
        source, result = known.get(node.input[0]), known.get(node.output[0])
        if source is not None and result is not None and source.values and result.values:
            weight, is_int8 = weights[node.input[1]], node_name(node) in int8
            costs.append(_cost(node, weight, source, result, batch, is_int8=is_int8))
    return tuple(costs)


def _cost(
    node: onnx.NodeProto,
    weight: tuple[int, ...],
    source: _Activation,
    result: _Activation,
    batch: int,
    *,
    is_int8: bool,
) -> LayerCost:
    """Return the cost of a layer from the shapes of its weight and both ends."""
    positions = {
        "Conv": result.shape[2:],
        "ConvTranspose": source.shape[2:],
        "MatMul": result.shape[1:-1],
    }.get(node.op_type, ())
    size_in, size_out = (
        1 if is_int8 else _BYTES.get(end.kind, _DEFAULT_BYTES) for end in (source, result)
    )
    moved = batch * (source.values * size_in + result.values * size_out)
    return LayerCost(
        layer=node_name(node),
        macs=batch * math.prod(weight) * math.prod(positions),
        bytes_moved=moved + math.prod(weight) * size_in,
        is_int8=is_int8,
    )


def _weights(graph: onnx.GraphProto) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of every constant, also behind Q, DQ and Cast."""
    found = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                found[node.output[0]] = tuple(attribute.t.dims)
        passes = node.op_type in ("QuantizeLinear", "DequantizeLinear", "Cast", "Identity")
        if passes and node.input[0] in found:
            found[node.output[0]] = found[node.input[0]]
    return found


def _activation(info: onnx.ValueInfoProto) -> _Activation:
    kind = info.type.tensor_type
    return _Activation(kind.elem_type, tuple(int(d.dim_value) for d in kind.shape.dim))
