"""What a graph tells about its input: the order of its axes, and the scale of its values."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from reptrt.core.choices import InputValues, Layout
from reptrt.graph.net import Net, constant_value

_SAME_VALUES = ("Cast", "Identity", "QuantizeLinear", "DequantizeLinear")
_AFFINE = ("Add", "Sub", "Mul", "Div")
_TO_CHANNELS_FIRST = [0, 3, 1, 2]
_PIXEL_STEP = 20.0  # a std or mean of pixels 0..255 is larger, one of pixels 0..1 is smaller
_BYTE_MOST = 255


def image_input(net: Net) -> gs.Tensor:
    """Return the input of a net that a node reads; the first input if none is read."""
    inputs = net.graph.inputs
    return next((tensor for tensor in inputs if tensor.outputs), inputs[0])


def layout_of(net: Net) -> Layout:
    """Return NHWC if all that reads the input is a Transpose from (N, H, W, C), else NCHW.

    Casts and affines by constants may stand in front of the Transpose.
    """
    nodes = list(_first_nodes(image_input(net), (*_SAME_VALUES, *_AFFINE)))
    is_last = nodes and all(
        node.op == "Transpose" and node.attrs.get("perm") == _TO_CHANNELS_FIRST for node in nodes
    )
    return "NHWC" if is_last else "NCHW"


def values_of(net: Net) -> InputValues:
    """Return which values the input has: ``bytes``, ``pixels`` or ``normalized``.

    A UINT8 input takes bytes. A float input takes pixels 0..255 if the first affine by a constant
    is of their scale: a mean or divisor of 20 or more, or a factor of 1 / 20 or less.
    """
    image = image_input(net)
    if image.dtype == np.uint8:
        return "bytes"
    nodes = list(_first_nodes(image, (*_SAME_VALUES, "Transpose")))
    return "pixels" if nodes and all(map(_scales_pixels, nodes)) else "normalized"


def cast_for_input(batch: npt.NDArray[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return a batch in the type of a network's input; for UINT8 it is rounded and clipped."""
    if dtype == np.uint8 and batch.dtype != np.uint8:
        batch = np.rint(np.clip(batch, 0, _BYTE_MOST))
    return batch.astype(dtype, copy=False)


def _first_nodes(tensor: gs.Tensor, passed: tuple[str, ...]) -> Iterator[gs.Node]:
    """Yield the first nodes behind a tensor that are of no passed kind."""
    for node in tensor.outputs:
        is_passed = node.op in passed and (
            node.op not in _AFFINE or any(constant_value(t) is not None for t in node.inputs)
        )
        if is_passed:
            yield from _first_nodes(node.outputs[0], passed)
        else:
            yield node


def _scales_pixels(node: gs.Node) -> bool:
    if node.op not in _AFFINE:
        return False
    value = next((v for t in node.inputs if (v := constant_value(t)) is not None), None)
    if value is None or not value.size:
        return False
    sizes = np.abs(value.astype(np.float64))
    if node.op == "Mul":
        return bool(sizes.max() <= 1 / _PIXEL_STEP)
    if node.op == "Div":
        return constant_value(node.inputs[1]) is not None and bool(sizes.min() >= _PIXEL_STEP)
    return bool(sizes.max() >= _PIXEL_STEP)
