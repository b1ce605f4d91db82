"""Give every channel of an activation the same range, at no cost in the deployed graph.

A ReLU is positively homogeneous: relu(r x) = r relu(x) for r > 0. So a channel may be scaled by r
where it is made, and by 1 / r where it is read:

    producer   W[c, ...] * r[c],  b[c] * r[c]              consumer   W[:, c, ...] / r[c]
    r[c] = 1 / (largest value of channel c over the calibration images)

An activation has one INT8 scale for the whole tensor; with equal ranges every channel uses all of
it, as if it had a scale of its own. Weights have a scale per output channel, so the producer loses
nothing; a depthwise consumer loses nothing either. Cross-layer equalization after Nagel et al.,
arXiv 1906.04721, with activation ranges in place of weight ranges (ours).

1. The tensor is the output of a ReLU, LeakyReLU or of the layer itself, which nobody else reads.
2. Everything that reads it, past pools and flattening of a 1 x 1 map, is a layer with a constant
   weight.

Requires: float constants. Ensures: the graph's output is unchanged to float rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from reptrt.graph.net import Net, constant_value, is_private, producer, weighted_nodes
from reptrt.rewrite.contract import RewriteReport, Skipped
from reptrt.rewrite.linear import spread_over_kernel

FloatArray = npt.NDArray[np.floating]
Float64Array = npt.NDArray[np.float64]

_HOMOGENEOUS = ("Relu", "LeakyRelu")
_PER_CHANNEL = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
_QUIETEST = 1e-3  # of the loudest channel: what is almost dead is not blown up further


@dataclass(frozen=True, slots=True, eq=False)
class Link:
    """A tensor whose channels may be scaled."""

    tensor: gs.Tensor
    maker: gs.Node
    readers: tuple[gs.Node, ...]


def equalize(
    net: Net, channel_max: Mapping[str, FloatArray]
) -> tuple[RewriteReport, dict[str, Float64Array]]:
    """Scale the channels of every tensor where that is exact.

    Returns the report, and by what factor each channel of a layer's input has grown: layer name ->
    (C,), for the layers that read a scaled tensor.

    Args:
        net: a float net.
        channel_max: tensor name -> largest |x| of each channel, (C,).
    """
    links, skipped = find_links(net)
    grown: dict[str, Float64Array] = {}
    for link in links:
        factors = _factors(channel_max[link.tensor.name])
        _scale(link, factors)
        grown |= {reader.name: factors for reader in link.readers}
    names = tuple(link.tensor.name for link in links)
    return RewriteReport("equalize", names, tuple(skipped)), grown


def find_links(net: Net) -> tuple[tuple[Link, ...], tuple[Skipped, ...]]:
    """Return the tensors that can be scaled, and why others cannot."""
    links, skipped = [], []
    for maker in weighted_nodes(net.graph):
        tensor = maker.outputs[0]
        after = tensor.outputs[0] if is_private(net.graph, tensor) else None
        if after is not None and after.op in _HOMOGENEOUS:
            tensor = after.outputs[0]
        reason = _reason_against(net, maker, tensor)
        if reason is None:
            links.append(Link(tensor, maker, tuple(_readers(tensor) or ())))
        else:
            skipped.append(Skipped(tensor.name, reason))
    return tuple(links), tuple(skipped)


def _reason_against(net: Net, maker: gs.Node, tensor: gs.Tensor) -> str | None:
    if maker.op not in ("Conv", "Gemm") or not _owns_constants(maker):
        return "its layer shares its weight or is of another kind"
    if any(tensor is output for output in net.graph.outputs):
        return "it is an output of the graph"
    readers = _readers(tensor)
    if not readers:
        return "it is read by more than layers and pools"
    if not all(_owns_constants(reader) and reader.op in ("Conv", "Gemm") for reader in readers):
        return "a layer that reads it shares its weight or is of another kind"
    return None


def _owns_constants(node: gs.Node) -> bool:
    """Whether a layer's weight and bias are constants that no other node reads."""
    if node.op == "Gemm" and not node.attrs.get("transB", 0):
        return False
    return all(
        isinstance(tensor, gs.Constant) and len(tensor.outputs) == 1 for tensor in node.inputs[1:]
    )


def _readers(tensor: gs.Tensor) -> list[gs.Node] | None:
    """Return the layers that read a tensor, past what keeps channels apart; None if others do."""
    found: list[gs.Node] = []
    for node in tensor.outputs:
        if node.op in _PER_CHANNEL or (node.op == "Flatten" and _is_one_by_one(node.inputs[0])):
            inner = _readers(node.outputs[0])
            if inner is None:
                return None
            found += inner
        elif node.op in ("Conv", "Gemm") and node.inputs[0] is tensor:
            if constant_value(node.inputs[1]) is None:
                return None
            found.append(node)
        else:
            return None
    return found


def _is_one_by_one(tensor: gs.Tensor) -> bool:
    maker = producer(tensor)
    return maker is not None and maker.op in ("GlobalAveragePool", "GlobalMaxPool")


def range_of_channels(channel_max: FloatArray) -> Float64Array:
    """Return the range that each channel is given, (C,): its largest value, or a little at least.

    All zero if the tensor is.
    """
    return np.maximum(channel_max.astype(np.float64), _QUIETEST * float(channel_max.max()))


def _factors(channel_max: FloatArray) -> Float64Array:
    """Return r, normalised to a geometric mean of 1 so that the net's numbers keep their size."""
    if not channel_max.any():
        return np.ones(channel_max.shape)
    logs = -np.log(range_of_channels(channel_max))
    return np.asarray(np.exp(logs - logs.mean()))


def _scale(link: Link, factors: Float64Array) -> None:
    weight, *bias = link.maker.inputs[1:]
    _replace(link.maker, 1, weight.values * factors.reshape(-1, *[1] * (weight.values.ndim - 1)))
    for tensor in bias:  # of a Gemm it may be (O,), (1, O) or one value for all
        _replace(link.maker, 2, tensor.values * factors)
    for reader in link.readers:
        weight = reader.inputs[1].values
        inverse = 1.0 / factors
        if reader.op == "Gemm":
            _replace(reader, 1, weight * inverse[None, :])
            continue
        groups = int(reader.attrs.get("group", 1))
        _replace(reader, 1, weight * spread_over_kernel(inverse, weight, groups))


def _replace(node: gs.Node, index: int, values: FloatArray) -> None:
    old = node.inputs[index]
    node.inputs[index] = gs.Constant(old.name, values.astype(old.values.dtype))
