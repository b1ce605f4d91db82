"""The cost of each layer, computed from shapes: multiply-accumulates and bytes that are moved.

The bytes are those of input, weight and output, each moved once, which is the minimum for a layer.
A layer that is planned in INT8 moves one byte per value, also for its output, because the next Q is
assumed to be fused. Every other layer moves as many bytes per value as its tensors' types have.

Intensity is the number of multiply-accumulates per byte. A processor that computes R
multiply-accumulates while it moves one byte waits for memory in every layer with an intensity below
R (the roofline model, doi 10.1145/1498765.1498785). On a large image in INT8, a dense 3x3
convolution with 64 channels has an intensity of 288, a depthwise one of 4.5.

A split adds a summand to the output of a layer, and full range a map of what lies behind its
border; `operands` says how many bytes that is for which layer.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from reptrt.graph.intent import planned_int8
from reptrt.graph.net import WEIGHTED_OPS, Net, constant_value, net_from_model, producer
from reptrt.graph.queries import label
from reptrt.graph.recentred import read_recentred
from reptrt.graph.splits import read_splits

_DEFAULT_BYTES = 4  # per value of a tensor whose type is unknown
_HALF_BYTES = 2  # per value of a summand that has no codes, which engines hold in FP16
_SAME_SHAPE = ("QuantizeLinear", "DequantizeLinear", "Cast")


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
        """Return the time that the roofline model gives, in units of the time to move one byte."""
        return max(self.macs / macs_per_byte, float(self.bytes_moved))


@dataclass(frozen=True, slots=True)
class Operand:
    """What is read to be added to the output of a layer."""

    layer: str | None  # name of the node; None: it is not known
    bytes_moved: int


def layer_costs(model: onnx.ModelProto, batch: int) -> tuple[LayerCost, ...]:
    """Return the cost of every Conv, ConvTranspose, Gemm and MatMul with a constant weight.

    Layers with an unknown dimension, other than the batch, are left out.

    Args:
        model: a float or Q/DQ graph; the first dimension of activations is the batch.
        batch: number of images.
    """
    net = net_from_model(onnx.shape_inference.infer_shapes(model))
    int8 = set(planned_int8(model))
    costs = []
    for node in net.graph.nodes:
        weight = _shape_of_constant(node.inputs[1]) if node.op in WEIGHTED_OPS else None
        ends = (_dimensions(node.inputs[0]), _dimensions(node.outputs[0])) if weight else ()
        if weight and all(math.prod(shape) for shape in ends):
            costs.append(_cost(node, weight, batch, is_int8=label(node) in int8))
    return tuple(costs)


def coarse_layers(model: onnx.ModelProto) -> frozenset[str]:
    """Return the names of the layers that exist only because another one was split."""
    splits = read_splits(net_from_model(model))
    return frozenset(split.side for split in splits if split.form == "coarse-fine")


def operands(model: onnx.ModelProto, batch: int) -> tuple[Operand, ...]:
    """Return what splits and full ranges add to the outputs of layers.

    The skip of an identity split has the INT8 codes of the layer's input, one byte a value. A
    coarse layer writes what the fine one reads; without codes that is a value in FP16, for which
    `layer_costs` counts one byte. A border map is a constant in FP16, the same for every image.
    """
    net = net_from_model(onnx.shape_inference.infer_shapes(model))
    return (*_summands(net, batch), *_border_maps(net))


def _summands(net: Net, batch: int) -> Iterator[Operand]:
    nodes = {node.name: node for node in net.graph.nodes}
    for split in read_splits(net):
        node = nodes.get(split.sum)
        values = batch * math.prod(_dimensions(node.outputs[0])) if node is not None else 0
        is_half = split.form == "coarse-fine" and split.precision == "float"
        yield Operand(split.main, values * (_HALF_BYTES if is_half else 1))
        if is_half:
            yield Operand(split.side, values * (_HALF_BYTES - 1))


def _border_maps(net: Net) -> Iterator[Operand]:
    nodes = {node.name: node for node in net.graph.nodes}
    mains = {split.sum: split.main for split in read_splits(net)}
    for name in (name for record in read_recentred(net) for name in record.added):
        if (node := nodes.get(name)) is None:
            continue
        sizes = [value.size for end in node.inputs if (value := constant_value(end)) is not None]
        before = next((maker for end in node.inputs if (maker := producer(end))), None)
        layer = None if before is None else mains.get(before.name, label(before))
        yield Operand(layer, _HALF_BYTES * sum(sizes))


def _cost(node: gs.Node, weight: tuple[int, ...], batch: int, *, is_int8: bool) -> LayerCost:
    """Return the cost of a layer from the shapes of its weight, input and output."""
    source, result = node.inputs[0], node.outputs[0]
    positions = {
        "Conv": _dimensions(result)[1:],
        "ConvTranspose": _dimensions(source)[1:],
        "MatMul": _dimensions(result)[:-1],
    }.get(node.op, ())
    size_in, size_out = (1 if is_int8 else _bytes_per_value(end) for end in (source, result))
    values_in, values_out = math.prod(_dimensions(source)), math.prod(_dimensions(result))
    moved = batch * (values_in * size_in + values_out * size_out)
    return LayerCost(
        layer=label(node),
        macs=batch * math.prod(weight) * math.prod(positions),
        bytes_moved=moved + math.prod(weight) * size_in,
        is_int8=is_int8,
    )


def _shape_of_constant(tensor: gs.Tensor) -> tuple[int, ...] | None:
    """Return the shape of a constant, also behind Q, DQ and Cast; None if it is not constant."""
    while (value := constant_value(tensor)) is None:
        node = producer(tensor)
        if node is None or node.op not in _SAME_SHAPE:
            return None
        tensor = node.inputs[0]
    return value.shape


def _dimensions(tensor: gs.Tensor) -> tuple[int, ...]:
    """Return an activation's dimensions for one image; 0 for an unknown one, (0,) if all are."""
    if not tensor.shape:
        return (0,)
    return tuple(size if isinstance(size, int) and size > 0 else 0 for size in tensor.shape[1:])


def _bytes_per_value(tensor: gs.Tensor) -> int:
    kind = tensor.dtype  # a NumPy type, or ONNX's code of a type that NumPy does not have
    if kind is None:
        return _DEFAULT_BYTES
    return np.dtype(
        onnx.helper.tensor_dtype_to_np_dtype(kind) if isinstance(kind, int) else kind
    ).itemsize
