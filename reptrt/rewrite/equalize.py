"""Scale the channels of activations, at no cost in the deployed graph.

A ReLU is positively homogeneous: relu(r x) = r relu(x) for r > 0. So the producer of a channel may
scale it by r if every consumer scales it by 1 / r:

    producer   W[c, ...] * r[c],  b[c] * r[c]              consumer   W[:, c, ...] / r[c]

An activation has one INT8 scale for the whole tensor, a weight one for each output channel; which r
is best for both is decided by `reptrt.quantize.choose.factors`. Cross-layer equalization after
Nagel et al., arXiv 1906.04721; streams are ours.

Tensors that a ReLU, LeakyReLU, pool, the flattening of a 1 x 1 map or a sum of tensors of equal
shape connects must have the same factors: they are one stream. A residual stream has many producers
and readers. A stream is scaled if

1. what computes its tensors connects them, or is a layer with a constant weight of its own;
2. what reads its tensors connects them, or is such a layer; none is an output of the net.

Requires: float constants. Ensures: the graph's output is unchanged to float rounding.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.core.arrays import Float64Array, FloatArray
from reptrt.graph.net import Net, constant_value, producer, weighted_nodes
from reptrt.rewrite.contract import RewriteReport, Skipped
from reptrt.rewrite.linear import spread_over_kernel

_LAYERS = ("Conv", "Gemm")
_HOMOGENEOUS = ("Relu", "LeakyRelu")
_SUMS = ("Add", "Sub", "Sum")
_PER_CHANNEL = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """Tensors whose channels must be scaled together, and the layers that compute and read them."""

    tensors: tuple[str, ...]  # of the same channels; the first is the output of the first producer
    producers: tuple[gs.Node, ...]
    consumers: tuple[gs.Node, ...]

    @property
    def name(self) -> str:
        """The first tensor."""
        return self.tensors[0]


def equalize(
    net: Net, streams: Iterable[Stream], factors: Mapping[str, Float64Array]
) -> RewriteReport:
    """Scale the channels of streams.

    Args:
        net: a float net; changed in place.
        streams: of the net, as `find_streams` returns them.
        factors: stream -> factor of each channel, (C,); streams without an entry stay.
    """
    changed = []
    for stream in streams:
        if stream.name in factors:
            _scale(stream, factors[stream.name])
            changed.append(stream.name)
    return RewriteReport("equalize", tuple(changed))


def find_streams(net: Net) -> tuple[tuple[Stream, ...], tuple[Skipped, ...]]:
    """Return the streams that can be scaled, and the reasons why others cannot."""
    streams, skipped = [], []
    seen: set[str] = set()
    for layer in weighted_nodes(net.graph):
        if layer.outputs[0].name in seen:
            continue
        tensors = _connected(layer.outputs[0])
        seen |= tensors.keys()
        found = _stream(net, tensors)
        if isinstance(found, str):
            skipped.append(Skipped(layer.outputs[0].name, found))
        elif found.consumers:
            streams.append(found)
    return tuple(streams), tuple(skipped)


def _connected(start: gs.Tensor) -> dict[str, gs.Tensor]:
    """Return a tensor and all that nodes connect it to, by name, in the order of discovery."""
    found: dict[str, gs.Tensor] = {}
    todo = [start]
    while todo:
        tensor = todo.pop()
        if tensor.name in found:
            continue
        found[tensor.name] = tensor
        for node in (*tensor.inputs, *tensor.outputs):
            if _connects(node):
                todo += [*node.inputs, *node.outputs[:1]]
    return found


def _connects(node: gs.Node) -> bool:
    """Return whether the inputs of a node and its first output must have the same factors."""
    if node.op in _SUMS:
        shapes = {tuple((tensor.shape or [None])[1:]) for tensor in node.inputs}
        known = all(isinstance(size, int) for shape in shapes for size in shape)
        return known and len(shapes) == 1 and not any(map(_is_constant, node.inputs))
    return (
        node.op in _HOMOGENEOUS
        or node.op in _PER_CHANNEL
        or (node.op == "Flatten" and _is_one_by_one(node.inputs[0]))
    )


def _is_constant(tensor: gs.Tensor) -> bool:
    return constant_value(tensor) is not None


def _is_one_by_one(tensor: gs.Tensor) -> bool:
    node = producer(tensor)
    return node is not None and node.op in ("GlobalAveragePool", "GlobalMaxPool")


def _stream(net: Net, tensors: Mapping[str, gs.Tensor]) -> Stream | str:
    """Return the stream of connected tensors, or why they cannot be scaled."""
    producers, consumers = [], []
    for tensor in tensors.values():
        maker = producer(tensor)
        if maker is None or not (_connects(maker) or _is_layer(maker)):
            return "its producer is not a Conv or Gemm with its own constant weight"
        if any(tensor is output for output in net.graph.outputs):
            return "it is an output of the graph"
        if not _connects(maker):
            producers.append(maker)
        for node in tensor.outputs:
            if _connects(node):
                continue
            if node.op not in _LAYERS or node.inputs[0] is not tensor:
                return "a node other than a layer, a pool or a sum reads it"
            if not _is_layer(node):
                return "a layer that reads it does not have its own constant weight"
            consumers.append(node)
    return Stream(tuple(tensors), tuple(producers), tuple(consumers))


def _is_layer(node: gs.Node) -> bool:
    """Whether a node is a layer whose weight and bias are constants that only it reads."""
    if node.op not in _LAYERS or (node.op == "Gemm" and not node.attrs.get("transB", 0)):
        return False
    return all(
        isinstance(tensor, gs.Constant) and len(tensor.outputs) == 1 for tensor in node.inputs[1:]
    )


def _scale(stream: Stream, factors: Float64Array) -> None:
    for node in stream.producers:
        weight, *bias = node.inputs[1:]
        _replace(node, 1, weight.values * factors.reshape(-1, *[1] * (weight.values.ndim - 1)))
        for tensor in bias:  # a Gemm's may be (O,), (1, O) or a single value
            _replace(node, 2, tensor.values * factors)
    for node in stream.consumers:
        weight = node.inputs[1].values
        groups = int(node.attrs.get("group", 1))
        _replace(node, 1, weight * spread_over_kernel(1.0 / factors, weight, groups))


def _replace(node: gs.Node, index: int, values: FloatArray) -> None:
    old = node.inputs[index]
    node.inputs[index] = gs.Constant(old.name, np.asarray(values, old.values.dtype))
