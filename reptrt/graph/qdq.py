"""Write a plan into a graph as Q/DQ pairs: the form that TensorRT takes.

    activation  x -> QuantizeLinear(scale) -> DequantizeLinear(scale) -> readers
    weight      INT8 codes (initializer) -> DequantizeLinear(scale per output channel) -> layer
    bias        stays float

All zero points are 0. Codes are INT8; an activation with full range has UINT8 codes until
`reptrt.rewrite.recentre` moves them. Numbers: `graph.plan`, arithmetic: `core.grid`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from reptrt.core.errors import CalibrationError
from reptrt.core.grid import Grid, channel_amax, quantize, scale_from_amax
from reptrt.graph.net import Net, constant_value, producer_of
from reptrt.graph.placement import Placement
from reptrt.graph.plan import QuantizedActivation, QuantizedWeight, QuantPlan
from reptrt.graph.queries import base, producer_past_casts

_ROLES = ("scale", "zero_point", "q", "dq", "quantize", "dequantize", "clip", "clipped")


def quantize_weight(weight: npt.NDArray[np.floating], axis: int, grid: Grid) -> QuantizedWeight:
    """Quantize a weight per output channel, rounding to nearest: scale = amax / qmax."""
    scale = scale_from_amax(channel_amax(weight, axis), grid)
    codes = quantize(weight, scale, grid, axis).astype(np.int8, casting="safe", copy=False)
    return QuantizedWeight(codes, scale, axis)


def quantize_weights(net: Net, placement: Placement, grid: Grid) -> dict[str, QuantizedWeight]:
    """Quantize every weight of a placement to nearest; return node name -> codes and scales.

    Raises:
        CalibrationError: a weight is not finite.
    """
    quantized = {}
    nodes = {node.name: node for node in net.graph.nodes}
    for weight in placement.weights:
        values = constant_value(nodes[weight.node].inputs[1])
        if values is None or not np.isfinite(values).all():
            raise CalibrationError(
                f"{weight.node}: the weight holds NaN or Inf; mend the checkpoint"
            )
        quantized[weight.node] = quantize_weight(values, weight.axis, grid)
    return quantized


def insert_qdq(net: Net, plan: QuantPlan) -> None:
    """Insert all Q/DQ pairs of a plan into a net, in place.

    A grid smaller than INT8 is simulated: a Clip before the Q keeps the codes inside it.

    Args:
        net: the float graph that the plan was made for; every node leads to an output.
        plan: the pairs.
    """
    nodes = {node.name: node for node in net.graph.nodes}
    tensors = net.graph.tensors()
    for tensor, activation in plan.activations.items():
        result = _append_pair(net, tensors[tensor], activation)
        for node_name, index in activation.readers:
            nodes[node_name].inputs[index] = result
    for node_name, weight in plan.weights.items():
        _replace_weight(net, nodes[node_name], weight)
    net.graph.cleanup(remove_unused_graph_inputs=False).toposort()


def update_qdq(net: Net, plan: QuantPlan) -> None:
    """Write the scales and codes of a plan into the pairs that an earlier form of it inserted.

    Args:
        net: the Q/DQ graph; its constants change in place.
        plan: the same activations and weights, with other numbers.
    """
    for tensor, pair in inserted_pairs(net, plan).items():
        activation = plan.activations[tensor]
        for node in (pair.quantize, *pair.dequantizes):
            node.inputs[1].values = np.array(activation.scale, dtype=np.float32)
        if pair.clip is not None:
            for bound, value in zip(pair.clip.inputs[1:], _clip_bounds(activation), strict=True):
                bound.values = value
    nodes = {node.name: node for node in net.graph.nodes}
    for name, weight in plan.weights.items():
        dequantize = producer_of(nodes[name].inputs[1])
        dequantize.inputs[0].values, dequantize.inputs[1].values = weight.codes, weight.scale


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """The nodes of the Q/DQ pair of one activation."""

    quantize: gs.Node
    dequantizes: tuple[gs.Node, ...]  # one, unless later rewrites gave some readers their own
    clip: gs.Node | None  # that simulates fewer bits

    @property
    def before(self) -> tuple[gs.Node, ...]:
        """The nodes of the pair before its DequantizeLinear."""
        return (self.quantize,) if self.clip is None else (self.clip, self.quantize)

    @property
    def source(self) -> gs.Tensor:
        """The tensor that the pair quantizes; casts before Q and Clip are looked through."""
        return base((self.quantize if self.clip is None else self.clip).inputs[0])


def pair_of(quantize: gs.Node) -> Pair:
    """Return the pair that a QuantizeLinear belongs to."""
    clip = producer_past_casts(quantize.inputs[0])
    readers = quantize.outputs[0].outputs
    return Pair(
        quantize,
        tuple(node for node in readers if node.op == "DequantizeLinear"),
        clip if clip is not None and _is_simulation(clip) else None,
    )


def inserted_pairs(net: Net, plan: QuantPlan) -> dict[str, Pair]:
    """Return the pairs that `insert_qdq` wrote for a plan: tensor -> nodes."""
    return dict(_inserted_pairs(net, plan))


def _inserted_pairs(net: Net, plan: QuantPlan) -> Iterator[tuple[str, Pair]]:
    nodes = {node.name: node for node in net.graph.nodes}
    for tensor, activation in plan.activations.items():
        node_name, index = activation.readers[0]
        dequantize = producer_of(nodes[node_name].inputs[index])
        yield tensor, pair_of(producer_of(dequantize.inputs[0]))


def _is_simulation(clip: gs.Node) -> bool:
    """Whether a Clip is the one that simulates fewer bits, which `insert_qdq` puts before a Q."""
    prefix, dot, role = clip.name.rpartition(".")
    readers = [reader.name for reader in clip.outputs[0].outputs]
    return clip.op == "Clip" and role == "clip" and readers == [f"{prefix}{dot}quantize"]


def _append_pair(net: Net, tensor: gs.Tensor, activation: QuantizedActivation) -> gs.Variable:
    """Append the Q/DQ pair of a tensor; return its result."""
    name = net.fresh_prefix(tensor.name, _ROLES)
    dtype = activation.grid.dtype
    parameters = [
        gs.Constant(f"{name}.scale", np.array(activation.scale, dtype=np.float32)),
        gs.Constant(f"{name}.zero_point", np.array(activation.grid.zero_point, dtype)),
    ]
    codes = gs.Variable(f"{name}.q", dtype=dtype, shape=tensor.shape)
    result = gs.Variable(f"{name}.dq", dtype=np.float32, shape=tensor.shape)
    if not activation.grid.is_whole:
        tensor = _clip(net.graph, name, tensor, activation)
    net.graph.nodes += [
        gs.Node("QuantizeLinear", f"{name}.quantize", {}, [tensor, *parameters], [codes]),
        gs.Node("DequantizeLinear", f"{name}.dequantize", {}, [codes, *parameters], [result]),
    ]
    return result


def _clip(
    graph: gs.Graph, prefix: str, tensor: gs.Tensor, activation: QuantizedActivation
) -> gs.Tensor:
    name = f"{prefix}.clip"
    bounds = [
        gs.Constant(f"{name}.{role}", value)
        for role, value in zip(("min", "max"), _clip_bounds(activation), strict=True)
    ]
    result = gs.Variable(f"{name}ped", dtype=np.float32, shape=tensor.shape)
    graph.nodes.append(gs.Node("Clip", name, {}, [tensor, *bounds], [result]))
    return result


def _clip_bounds(activation: QuantizedActivation) -> list[npt.NDArray[np.float32]]:
    """Return the real values of the smallest and the largest code."""
    scale = np.float32(activation.scale)
    return [
        np.array(np.float32(code) * scale) for code in (activation.grid.qmin, activation.grid.qmax)
    ]


def _replace_weight(net: Net, node: gs.Node, weight: QuantizedWeight) -> None:
    name = net.fresh_prefix(f"{node.name}.weight", _ROLES)
    zero_point = np.zeros(weight.scale.shape, dtype=np.int8)
    inputs = [
        gs.Constant(f"{name}.q", weight.codes),
        gs.Constant(f"{name}.scale", weight.scale),
        gs.Constant(f"{name}.zero_point", zero_point),
    ]
    result = gs.Variable(f"{name}.dq", dtype=np.float32, shape=weight.codes.shape)
    dequantize = gs.Node(
        "DequantizeLinear", f"{name}.dequantize", {"axis": weight.axis}, inputs, [result]
    )
    net.graph.nodes.append(dequantize)
    node.inputs[1] = result
