"""What a Q/DQ graph computes with, read from the graph: pairs, scales, codes, the whole plan.

The file may be of any tool: weights are INT8 codes with a DequantizeLinear, or floats with a pair.
A float graph gives float weights.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.core.arrays import AnyArray, Float64Array
from reptrt.core.grid import Grid
from reptrt.graph.flow import moves_values
from reptrt.graph.net import (
    WEIGHTED_OPS,
    Net,
    constant_of,
    constant_value,
    producer,
    weighted_nodes,
)
from reptrt.graph.plan import QuantizedActivation, QuantizedWeight, QuantPlan
from reptrt.graph.qdq import Pair, pair_of
from reptrt.graph.queries import (
    base,
    dequantize_before,
    given,
    is_quantize,
    producer_past_casts,
    quantization_of,
    quantize_before,
    readers,
    value_past_casts,
)
from reptrt.graph.recentred import read_recentred


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeight:
    """The weight of one layer."""

    values: AnyArray  # integer codes, or floats
    scale: Float64Array | None  # scalar or (channels,); None: floats without Q/DQ
    axis: int  # of the channels
    bias: Float64Array | None

    @property
    def form(self) -> str:
        """Type and shape of the values: ``int8 64x64x3x3``."""
        return f"{self.values.dtype} {'x'.join(map(str, self.values.shape))}"

    def dequantized(self) -> Float64Array:
        """Return codes * scale; floats as they are. Zero points are taken to be 0."""
        values = np.asarray(self.values, dtype=np.float64)
        if self.scale is None or self.values.dtype.kind not in "iu":
            return values
        shape = [1] * values.ndim
        if self.scale.size > 1:
            shape[self.axis] = -1
        return values * self.scale.reshape(shape)


def activation_pairs(net: Net) -> Iterator[tuple[str, Pair]]:
    """Yield the tensor and the nodes of the pair of every quantized activation.

    The tensor of a recentred pair is the one that it was made for, the output of a ReLU that is
    no longer in the graph.
    """
    recentred = {record.quantize: record.tensor for record in read_recentred(net)}
    for node in net.graph.nodes:
        if is_quantize(node) and value_past_casts(node.inputs[0]) is None:
            pair = pair_of(node)
            yield recentred.get(node.name) or pair.source.name, pair


def activation_scales(net: Net) -> dict[str, Float64Array]:
    """Return tensor name -> scale, for every quantized activation whose scale is a constant."""
    scales = {
        tensor: value_past_casts(pair.quantize.inputs[1]) for tensor, pair in activation_pairs(net)
    }
    return {
        tensor: np.asarray(scale, dtype=np.float64)
        for tensor, scale in scales.items()
        if scale is not None
    }


def layer_weights(net: Net) -> dict[str, LayerWeight]:
    """Return layer name -> weight, for every layer with a constant one."""
    layers = (node for node in net.graph.nodes if node.op in WEIGHTED_OPS)
    weights = {node.name: _layer_weight(node) for node in layers}
    return {name: weight for name, weight in weights.items() if weight is not None}


def plan_from_net(net: Net) -> QuantPlan:
    """Return the plan of a Q/DQ graph: that which `reptrt.graph.qdq.insert_qdq` wrote into it.

    Later rewrites of the same graph are seen through: a recentred activation has its codes from 0
    on, and a DQ with a scale of its own, which took the place of a Mul, is a reader.

    In a file of another tool, what a plan cannot express is left out: scales per channel of an
    activation, codes other than INT8 and UINT8, weights with zero points; of several pairs on one
    tensor, all but the first. The codes of an activation are those less its zero point.
    """
    codes = {record.tensor: record.code for record in read_recentred(net)}
    activations: dict[str, QuantizedActivation] = {}
    for tensor, pair in activation_pairs(net):
        activation = _activation(pair, codes.get(tensor))
        if activation is not None:
            activations.setdefault(tensor, activation)
    groups = _groups(net, activations)
    layers = (node for node in net.graph.nodes if node.op in WEIGHTED_OPS)
    weights = {node.name: _quantized_weight(node) for node in layers}
    return QuantPlan(
        {name: replace(a, group=groups[name]) for name, a in activations.items()},
        {name: weight for name, weight in weights.items() if weight is not None},
        tuple(sorted(node.name for node in weighted_nodes(net.graph))),
    )


def _layer_weight(node: gs.Node) -> LayerWeight | None:
    bias = given(node, 2)
    bias_values = None if bias is None else constant_value(bias)
    floats = None if bias_values is None else np.asarray(bias_values, dtype=np.float64)
    dequantize = dequantize_before(node.inputs[1])
    if dequantize is None:
        values = value_past_casts(node.inputs[1])
        return None if values is None else LayerWeight(np.asarray(values), None, 0, floats)
    scale, values = value_past_casts(dequantize.inputs[1]), value_past_casts(dequantize.inputs[0])
    quantize = producer(base(dequantize.inputs[0]))
    if values is None and quantize is not None and is_quantize(quantize):
        values = value_past_casts(quantize.inputs[0])
    if values is None or scale is None:
        return None
    axis = int(dequantize.attrs.get("axis", 1))
    return LayerWeight(np.asarray(values), np.asarray(scale, dtype=np.float64), axis, floats)


def _activation(pair: Pair, code: int | None) -> QuantizedActivation | None:
    """Return what a pair says, in a group of its own; ``code`` is that of c if it is recentred."""
    parameters = quantization_of(pair.quantize)
    grid = None if parameters is None else parameters.grid
    if parameters is None or grid is None or parameters.scale.size != 1:
        return None
    scale = float(parameters.scale.reshape(()))
    if code is not None:
        grid = Grid(0, 2 * code - 1)
    elif pair.clip is not None:
        low, high = (float(constant_of(bound)) for bound in pair.clip.inputs[1:])
        grid = Grid(round(low / scale), round(high / scale))
    return QuantizedActivation(tuple(_readers(pair)), 0, scale, grid)


def _readers(pair: Pair) -> Iterator[tuple[str, int]]:
    """Yield node name and input index of what reads the result of a pair."""
    scale = constant_of(pair.quantize.inputs[1])
    for dequantize in pair.dequantizes:
        own = value_past_casts(dequantize.inputs[1])
        if own is not None and (own != scale).any():
            yield dequantize.name, 0
        else:
            consumers = readers(dequantize.outputs[0], through=("Cast",))
            yield from ((node.name, index) for node, index in consumers)


def _quantized_weight(node: gs.Node) -> QuantizedWeight | None:
    """Return the INT8 codes of a layer's weight with a scale per output channel, or None."""
    dequantize = producer_past_casts(node.inputs[1])
    parameters = None if dequantize is None else quantization_of(dequantize)
    if (
        dequantize is None
        or parameters is None
        or parameters.type != "int8"
        or parameters.zero_point
    ):
        return None
    codes = value_past_casts(dequantize.inputs[0])
    axis = parameters.axis % codes.ndim if codes is not None else 0
    if codes is None or parameters.scale.size not in (1, codes.shape[axis]):
        return None
    scale = np.broadcast_to(parameters.scale.reshape(-1).astype(np.float32), codes.shape[axis])
    return QuantizedWeight(codes.astype(np.int8), scale, axis)


def _groups(net: Net, tensors: Collection[str]) -> dict[str, int]:
    """Return tensor -> number of its group: inputs and output of a Concat belong together."""
    root = {tensor: tensor for tensor in tensors}
    for node in net.graph.nodes:
        if node.op != "Concat":
            continue
        inputs = [_origin(tensor) for tensor in node.inputs]
        if None in inputs:
            continue
        members = {root[n] for n in (*inputs, node.outputs[0].name) if n in root}
        first = min(members, default="")
        root |= {name: first for name, old in root.items() if old in members}
    numbers = {name: index for index, name in enumerate(dict.fromkeys(root.values()))}
    return {tensor: numbers[root[tensor]] for tensor in tensors}


def _origin(tensor: gs.Tensor) -> str | None:
    """Return the tensor whose pair a tensor comes from, or None; nodes may move values between."""
    node = producer_past_casts(tensor)
    while node is not None and moves_values(node):
        node = producer_past_casts(node.inputs[0])
    quantize = quantize_before(node)
    return None if quantize is None else pair_of(quantize).source.name
