"""Give every channel of an activation the same range, at no cost in the deployed graph.

A ReLU is positively homogeneous: relu(r x) = r relu(x) for r > 0. So the producer of a channel may
scale it by r if every consumer scales it by 1 / r:

    producer   W[c, ...] * r[c],  b[c] * r[c]              consumer   W[:, c, ...] / r[c]
    r[c] = 1 / (largest value of channel c over the calibration images)

An activation has one INT8 scale for the whole tensor. With equal ranges every channel uses all of
its codes, as if it had its own scale. Weights have a scale per output channel, so neither the
producer nor a depthwise consumer loses accuracy. Cross-layer equalization after Nagel et al.,
arXiv 1906.04721, with activation ranges in place of weight ranges (ours).

A tensor is scaled if

1. it is the output of a weighted layer, or of a ReLU or LeakyReLU that alone reads that output;
2. all its consumers, past pools and the flattening of a 1 x 1 map, are layers with a constant
   weight.

Requires: float constants. Ensures: the graph's output is unchanged to float rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.core.arrays import Float64Array, FloatArray
from reptrt.graph.net import Net, constant_value, is_private, producer, weighted_nodes
from reptrt.rewrite.contract import RewriteReport, Skipped
from reptrt.rewrite.linear import spread_over_kernel

_HOMOGENEOUS = ("Relu", "LeakyRelu")
_PER_CHANNEL = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
_SMALLEST = 1e-3  # of the largest channel range: a smaller range counts as this, to bound factors


@dataclass(frozen=True, slots=True, eq=False)
class Link:
    """A tensor whose channels may be scaled, with the layers that compute and read it."""

    tensor: gs.Tensor
    producer: gs.Node
    consumers: tuple[gs.Node, ...]


def equalize(
    net: Net, channel_max: Mapping[str, FloatArray]
) -> tuple[RewriteReport, dict[str, Float64Array]]:
    """Scale the channels of every tensor for which that is exact.

    Args:
        net: a float net; changed in place.
        channel_max: tensor name -> largest |x| of each channel, (C,).

    Returns:
        The report, and layer name -> factor of each channel of its input, (C,), for the layers that
        read a scaled tensor.
    """
    links, skipped = find_links(net)
    input_factors: dict[str, Float64Array] = {}
    for link in links:
        factors = _factors(channel_max[link.tensor.name])
        _scale(link, factors)
        input_factors |= {consumer.name: factors for consumer in link.consumers}
    names = tuple(link.tensor.name for link in links)
    return RewriteReport("equalize", names, tuple(skipped)), input_factors


def find_links(net: Net) -> tuple[tuple[Link, ...], tuple[Skipped, ...]]:
    """Return the tensors that can be scaled, and the reasons why others cannot."""
    links, skipped = [], []
    for layer in weighted_nodes(net.graph):
        tensor = layer.outputs[0]
        after = tensor.outputs[0] if is_private(net.graph, tensor) else None
        if after is not None and after.op in _HOMOGENEOUS:
            tensor = after.outputs[0]
        reason = _reason_against(net, layer, tensor)
        if reason is None:
            links.append(Link(tensor, layer, tuple(_consumers(tensor) or ())))
        else:
            skipped.append(Skipped(tensor.name, reason))
    return tuple(links), tuple(skipped)


def _reason_against(net: Net, layer: gs.Node, tensor: gs.Tensor) -> str | None:
    if layer.op not in ("Conv", "Gemm") or not _owns_constants(layer):
        return "its producer is not a Conv or Gemm with its own constant weight"
    if any(tensor is output for output in net.graph.outputs):
        return "it is an output of the graph"
    consumers = _consumers(tensor)
    if not consumers:
        return "a node other than a layer or a pool reads it"
    if not all(_owns_constants(node) for node in consumers):
        return "a layer that reads it does not have its own constant weight"
    return None


def _owns_constants(node: gs.Node) -> bool:
    """Whether a layer's weight and bias are constants that only this layer reads."""
    if node.op == "Gemm" and not node.attrs.get("transB", 0):
        return False
    return all(
        isinstance(tensor, gs.Constant) and len(tensor.outputs) == 1 for tensor in node.inputs[1:]
    )


def _consumers(tensor: gs.Tensor) -> list[gs.Node] | None:
    """Return the layers that read a tensor, past per-channel nodes; None if other nodes do."""
    layers: list[gs.Node] = []
    for node in tensor.outputs:
        if node.op in _PER_CHANNEL or (node.op == "Flatten" and _is_one_by_one(node.inputs[0])):
            behind = _consumers(node.outputs[0])
            if behind is None:
                return None
            layers += behind
        elif node.op in ("Conv", "Gemm") and node.inputs[0] is tensor:
            if constant_value(node.inputs[1]) is None:
                return None
            layers.append(node)
        else:
            return None
    return layers


def _is_one_by_one(tensor: gs.Tensor) -> bool:
    node = producer(tensor)
    return node is not None and node.op in ("GlobalAveragePool", "GlobalMaxPool")


def range_of_channels(channel_max: FloatArray) -> Float64Array:
    """Return the range to equalize for each channel, (C,).

    It is the channel's largest value, but at least `_SMALLEST` of the largest one of the tensor.
    """
    return np.maximum(channel_max.astype(np.float64), _SMALLEST * float(channel_max.max()))


def _factors(channel_max: FloatArray) -> Float64Array:
    """Return r, normalized to a geometric mean of 1 so that values keep their magnitude."""
    if not channel_max.any():
        return np.ones(channel_max.shape)
    logs = -np.log(range_of_channels(channel_max))
    return np.asarray(np.exp(logs - logs.mean()))


def _scale(link: Link, factors: Float64Array) -> None:
    weight, *bias = link.producer.inputs[1:]
    _replace(link.producer, 1, weight.values * factors.reshape(-1, *[1] * (weight.values.ndim - 1)))
    for tensor in bias:  # a Gemm's may be (O,), (1, O) or a single value
        _replace(link.producer, 2, tensor.values * factors)
    for consumer in link.consumers:
        weight = consumer.inputs[1].values
        inverse = 1.0 / factors
        if consumer.op == "Gemm":
            _replace(consumer, 1, weight * inverse[None, :])
            continue
        groups = int(consumer.attrs.get("group", 1))
        _replace(consumer, 1, weight * spread_over_kernel(inverse, weight, groups))


def _replace(node: gs.Node, index: int, values: FloatArray) -> None:
    old = node.inputs[index]
    node.inputs[index] = gs.Constant(old.name, values.astype(old.values.dtype))
