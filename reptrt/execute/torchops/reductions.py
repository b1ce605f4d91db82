"""Operators that reduce or normalize along axes."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from reptrt.execute.torchops.node import Builder, NodeView, Operator, plain

_Reduction = Callable[[Tensor, list[int], bool], Tensor]


def _prod(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = torch.prod(x, axis, keepdim)
    return x


def _reduce(function: _Reduction) -> Builder:
    def builder(node: NodeView) -> Operator:
        keepdims = bool(node.attr("keepdims", 1))
        noop = bool(node.attr("noop_with_empty_axes", 0))
        axes_of = node.ints(1, "axes")

        def operator(x: Tensor, axes: Tensor | None = None) -> Tensor:
            reduced = axes_of(axes)
            if not reduced and noop:
                return x
            return function(x, reduced or list(range(x.dim())), keepdims)

        return operator

    return builder


def _softmax(function: Callable[[Tensor, int], Tensor]) -> Builder:
    def builder(node: NodeView) -> Operator:
        if node.opset >= 13:
            axis = node.attr("axis", -1)
            # A CPU gives equal rows equal bits along the last axis, but not along other axes.
            return lambda x: function(x.movedim(axis, -1).contiguous(), -1).movedim(-1, axis)
        axis = node.attr("axis", 1)  # before opset 13, this axis and all later ones are reduced
        return lambda x: function(x.flatten(axis % x.dim()), -1).view(x.shape)

    return builder


def _arg(function: Callable[[Tensor, int, bool], Tensor]) -> Builder:
    def builder(node: NodeView) -> Operator:
        node.only("select_last_index", 0)
        axis, keepdims = node.attr("axis", 0), bool(node.attr("keepdims", 1))
        return lambda x: function(x, axis, keepdims)

    return builder


def _cumsum(node: NodeView) -> Operator:
    exclusive, reverse = node.attr("exclusive", 0), node.attr("reverse", 0)
    axis_of = node.ints(1, "axis")

    def operator(x: Tensor, axis_tensor: Tensor | None = None) -> Tensor:
        axis = (axis_of(axis_tensor) or [0])[0]
        values = x.flip(axis) if reverse else x
        total = torch.cumsum(values, axis, dtype=x.dtype)
        total = total - values if exclusive else total
        return total.flip(axis) if reverse else total

    return operator


def _spatial_axes(x: Tensor) -> list[int]:
    return list(range(2, x.dim()))


REDUCTIONS: Mapping[str, Builder] = {
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "CumSum": _cumsum,
    "GlobalAveragePool": plain(lambda x: torch.mean(x, _spatial_axes(x), True)),
    "GlobalMaxPool": plain(lambda x: torch.amax(x, _spatial_axes(x), True)),
    "LogSoftmax": _softmax(torch.log_softmax),
    "ReduceL1": _reduce(lambda x, axes, keep: torch.sum(x.abs(), axes, keep)),
    "ReduceL2": _reduce(lambda x, axes, keep: torch.sqrt(torch.sum(x * x, axes, keep))),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceProd": _reduce(_prod),
    "ReduceSum": _reduce(torch.sum),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: torch.sum(x * x, axes, keep)),
    "Softmax": _softmax(torch.softmax),
}
