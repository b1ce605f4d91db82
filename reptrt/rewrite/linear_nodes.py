"""Which nodes are shift-invariant linear maps, and which map each of them is."""

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.graph.net import constant_value
from reptrt.rewrite.fold_batchnorm import affine_of
from reptrt.rewrite.linear import Float64Array, LinearMap, average_pool, identity, per_channel


def linear_of(node: gs.Node, channels: int | None) -> LinearMap | None:
    """Return what a node computes from its data input if that is a linear map, else None.

    Args:
        node: any node.
        channels: of its data input, where known; a pool or a scaling does not say it itself.
    """
    reader = _READERS.get(node.op)
    return None if reader is None else reader(node, channels)


def _from_identity(_: gs.Node, channels: int | None) -> LinearMap | None:
    return None if channels is None else identity(channels)


def _from_conv(node: gs.Node, _: int | None) -> LinearMap | None:
    weight = constant_value(node.inputs[1])
    bias = constant_value(node.inputs[2]) if len(node.inputs) > 2 else None
    if weight is None or weight.ndim != 4 or (len(node.inputs) > 2 and bias is None):
        return None
    if node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    pads = list(node.attrs.get("pads") or (0, 0, 0, 0))
    if min(pads) < 0:
        return None
    return LinearMap(
        weight.astype(np.float64),
        np.zeros(weight.shape[0]) if bias is None else bias.astype(np.float64),
        stride=tuple(node.attrs.get("strides") or (1, 1)),
        begin=(pads[0], pads[1]),
        end=(pads[2], pads[3]),
        dilation=tuple(node.attrs.get("dilations") or (1, 1)),
        groups=int(node.attrs.get("group", 1)),
    )


def _from_batchnorm(node: gs.Node, _: int | None) -> LinearMap | None:
    affine = affine_of(node)
    return None if affine is None else per_channel(*affine)


def _from_average_pool(node: gs.Node, channels: int | None) -> LinearMap | None:
    size = tuple(node.attrs["kernel_shape"])
    pads = list(node.attrs.get("pads") or [0] * 4)
    if channels is None or len(size) != 2 or node.attrs.get("ceil_mode", 0):
        return None
    if node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    if tuple(node.attrs.get("dilations") or (1, 1)) != (1, 1):
        return None
    if any(pads) and not node.attrs.get("count_include_pad", 0):
        return None  # the divisor depends on the position
    return average_pool(channels, size, tuple(node.attrs.get("strides") or (1, 1)), pads)


def _per_channel_constant(node: gs.Node, channels: int | None) -> Float64Array | None:
    """Return the constant operand of a binary node as one value per channel, float64 (C,)."""
    values = [value for t in node.inputs if (value := constant_value(t)) is not None]
    if len(values) != 1 or channels is None:
        return None
    shape = (1,) * (4 - values[0].ndim) + values[0].shape
    if len(shape) != 4 or shape[0] != 1 or shape[2:] != (1, 1) or shape[1] not in (1, channels):
        return None
    return np.broadcast_to(values[0].astype(np.float64).reshape(-1), (channels,))


def _from_mul(node: gs.Node, channels: int | None) -> LinearMap | None:
    factor = _per_channel_constant(node, channels)
    return None if factor is None else per_channel(factor, np.zeros(factor.size))


def _from_div(node: gs.Node, channels: int | None) -> LinearMap | None:
    divisor = _per_channel_constant(node, channels)
    if divisor is None or constant_value(node.inputs[1]) is None or not np.all(divisor):
        return None
    return per_channel(1.0 / divisor, np.zeros(divisor.size))


def _from_add(node: gs.Node, channels: int | None) -> LinearMap | None:
    offset = _per_channel_constant(node, channels)
    return None if offset is None else per_channel(np.ones(offset.size), offset)


def _from_pad(node: gs.Node, channels: int | None) -> LinearMap | None:
    pads = constant_value(node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("pads")
    value = constant_value(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2].name else 0.0
    if pads is None or value is None or np.any(value) or channels is None:
        return None
    if node.attrs.get("mode", "constant") != "constant" or len(node.inputs) > 3:
        return None
    pads = [int(p) for p in pads]
    if len(pads) != 8 or min(pads) < 0 or pads[0] or pads[1] or pads[4] or pads[5]:
        return None
    begin, end = (pads[2], pads[3]), (pads[6], pads[7])
    return replace(identity(channels), begin=begin, end=end)


_READERS = {
    "Conv": _from_conv,
    "BatchNormalization": _from_batchnorm,
    "AveragePool": _from_average_pool,
    "Mul": _from_mul,
    "Div": _from_div,
    "Add": _from_add,
    "Pad": _from_pad,
    "Identity": _from_identity,
    "Dropout": _from_identity,
}
