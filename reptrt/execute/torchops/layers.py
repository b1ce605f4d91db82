"""Layers with weights: convolutions, matrix products, normalizations."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reptrt.core.errors import RewriteError
from reptrt.execute.torchops.node import Builder, NodeView, Operator, plain
from reptrt.execute.torchops.window import pad_with, padding_of, same_pads, spatial_layout

# By the weight's number of dimensions; looked up in each call, because a weight may be computed.
_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_CONV_TRANSPOSE = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}
_BLOCK = 16  # a CPU matrix product is padded to a multiple of this


def _geometry(node: NodeView) -> tuple[tuple[int, ...] | int, tuple[int, ...] | int, int]:
    """Return strides, dilations and group; absent strides or dilations are 1 along every axis."""
    strides, dilations = node.attr("strides", None), node.attr("dilations", None)
    return (
        tuple(strides) if strides else 1,
        tuple(dilations) if dilations else 1,
        node.attr("group", 1),
    )


def _conv(node: NodeView) -> Operator:
    weight = node.constants[1]
    rank = len(node.attr("kernel_shape", ())) if weight is None else weight.dim() - 2
    if rank != 1:
        return _conv_of_images(node)
    # A line is run as an image of height 1, because `spatial_layout` applies to images only.
    attrs = {name: _with_height(name, value) for name, value in node.attrs.items()}
    operator = _conv_of_images(replace(node, attrs=attrs))

    def lines(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = operator(x.unsqueeze(2), weight.unsqueeze(2), bias)
        return y.squeeze(2)

    return lines


def _with_height(name: str, value: Any) -> Any:
    """Return an attribute of a one-dimensional window in its two-dimensional form."""
    if name == "pads":
        return [0, value[0], 0, value[1]]
    return [1, *value] if name in ("kernel_shape", "strides", "dilations") else value


def _conv_of_images(node: NodeView) -> Operator:
    strides, dilations, group = _geometry(node)
    before, after, auto = padding_of(node)

    def same(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        pads = same_pads(x.shape[2:], weight.shape[2:], strides, dilations, auto)
        x = pad_with(spatial_layout(x), *pads, 0.0)
        return _CONV[weight.dim()](x, weight, bias, strides, 0, dilations, group)

    is_dense = not any(before) and strides in (1, (1,), (1, 1), (1, 1, 1))

    def symmetric(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if is_dense and _wants_rows(x, weight):
            return _pointwise(x, weight, bias, group)
        x = spatial_layout(x)
        return _CONV[weight.dim()](x, weight, bias, strides, before or 0, dilations, group)

    def asymmetric(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        x = pad_with(spatial_layout(x), before, after, 0.0)
        return _CONV[weight.dim()](x, weight, bias, strides, 0, dilations, group)

    if auto:
        return same
    return symmetric if before == after else asymmetric


def _wants_rows(x: Tensor, weight: Tensor) -> bool:
    """Return whether a pointwise convolution must run as a matrix product of pixels.

    On a single thread torch runs it as a matrix product anyway, whose rows start at unaligned
    addresses; `_rows_times` explains why that matters. Images with a multiple of four channels per
    group are not affected.
    """
    channels = weight.shape[1]
    uneven = channels > 1 and (x.dim() != 4 or channels % 4 != 0)
    return uneven and x.device.type == "cpu" and weight[0, 0].numel() == 1


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, group: int) -> Tensor:
    if group == 1 and x.dim() == 4:  # zeros to a multiple of four: three times as fast
        missing = -weight.shape[1] % 4
        x, weight = (F.pad(part, (0, 0, 0, 0, 0, missing)) for part in (x, weight))
        return F.conv2d(spatial_layout(x), weight, bias)
    pixels = x.movedim(1, -1).chunk(group, -1)
    parts = zip(pixels, weight.flatten(1).chunk(group), strict=True)
    y = torch.cat([_rows_times(part, kernel, None) for part, kernel in parts], -1)
    return (y if bias is None else y + bias).movedim(-1, 1)


def _conv_transpose(node: NodeView) -> Operator:
    strides, dilations, group = _geometry(node)
    before, after, auto = padding_of(node)
    if auto or "output_shape" in node.attrs:
        raise RewriteError("auto_pad or output_shape")
    extra = tuple(node.attr("output_padding", None) or ()) or 0

    def symmetric(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        x = spatial_layout(x)
        return _CONV_TRANSPOSE[weight.dim()](
            x, weight, bias, strides, before or 0, extra, group, dilations
        )

    def asymmetric(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        function = _CONV_TRANSPOSE[weight.dim()]
        y = function(spatial_layout(x), weight, bias, strides, 0, extra, group, dilations)
        return pad_with(y, [-n for n in before], [-n for n in after], 0.0)

    return symmetric if before == after else asymmetric


def _rows_times(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x weight^T + bias for x (..., I) and weight (O, I), with equal bits for equal rows.

    A CPU matrix product uses other kernels, which sum in another order, for the last few rows, for
    rows with another alignment and for a transposed weight. The result for a row would depend on
    its position in the batch. Padding with zeros to whole blocks of rows and columns prevents that.
    """
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    columns = -x.shape[-1] % _BLOCK
    padded = F.pad(rows, (0, columns, 0, -len(rows) % _BLOCK))
    weight = F.pad(weight, (0, columns)) if columns else weight.contiguous()
    y = F.linear(padded, weight, bias)[: len(rows)]
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _gemm(node: NodeView) -> Operator:
    alpha, beta = float(node.attr("alpha", 1.0)), float(node.attr("beta", 1.0))
    trans_a, trans_b = node.attr("transA", 0), node.attr("transB", 0)

    def operator(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a = a.t() if trans_a else a
        weight = b if trans_b else b.t()
        if alpha == beta == 1.0 and (c is None or (c.dim() == 1 and len(c) == len(weight))):
            return _rows_times(a, weight, c)
        y = _rows_times(a, weight, None) * alpha
        return y if c is None else y + beta * c

    return operator


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    if b.dim() == 2 and a.dim() >= 2 and a.is_floating_point():
        return _rows_times(a, b.t(), None)
    return torch.matmul(a, b)


def _batch_norm(node: NodeView) -> Operator:
    node.single_output()
    node.only("training_mode", 0)
    eps = node.attr("epsilon", 1e-5)

    def operator(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, scale, bias, False, 0.0, eps)

    return operator


def _instance_norm(node: NodeView) -> Operator:
    eps = node.attr("epsilon", 1e-5)

    def operator(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return torch.instance_norm(x, scale, bias, None, None, True, 0.0, eps, False)

    return operator


def _layer_norm(node: NodeView) -> Operator:
    node.single_output()
    axis, eps = node.attr("axis", -1), node.attr("epsilon", 1e-5)

    def operator(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        shape: Sequence[int] = x.shape[axis:]
        return F.layer_norm(x, list(shape), scale, bias, eps)

    return operator


LAYERS: Mapping[str, Builder] = {
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "MatMul": plain(_matmul),
}
