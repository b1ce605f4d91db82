"""Which nodes are shift-invariant linear maps, and which map each of them is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from reptrt.core.arrays import Float64Array
from reptrt.graph.net import constant_value, producer
from reptrt.rewrite.layers import has_input, layer_of, parameter
from reptrt.rewrite.linear import (
    Ints,
    LinearMap,
    average_pool,
    identity,
    per_channel,
)


@dataclass(frozen=True, slots=True)
class Layout:
    """What a node without weights has to know about the tensor (N, C, *spatial) that it reads."""

    channels: int
    axes: int  # number of spatial axes


def layout_of(tensor: gs.Tensor) -> Layout | None:
    """Return the layout of a float tensor, or None if neither shape nor producer say it."""
    shape = tuple(tensor.shape or ())
    node = producer(tensor)
    if not shape and node is not None and not isinstance(layer := layer_of(node), str):
        return Layout(layer.out_channels, layer.axes)
    is_float = tensor.dtype is None or np.issubdtype(tensor.dtype, np.floating)
    if len(shape) < 2 or not is_float or not isinstance(shape[1], int):
        return None
    return Layout(shape[1], len(shape) - 2)


def layout_behind(linear: LinearMap) -> Layout:
    """Return the layout of what a map reads."""
    return Layout(linear.in_channels, linear.axes)


def linear_of(node: gs.Node, layout: Layout | None) -> LinearMap | None:
    """Return what a node computes from its data input if that is a linear map, else None.

    Args:
        node: any node.
        layout: of its data input, where known; pools and scalings do not say it themselves.
    """
    reader = _READERS.get(node.op)
    return None if reader is None else reader(node, layout)


def data_input(node: gs.Node) -> gs.Tensor:
    """Return the first input that is not constant; the operands of a product may be swapped."""
    return next((t for t in node.inputs if constant_value(t) is None), node.inputs[0])


def affine_of(node: gs.Node) -> LinearMap | None:
    """Return y[c] = scale[c] x[c] + shift[c] of a batch norm or of arithmetic with constants."""
    if node.op not in _AFFINE or not node.inputs or not node.outputs:
        return None
    linear = linear_of(node, layout_of(data_input(node)))
    return linear if linear is not None and linear.is_per_channel else None


def _from_identity(_: gs.Node, layout: Layout | None) -> LinearMap | None:
    return None if layout is None else identity(layout.channels, layout.axes)


def _from_layer(node: gs.Node, _: Layout | None) -> LinearMap | None:
    linear = layer_of(node)
    return None if isinstance(linear, str) else linear


def _from_conv(node: gs.Node, _: Layout | None) -> LinearMap | None:
    linear = layer_of(node)
    if isinstance(linear, str):
        return None
    pads = _explicit_pads(node, linear.axes)
    if pads is None:
        return None
    begin, end = pads[: linear.axes], pads[linear.axes :]
    if node.op == "ConvTranspose":
        if node.attrs.get("output_shape"):
            return None
        extra = node.attrs.get("output_padding") or (0,) * linear.axes
        end = tuple(pad - more for pad, more in zip(end, extra, strict=True))
    stride, dilation = (_ints(node, name) for name in ("strides", "dilations"))
    linear = replace(linear, stride=stride, begin=begin, end=end, dilation=dilation)
    return replace(linear, transposed=linear.transposed and not linear.is_pointwise)


def _explicit_pads(node: gs.Node, axes: int) -> Ints | None:
    """Return the pads of a window, begins first; None if they are negative or depend on sizes."""
    pads = _ints(node, "pads") or (0,) * 2 * axes
    explicit = node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    return pads if explicit and min(pads) >= 0 else None


def _ints(node: gs.Node, name: str) -> Ints:
    return tuple(int(value) for value in node.attrs.get(name) or ())


def _from_batchnorm(node: gs.Node, layout: Layout | None) -> LinearMap | None:
    """Gamma (x - mean) / std + beta, with std = sqrt(var + epsilon)."""
    values = [parameter(node, index) for index in range(1, 5)]
    gamma, beta, mean, var = values
    if gamma is None or beta is None or mean is None or var is None:
        return None
    scale = gamma / np.sqrt(var + float(node.attrs.get("epsilon", 1e-5)))
    return per_channel(scale, beta - mean * scale, 2 if layout is None else layout.axes)


def _from_average_pool(node: gs.Node, layout: Layout | None) -> LinearMap | None:
    size = _ints(node, "kernel_shape")
    pads = _explicit_pads(node, len(size))
    if layout is None or pads is None or node.attrs.get("ceil_mode", 0):
        return None
    if not set(_ints(node, "dilations")) <= {1}:
        return None
    if any(pads) and not node.attrs.get("count_include_pad", 0):
        return None  # the divisor depends on the position
    return average_pool(layout.channels, size, _ints(node, "strides"), pads)


def _constants(node: gs.Node, layout: Layout | None) -> list[Float64Array] | None:
    """Return all inputs but the data input, each as one value per channel (C,)."""
    if layout is None:
        return None
    constants = []
    data = data_input(node)
    for tensor in node.inputs:
        if tensor is data:
            continue
        value = constant_value(tensor)
        spread = None if value is None else _per_channel_values(value, layout)
        if spread is None:
            return None
        constants.append(spread)
    return constants if len(constants) == len(node.inputs) - 1 else None


def _per_channel_values(value: npt.NDArray[np.generic], layout: Layout) -> Float64Array | None:
    rank = layout.axes + 2
    shape = (1,) * (rank - value.ndim) + value.shape
    if len(shape) != rank or shape[1] not in (1, layout.channels):
        return None
    if any(size != 1 for axis, size in enumerate(shape) if axis != 1):
        return None
    return np.broadcast_to(value.astype(np.float64).reshape(-1), (layout.channels,))


def _from_arithmetic(node: gs.Node, layout: Layout | None) -> LinearMap | None:
    """Read an Add, Sub, Mul, Div, Neg or Sum of one computed tensor and constants."""
    constants = _constants(node, layout)
    if constants is None or layout is None or constant_value(data_input(node)) is not None:
        return None
    ones, zeros = np.ones(layout.channels), np.zeros(layout.channels)
    swapped = data_input(node) is not node.inputs[0]
    if node.op == "Div" and (swapped or not np.all(constants[0])):
        return None
    if node.op in ("Mul", "Div"):
        scale = constants[0] if node.op == "Mul" else 1.0 / constants[0]
        return per_channel(scale, zeros, layout.axes)
    shift = np.sum([zeros, *constants], axis=0)
    if node.op == "Sub" and not swapped:
        shift = -shift
    is_negative = node.op == "Neg" or (node.op == "Sub" and swapped)
    return per_channel(-ones if is_negative else ones, shift, layout.axes)


def _from_pad(node: gs.Node, layout: Layout | None) -> LinearMap | None:
    pads = constant_value(node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("pads")
    value = parameter(node, 2) if has_input(node, 2) else np.zeros(())
    if pads is None or value is None or np.any(value) or layout is None:
        return None
    if node.attrs.get("mode", "constant") != "constant" or has_input(node, 3):
        return None
    rank = layout.axes + 2
    begin, end = tuple(map(int, pads[:rank])), tuple(map(int, pads[rank:]))
    if len(end) != rank or min(begin + end) < 0 or any(begin[:2] + end[:2]):
        return None
    return replace(identity(layout.channels, layout.axes), begin=begin[2:], end=end[2:])


_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Neg", "Sum")
_AFFINE = (*_ARITHMETIC, "BatchNormalization")
_READERS: Mapping[str, Callable[[gs.Node, Layout | None], LinearMap | None]] = {
    "Conv": _from_conv,
    "ConvTranspose": _from_conv,
    "Gemm": _from_layer,
    "MatMul": _from_layer,
    "BatchNormalization": _from_batchnorm,
    "AveragePool": _from_average_pool,
    "Pad": _from_pad,
    "Identity": _from_identity,
    "Dropout": _from_identity,
    **dict.fromkeys(_ARITHMETIC, _from_arithmetic),
}
