"""What taking a constant c from a quantized activation changes: its pair, and biases around it.

Used by `reptrt.rewrite.recentre`, and with -c by `reptrt.rewrite.restore`.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from reptrt.core.arrays import Float64Array
from reptrt.graph.layers import set_constant, weight_sums
from reptrt.graph.net import Net, constant_of, constant_value
from reptrt.graph.qdq import Pair
from reptrt.graph.recentred import Recentred


def offsets_of(
    nodes: Mapping[str, gs.Node], record: Recentred, offset: float
) -> dict[str, Float64Array]:
    """Return what taking ``offset`` from a tensor adds to biases: node -> scalar or (O,)."""
    parts: list[tuple[str, Float64Array]] = [(record.producer, np.asarray(-offset))]
    parts += [(name, offset * weight_sums(nodes[name])) for name in record.layers]
    quantize = nodes[record.quantize]
    parts += [(name, offset * _factor(nodes[mul], quantize)) for mul, name in record.factors]
    parts += [(name, np.asarray(offset)) for name in record.skips]
    return total({name: part} for name, part in parts)


def total(parts: Iterable[Mapping[str, Float64Array]]) -> dict[str, Float64Array]:
    """Return the sum of all parts that each node has, in their order."""
    sums: dict[str, Float64Array] = {}
    for part in parts:
        for name, value in part.items():
            sums[name] = sums.get(name, np.zeros(())) + value
    return sums


def move_pair(
    net: Net, pair: Pair, clips: Iterable[gs.Node], dtype: npt.DTypeLike, distance: float
) -> None:
    """Give a pair codes of another type with zero point 0; move the bounds of Clips before it."""
    codes = pair.quantize.outputs[0]
    name = net.fresh_name(f"{codes.name}.{np.dtype(dtype).name}_zero_point")
    zero_point = gs.Constant(name, np.zeros((), dtype=dtype))
    for node in (pair.quantize, *pair.dequantizes):
        node.inputs[2] = zero_point
    codes.dtype = np.dtype(dtype)
    for clip in clips:
        _move_bounds(net, clip, distance)


def _move_bounds(net: Net, clip: gs.Node, distance: float) -> None:
    """Add a distance to both bounds of a Clip (opset 11 or newer)."""
    for index, tensor in enumerate(list(clip.inputs[1:3]), start=1):
        value = None if tensor.is_empty() else constant_value(tensor)
        if value is not None:
            moved = np.asarray(value.astype(np.float64) + distance, dtype=np.float32)
            set_constant(net, clip, index, moved)


def _factor(node: gs.Node, quantize: gs.Node) -> Float64Array:
    """Return what a Mul multiplies by, or a DQ whose scale is not that of its Q."""
    constants = (constant_value(tensor) for tensor in node.inputs)
    factor = next(v for v in constants if v is not None).astype(np.float64).reshape(-1)
    if node.op == "DequantizeLinear":
        factor = factor / np.float64(constant_of(quantize.inputs[1]))
    return np.asarray(factor)
