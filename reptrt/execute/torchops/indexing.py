"""Operators that read or write elements at computed indices, and TopK."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from reptrt.execute.torchops.node import Builder, NodeView, Operator, together

_REDUCTIONS = {"add": "sum", "mul": "prod", "min": "amin", "max": "amax"}  # ONNX name -> torch's


def _reduction(node: NodeView) -> str | None:
    """Return torch's name of the attribute ``reduction``; None: updates overwrite values."""
    return _REDUCTIONS.get(node.choice("reduction", "none", ("none", *_REDUCTIONS)))


def _gather_elements(node: NodeView) -> Operator:
    axis = node.attr("axis", 0)

    def operator(x: Tensor, index: Tensor) -> Tensor:
        return torch.gather(x, axis, torch.remainder(index.to(x.device), x.shape[axis]))

    return operator


def _scatter_elements(node: NodeView) -> Operator:
    axis, reduction = node.attr("axis", 0), _reduction(node)

    def operator(x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
        x, updates = together(x, updates)
        index = torch.remainder(index.to(x.device), x.shape[axis])
        if reduction is None:
            return x.scatter(axis, index, updates)
        return x.scatter_reduce(axis, index, updates, reduction)

    return operator


def _gather_nd(node: NodeView) -> Operator:
    node.only("batch_dims", 0)

    def operator(x: Tensor, index: Tensor) -> Tensor:
        depth = index.shape[-1]
        picked = x.reshape(-1, *x.shape[depth:]).index_select(0, _rows(x, index))
        return picked.reshape(*index.shape[:-1], *x.shape[depth:])

    return operator


def _scatter_nd(node: NodeView) -> Operator:
    reduction = _reduction(node)

    def operator(x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
        x, updates = together(x, updates)
        rows, depth = _rows(x, index), index.shape[-1]
        inner = math.prod(x.shape[depth:])
        flat, new = x.reshape(-1, inner).clone(), updates.reshape(-1, inner)
        if reduction is None:
            flat.index_copy_(0, rows, new)
        elif reduction == "sum":
            flat.index_add_(0, rows, new)
        else:
            flat.scatter_reduce_(0, rows[:, None].expand(-1, inner), new, reduction)
        return flat.reshape(x.shape)

    return operator


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Return the flat positions (M,) that an index (..., D) selects on the first D axes of x."""
    rows = torch.zeros(index.shape[:-1], dtype=torch.int64, device=x.device)
    for axis, part in enumerate(index.to(x.device).unbind(-1)):
        rows = rows * x.shape[axis] + torch.remainder(part, x.shape[axis])
    return rows.reshape(-1)


def _top_k(node: NodeView) -> Operator:
    k_of, axis = node.ints(1, "k"), node.attr("axis", -1)
    largest = bool(node.attr("largest", 1))

    def operator(x: Tensor, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
        (count,) = k_of(k) or (x.shape[axis],)
        values, order = torch.sort(x, dim=axis, descending=largest, stable=True)
        return values.narrow(axis, 0, count), order.narrow(axis, 0, count)

    return operator


INDEXING: Mapping[str, Builder] = {
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "TopK": _top_k,
}
