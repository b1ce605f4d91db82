"""QuantizeLinear and DequantizeLinear for INT8, UINT8 and INT16 codes.

    q = clip(round_half_even(x / scale) + zero_point, qmin, qmax)
    x = (q - zero_point) * scale

DequantizeLinear also takes the INT32 codes of a bias. Codes keep their integer type, so that they
can be compared bit by bit with those of another runtime.
"""

from collections.abc import Mapping

import onnx
import torch
from torch import Tensor

from reptrt.core.errors import RewriteError
from reptrt.execute.torchops.elementwise import torch_dtype
from reptrt.execute.torchops.node import Builder, NodeView, Operator, along

_CODES = (torch.int8, torch.uint8, torch.int16)


def _zero_point(node: NodeView) -> Tensor | None:
    zero_point = node.constant(2)
    if zero_point is None and node.has(2):
        raise RewriteError("computed zero point")
    return zero_point


def _quantize(node: NodeView) -> Operator:
    node.only("block_size", 0)
    axis, zero_point = node.attr("axis", 1), _zero_point(node)
    declared = torch_dtype(node.attr("output_dtype", 0) or onnx.TensorProto.UINT8)
    dtype = declared if zero_point is None else zero_point.dtype
    if dtype not in _CODES:
        raise RewriteError(f"codes of type {dtype}")
    shifted = zero_point is not None and bool(zero_point.any())
    limits = torch.iinfo(dtype)

    def operator(x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        codes = torch.round(x / along(scale, x.dim(), axis))
        if shifted and shift is not None:
            codes = codes + along(shift, x.dim(), axis).to(codes.dtype)
        return torch.clamp(codes, limits.min, limits.max).to(dtype)

    return operator


def _dequantize(node: NodeView) -> Operator:
    node.only("block_size", 0)
    axis, zero_point = node.attr("axis", 1), _zero_point(node)
    shifted = zero_point is not None and bool(zero_point.any())

    def operator(q: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        codes = q.to(scale.dtype)
        if shifted and shift is not None:
            codes = codes - along(shift, q.dim(), axis).to(scale.dtype)
        return codes * along(scale, q.dim(), axis)

    return operator


QUANTIZE: Mapping[str, Builder] = {
    "DequantizeLinear": _dequantize,
    "QuantizeLinear": _quantize,
}
