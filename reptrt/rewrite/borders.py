"""The taps of a convolution that fall outside its input, and the sum of their weights."""

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.core.arrays import Float64Array
from reptrt.graph.layers import dequantized_weight


def _input_size(node: gs.Node) -> tuple[int, int] | None:
    shape = node.inputs[0].shape
    size = () if shape is None else tuple(shape[2:])
    return size if len(size) == 2 and all(isinstance(length, int) for length in size) else None


def pads_of(node: gs.Node) -> list[int] | None:
    """Return the pads of a convolution: before each axis, then after each axis.

    Returns:
        The pads; empty for no padding; None for padding at a height and width that are not fixed.
    """
    auto = node.attrs.get("auto_pad", "NOTSET")
    pads = [int(pad) for pad in node.attrs.get("pads") or ()]
    if node.op != "Conv" or auto == "VALID" or (auto == "NOTSET" and not any(pads)):
        return []
    size = _input_size(node)
    if size is None:
        return None
    if auto == "NOTSET":
        return pads
    totals = [
        max((-(-length // stride) - 1) * stride + (taps - 1) * dilation + 1 - length, 0)
        for length, (stride, dilation, taps) in zip(size, _windows(node), strict=True)
    ]
    smaller, larger = [n // 2 for n in totals], [n - n // 2 for n in totals]
    return smaller + larger if auto == "SAME_UPPER" else larger + smaller


def _windows(node: gs.Node) -> Iterator[tuple[int, int, int]]:
    """Yield stride, dilation and number of taps of each axis."""
    taps = np.asarray(dequantized_weight(node)).shape[2:]
    strides = node.attrs.get("strides") or [1] * len(taps)
    dilations = node.attrs.get("dilations") or [1] * len(taps)
    yield from zip(map(int, strides), map(int, dilations), map(int, taps), strict=True)


def output_size(node: gs.Node, pads: list[int]) -> tuple[int, int]:
    """Return height and width of the output of a convolution with a fixed input size."""
    height, width = (len(inside) for inside in _inside(node, pads))
    return height, width


def _inside(node: gs.Node, pads: list[int]) -> list[Float64Array]:
    """Return, for each axis, 1 where a tap lies inside the input and 0 elsewhere.

    Each array has the shape (output positions, taps).
    """
    inside = []
    size = _input_size(node) or ()
    for axis, (stride, dilation, taps) in enumerate(_windows(node)):
        length, begin, end = size[axis], pads[axis], pads[axis + 2]
        positions = (length + begin + end - (taps - 1) * dilation - 1) // stride + 1
        at = np.arange(positions)[:, None] * stride + np.arange(taps)[None] * dilation - begin
        inside.append(((at >= 0) & (at < length)).astype(np.float64))
    return inside


def outside_sums(node: gs.Node) -> Float64Array | None:
    """Return, for each output position, the sum of the weights whose taps fall outside: (O, H, W).

    None: the convolution has no padding.
    """
    pads = pads_of(node)
    weight = dequantized_weight(node)
    if not pads or weight is None:
        return None
    taps = weight.sum(axis=1)
    rows, columns = _inside(node, pads)
    whole = taps.sum(axis=(1, 2))[:, None, None]
    return np.asarray(whole - np.einsum("okl,hk,wl->ohw", taps, rows, columns))
