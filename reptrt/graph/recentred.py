"""The record of recentred activations, and the way back to unsigned codes.

`reptrt.rewrite.recentre` gives tensors that are never negative all 256 codes under zero point 0:
their pair carries x - c, and biases on both sides make up for c. The record, kept in the net's
metadata, names the nodes that took part. It holds no amounts: they follow from the scales and
weights of the graph as it is, so that a graph whose scales were rounded in the meantime goes back
to one that computes the same.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from reptrt.graph.net import (
    Net,
    constant_of,
    constant_value,
    get_json,
    producer,
    set_json,
)

Float64Array = npt.NDArray[np.float64]

_KEY = "recentred"


@dataclass(frozen=True, slots=True)
class Recentred:
    """One tensor whose pair carries x - c, and the names of all nodes that were changed for it."""

    tensor: str  # what the pair quantized before: the output of the ReLU
    offset: float  # c, in units of the tensor
    code: int  # c in steps: 128, or half the codes of a simulated grid
    quantize: str
    relu: str | None  # removed: the saturation of Q takes its place
    clips: tuple[str, ...]  # Clips before Q, whose bounds moved by -c
    producer: str  # layer or Add of a constant that took -c
    layers: tuple[str, ...]  # readers whose bias took c * (sum of the weights of each channel)
    factors: tuple[tuple[str, str], ...]  # Mul, layer whose bias took c * factor
    skips: tuple[str, ...]  # layers or Adds of a constant that took c in place of a residual Add
    added: tuple[str, ...]  # Adds made: maps of borders, and c behind average pools


def record_recentred(net: Net, found: Iterable[Recentred]) -> None:
    """Write the record into the net's metadata, in addition to what is there."""
    known = {one.tensor: one for one in (*read_recentred(net), *found)}
    if known:
        set_json(net, _KEY, {tensor: asdict(one) for tensor, one in known.items()})


def read_recentred(net: Net) -> tuple[Recentred, ...]:
    """Return the record; empty if nothing was recentred."""

    def parse(stored: dict[str, Any]) -> tuple[Recentred, ...]:
        every = stored.values()
        return tuple(Recentred(**{k: _tuples(v) for k, v in one.items()}) for one in every)

    return get_json(net, _KEY, parse) or ()


def restore(net: Net) -> tuple[str, ...]:
    """Give recentred tensors UINT8 codes with zero point 0 again, in place.

    Every code grows by c / scale and nothing else changes, to float rounding: biases go back,
    maps go, and the saturation of Q at 0 stays in place of the ReLU.

    Requires: FP32 scales, biases and float nodes.

    Returns:
        The tensors restored. One whose nodes are no longer there stays as it is.
    """
    nodes = {node.name: node for node in net.graph.nodes}
    deltas: dict[str, Float64Array] = {}
    left, restored = [], []
    for one in read_recentred(net):
        pair = _pair(nodes, one)
        if pair is None:
            left.append(one)
            continue
        scale = constant_value(pair[0].inputs[1])
        offset = one.code * np.asarray(scale, dtype=np.float64).reshape(())
        for name, delta in offsets_of(nodes, one, offset).items():
            deltas[name] = deltas.get(name, np.zeros(())) - delta
        set_codes(net, pair, np.uint8)
        for name in one.clips:
            move_bounds(net, nodes[name], float(offset))
        for name in one.added:
            _drop(nodes[name])
        restored.append(one.tensor)
    for name, delta in deltas.items():
        add_to_bias(net, nodes[name], delta)
    net.metadata.pop(f"reptrt.{_KEY}", None)
    record_recentred(net, left)
    return tuple(restored)


def offsets_of(
    nodes: Mapping[str, gs.Node], one: Recentred, offset: Float64Array | float
) -> dict[str, Float64Array]:
    """Return what recentring a tensor adds to biases: node name -> scalar or (O,), float64."""
    deltas: dict[str, Float64Array] = {}

    def add(name: str, delta: Float64Array | float) -> None:
        deltas[name] = deltas.get(name, np.zeros(())) + delta

    add(one.producer, -offset)
    for name in one.layers:
        add(name, offset * tap_sums(nodes[name]))
    for mul, name in one.factors:
        add(name, offset * _factor(nodes[mul], nodes[one.quantize]))
    for name in one.skips:
        add(name, offset)
    return deltas


def _factor(node: gs.Node, quantize: gs.Node) -> Float64Array:
    """Return what a Mul multiplies with, or a DQ with another scale than its Q."""
    constants = (constant_value(tensor) for tensor in node.inputs)
    factor = next(v for v in constants if v is not None).astype(np.float64).reshape(-1)
    if node.op == "DequantizeLinear":
        factor = factor / np.float64(constant_of(quantize.inputs[1]))
    return np.asarray(factor)


def dequantized_weight(node: gs.Node) -> Float64Array | None:
    """Return the weight of a layer as it is deployed, codes times scales; None if not constant."""
    value = constant_value(node.inputs[1])
    if value is not None:
        return value.astype(np.float64)
    maker = producer(node.inputs[1])
    if maker is None or maker.op != "DequantizeLinear":
        return None
    codes, scale = (constant_value(tensor) for tensor in maker.inputs[:2])
    if codes is None or scale is None or scale.ndim > 1:
        return None
    shape = [1] * codes.ndim
    if scale.size > 1:
        shape[int(maker.attrs.get("axis", 1))] = -1
    return np.asarray(codes.astype(np.float64) * scale.astype(np.float64).reshape(shape))


def tap_sums(node: gs.Node) -> Float64Array:
    """Return the sum of the weights of each output channel of a Conv or Gemm, (O,)."""
    weight = dequantized_weight(node)
    if weight is None:
        return np.zeros(())
    if node.op == "Gemm":
        axis = 1 if node.attrs.get("transB", 0) else 0
        return np.asarray(weight.sum(axis=axis) * float(node.attrs.get("alpha", 1.0)))
    return np.asarray(weight.reshape(weight.shape[0], -1).sum(axis=1))


def bias_index(node: gs.Node) -> int:
    """Return the input that holds the constant of a layer (2), or of an Add."""
    if node.op != "Add":
        return 2
    return next(i for i, tensor in enumerate(node.inputs) if constant_value(tensor) is not None)


def add_to_bias(net: Net, node: gs.Node, delta: Float64Array) -> None:
    """Add a constant to what a Conv, ConvTranspose, Gemm or Add of a constant makes.

    Args:
        net: the net of the node; it names a new bias.
        node: the node; without a bias it gets one.
        delta: a scalar, or one value per output channel, float64.
    """
    index = bias_index(node)
    old = constant_value(node.inputs[index]) if has_bias(node) else None
    if node.op == "Add":
        value = np.asarray(old, dtype=np.float64) + delta
    else:
        delta = delta / float(node.attrs.get("beta", 1.0)) if old is not None else delta
        channels = _num_outputs(node)
        before = np.zeros(channels) if old is None else old.astype(np.float64).reshape(-1)
        value = np.broadcast_to(before + delta, (channels,))
        if old is None:
            node.attrs.pop("beta", None)
    _replace(net, node, index, value.astype(np.float32))


def has_bias(node: gs.Node) -> bool:
    """Whether a layer, or an Add of a constant, has a bias."""
    index = bias_index(node)
    return len(node.inputs) > index and not node.inputs[index].is_empty()


def set_codes(net: Net, pair: list[gs.Node], dtype: npt.DTypeLike) -> None:
    """Give a Q and its DQs codes of a type, zero point 0."""
    codes = pair[0].outputs[0]
    name = net.fresh_name(f"{codes.name}.{np.dtype(dtype).name}_zero_point")
    zero_point = gs.Constant(name, np.zeros((), dtype=dtype))
    for node in pair:
        node.inputs[2] = zero_point
    codes.dtype = np.dtype(dtype)


def move_bounds(net: Net, clip: gs.Node, distance: float) -> None:
    """Add a distance to both bounds of a Clip (opset 11 or newer)."""
    for index, tensor in enumerate(list(clip.inputs[1:3]), start=1):
        value = None if tensor.is_empty() else constant_value(tensor)
        if value is not None:
            moved = np.asarray(value.astype(np.float64) + distance, dtype=np.float32)
            _replace(net, clip, index, moved)


def _pair(nodes: Mapping[str, gs.Node], one: Recentred) -> list[gs.Node] | None:
    """Return the Q and the DQs of a recentred tensor; None if the record does not fit the graph."""
    muls = [mul for mul, _ in one.factors]
    targets = [one.producer, *one.layers, *(name for _, name in one.factors), *one.skips]
    if any(name not in nodes for name in (*targets, *muls, *one.clips, *one.added, one.quantize)):
        return None
    quantize = nodes[one.quantize]
    pair = [quantize, *quantize.outputs[0].outputs]
    for node in pair:
        zero_point = constant_value(node.inputs[2]) if len(node.inputs) > 2 else None
        if node.op not in ("QuantizeLinear", "DequantizeLinear") or zero_point is None:
            return None
        scale = constant_value(node.inputs[1])
        if zero_point.dtype != np.int8 or zero_point.any() or scale is None or scale.size != 1:
            return None
    return pair


def _drop(node: gs.Node) -> None:
    """Remove an Add that recentring made behind a tensor that nobody else reads."""
    source, result = node.inputs[0], node.outputs[0]
    maker = source.inputs[0]
    node.inputs.clear()
    node.outputs.clear()
    index = next(i for i, tensor in enumerate(maker.outputs) if tensor is source)
    maker.outputs[index] = result


def _replace(net: Net, node: gs.Node, index: int, value: npt.NDArray[np.float32]) -> None:
    """Give a node a constant of its own, under the old name where nobody else reads that."""
    old = node.inputs[index] if index < len(node.inputs) else None
    if isinstance(old, gs.Constant) and len(old.outputs) == 1:
        old.values = value
        return
    name = net.fresh_name(f"{node.name}.bias")
    if old is None:
        node.inputs.append(gs.Constant(name, value))
    else:
        node.inputs[index] = gs.Constant(name, value)


def _num_outputs(node: gs.Node) -> int:
    weight = node.inputs[1]
    maker = producer(weight)
    if maker is not None and maker.op == "DequantizeLinear":
        weight = maker.inputs[0]
    shape = np.asarray(constant_value(weight)).shape
    if node.op == "Conv" or (node.op == "Gemm" and node.attrs.get("transB", 0)):
        return int(shape[0])
    return int(shape[1]) * int(node.attrs.get("group", 1))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
