"""Write scales and INT8 codes into a graph as Q/DQ pairs: the form that TensorRT takes.

    activation  x -> QuantizeLinear(scale) -> DequantizeLinear(scale) -> readers
    weight      INT8 codes (initializer) -> DequantizeLinear(scale per output channel) -> layer
    bias        stays float

Zero points are 0 and INT8 everywhere. Placement: `graph.placement`, arithmetic: `core.grid`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from reptrt.core.errors import CalibrationError
from reptrt.core.grid import Grid, channel_amax, quantize, scale_from_amax
from reptrt.graph.net import Net, constant_value
from reptrt.graph.placement import Placement, Weight

_INT8 = Grid.activation(8)
_WHOLE = (_INT8, _INT8.full_range)  # grids that saturation alone enforces
_ROLES = ("scale", "zero_point", "q", "dq", "quantize", "dequantize", "clip", "clipped")


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """INT8 codes and the scale of each output channel: weight ~ codes * scale along ``axis``."""

    codes: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float32]  # (O,)
    axis: int


def quantize_weight(weight: npt.NDArray[np.floating], axis: int, grid: Grid) -> QuantizedWeight:
    """Quantize a weight per output channel, rounding to nearest: scale = amax / qmax."""
    scale = scale_from_amax(channel_amax(weight, axis), grid)
    return QuantizedWeight(quantize(weight, scale, grid, axis), scale, axis)


def quantize_weights(net: Net, placement: Placement, grid: Grid) -> dict[str, QuantizedWeight]:
    """Quantize every weight of the plan to nearest; returns node name -> codes and scales.

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


def insert_qdq(
    net: Net,
    placement: Placement,
    scales: Mapping[str, float],
    weights: Mapping[str, QuantizedWeight],
    grid: Grid,
    full_range: Collection[str] = (),
) -> None:
    """Insert all Q/DQ pairs of a plan into a net, in place.

    A grid smaller than INT8 is simulated: a Clip before Q keeps the codes inside it.

    Args:
        net: the float graph that the plan was made for.
        placement: where pairs go.
        scales: tensor name -> step size, for every activation of the plan.
        weights: node name -> codes, for every weight of the plan.
        grid: the codes of activations.
        full_range: activations that are never negative and take the UINT8 codes of
            ``grid.full_range``; `reptrt.rewrite.recentre` brings them to zero point 0.
    """
    nodes = {node.name: node for node in net.graph.nodes}
    tensors = net.graph.tensors()
    for activation in placement.activations:
        scale = scales[activation.tensor]
        codes = grid.full_range if activation.tensor in full_range else grid
        result = _append_pair(net, tensors[activation.tensor], scale, codes)
        for node_name, index in activation.readers:
            nodes[node_name].inputs[index] = result
    for weight in placement.weights:
        _replace_weight(net, nodes[weight.node], weight, weights[weight.node])
    net.graph.cleanup(remove_unused_graph_inputs=False).toposort()


def is_simulation(clip: gs.Node) -> bool:
    """Whether a Clip is the one that simulates fewer bits, which `insert_qdq` puts before a Q."""
    prefix, dot, role = clip.name.rpartition(".")
    readers = [reader.name for reader in clip.outputs[0].outputs]
    return clip.op == "Clip" and role == "clip" and readers == [f"{prefix}{dot}quantize"]


def _append_pair(net: Net, tensor: gs.Tensor, scale: float, grid: Grid) -> gs.Variable:
    """Append the Q/DQ pair of a tensor; return its result."""
    name = net.fresh_prefix(tensor.name, _ROLES)
    dtype = np.uint8 if grid.qmin == 0 else np.int8
    parameters = [
        gs.Constant(f"{name}.scale", np.array(scale, dtype=np.float32)),
        gs.Constant(f"{name}.zero_point", np.array(0, dtype=dtype)),
    ]
    codes = gs.Variable(f"{name}.q", dtype=dtype, shape=tensor.shape)
    result = gs.Variable(f"{name}.dq", dtype=np.float32, shape=tensor.shape)
    if grid not in _WHOLE:
        tensor = _clip(net.graph, name, tensor, scale, grid)
    net.graph.nodes += [
        gs.Node("QuantizeLinear", f"{name}.quantize", {}, [tensor, *parameters], [codes]),
        gs.Node("DequantizeLinear", f"{name}.dequantize", {}, [codes, *parameters], [result]),
    ]
    return result


def _clip(graph: gs.Graph, prefix: str, tensor: gs.Tensor, scale: float, grid: Grid) -> gs.Tensor:
    name = f"{prefix}.clip"
    bounds = [
        gs.Constant(f"{name}.{role}", np.array(np.float32(code) * np.float32(scale)))
        for role, code in (("min", grid.qmin), ("max", grid.qmax))
    ]
    result = gs.Variable(f"{name}ped", dtype=np.float32, shape=tensor.shape)
    graph.nodes.append(gs.Node("Clip", name, {}, [tensor, *bounds], [result]))
    return result


def _replace_weight(net: Net, node: gs.Node, weight: Weight, quantized: QuantizedWeight) -> None:
    name = net.fresh_prefix(f"{node.name}.weight", _ROLES)
    zero_point = np.zeros(quantized.scale.shape, dtype=np.int8)
    inputs = [
        gs.Constant(f"{name}.q", quantized.codes),
        gs.Constant(f"{name}.scale", quantized.scale),
        gs.Constant(f"{name}.zero_point", zero_point),
    ]
    result = gs.Variable(f"{name}.dq", dtype=np.float32, shape=quantized.codes.shape)
    dequantize = gs.Node(
        "DequantizeLinear", f"{name}.dequantize", {"axis": weight.axis}, inputs, [result]
    )
    net.graph.nodes.append(dequantize)
    node.inputs[1] = result
