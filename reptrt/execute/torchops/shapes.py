"""Operators that move, cut and join tensors, and operators that compute shapes."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from reptrt.core.errors import RewriteError
from reptrt.execute.torchops.node import Builder, NodeView, Operator, plain, together

_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}


def _reshape(node: NodeView) -> Operator:
    shape_of = node.ints(1, "shape")
    copy_zero = not node.attr("allowzero", 0)

    def operator(x: Tensor, shape: Tensor | None = None) -> Tensor:
        sizes = shape_of(shape) or []
        if copy_zero and 0 in sizes:
            sizes = [size or x.shape[axis] for axis, size in enumerate(sizes)]
        return x.reshape(sizes)

    return operator


def _flatten(node: NodeView) -> Operator:
    axis = node.attr("axis", 1)
    return lambda x: x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _transpose(node: NodeView) -> Operator:
    order = node.attr("perm", None)
    return lambda x: x.permute(order or tuple(reversed(range(x.dim()))))


def _squeeze(node: NodeView) -> Operator:
    axes_of = node.ints(1, "axes")

    def operator(x: Tensor, axes: Tensor | None = None) -> Tensor:
        removed = axes_of(axes)
        return torch.squeeze(x) if removed is None else torch.squeeze(x, tuple(removed))

    return operator


def _unsqueeze(node: NodeView) -> Operator:
    axes_of = node.ints(1, "axes")

    def operator(x: Tensor, axes: Tensor | None = None) -> Tensor:
        added = axes_of(axes) or []
        rank = x.dim() + len(added)
        for axis in sorted(axis % rank for axis in added):
            x = x.unsqueeze(axis)
        return x

    return operator


def _concat(node: NodeView) -> Operator:
    axis = node.attr("axis", 1)
    return lambda *tensors: torch.cat(together(*tensors), axis)


def _split(node: NodeView) -> Operator:
    axis, parts = node.attr("axis", 0), node.attr("num_outputs", node.num_outputs)
    sizes_of = node.ints(1, "split")

    def operator(x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        return torch.split(x, sizes_of(sizes) or -(-x.shape[axis] // parts), axis)

    return operator


def _slice(node: NodeView) -> Operator:
    starts_of, ends_of = node.ints(1, "starts"), node.ints(2, "ends")
    axes_of, steps_of = node.ints(3, "axes"), node.ints(4, "steps")

    def operator(
        x: Tensor,
        starts: Tensor | None = None,
        ends: Tensor | None = None,
        axes: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> Tensor:
        first, last = starts_of(starts) or [], ends_of(ends) or []
        for axis, start, end, step in zip(
            axes_of(axes) or range(len(first)),
            first,
            last,
            steps_of(steps) or [1] * len(first),
            strict=True,
        ):
            x = _sliced(x, axis, slice(start, end, step))
        return x

    return operator


def _sliced(x: Tensor, axis: int, part: slice) -> Tensor:
    """Return x[..., part, ...] along ``axis``; ONNX clamps the bounds as Python does."""
    start, end, step = part.indices(x.shape[axis])
    if step > 0:
        length = max(-(-(end - start) // step), 0)
        narrow = x.narrow(axis, start, max(end - start, 0))
        return narrow if step == 1 or not length else _every(narrow, axis, step)
    # torch has no negative step
    return x.index_select(axis, torch.arange(start, end, step, device=x.device))


def _every(x: Tensor, axis: int, step: int) -> Tensor:
    index = [slice(None)] * (axis % x.dim()) + [slice(None, None, step)]
    return x[tuple(index)]


def _gather(node: NodeView) -> Operator:
    axis = node.attr("axis", 0)

    def operator(x: Tensor, index: Tensor) -> Tensor:
        if index.dim() == 0:
            return x.select(axis, int(index))
        at = axis % x.dim()
        flat = torch.remainder(index.reshape(-1).to(x.device), x.shape[at])  # -1 is the last
        picked = x.index_select(at, flat)
        return picked.reshape(*x.shape[:at], *index.shape, *x.shape[at + 1 :])

    return operator


def _pad(node: NodeView) -> Operator:
    mode = _PAD_MODES[node.choice("mode", "constant", tuple(_PAD_MODES))]
    pads_of, axes_of = node.ints(1, "pads"), node.ints(3, "axes")
    fixed = node.constant(2)
    constant = node.attr("value", 0.0) if fixed is None else fixed.item()

    def operator(
        x: Tensor,
        pads: Tensor | None = None,
        value: Tensor | None = None,
        axes: Tensor | None = None,
    ) -> Tensor:
        amounts = pads_of(pads) or []
        padded = axes_of(axes) or range(x.dim())
        pairs = [[0, 0] for _ in range(x.dim())]
        for index, axis in enumerate(padded):
            pairs[axis] = [amounts[index], amounts[index + len(padded)]]
        fill = constant if fixed is not None or value is None else value.item()
        return _padded(x, pairs, mode, fill)

    return operator


def _padded(x: Tensor, pairs: list[list[int]], mode: str, value: float) -> Tensor:
    """Pad each axis by its pair (before, after); only mode constant can pad the first two axes."""
    amounts = [amount for pair in reversed(pairs) for amount in pair]
    if mode == "constant":
        return F.pad(x, amounts, value=value)
    if any(amounts[-4:]):
        raise RewriteError(f"pads {pairs} with mode {mode}: only spatial axes can be padded")
    return F.pad(x, amounts[:-4], mode=mode)


def _shape(node: NodeView) -> Operator:
    part = slice(node.attr("start", 0), node.attr("end", None))
    return lambda x: torch.tensor(x.shape[part], dtype=torch.int64)


def _constant_of_shape(node: NodeView) -> Operator:
    sizes_of = node.ints(0, "shape")
    value = node.attr("value", None)
    fill = np.zeros(1, np.float32) if value is None else np.asarray(value.values)
    number, dtype = fill.item(), torch.from_numpy(fill.copy()).dtype
    return lambda sizes: torch.full(sizes_of(sizes) or [], number, dtype=dtype)


def _expand(node: NodeView) -> Operator:
    shape_of = node.ints(1, "shape")

    def operator(x: Tensor, shape: Tensor | None = None) -> Tensor:
        sizes = shape_of(shape) or []
        sizes = [1] * (x.dim() - len(sizes)) + sizes
        new = len(sizes) - x.dim()  # number of new axes; a 1 for an axis of x keeps its size
        return x.expand([-1 if n == 1 and i >= new else n for i, n in enumerate(sizes)])

    return operator


def _tile(node: NodeView) -> Operator:
    repeats_of = node.ints(1, "repeats")
    return lambda x, repeats=None: x.repeat(repeats_of(repeats) or [])


def _range(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _depth_to_space(node: NodeView) -> Operator:
    size = node.attr("blocksize", 1)
    if node.choice("mode", "DCR", ("DCR", "CRD")) == "CRD":
        return lambda x: F.pixel_shuffle(x, size)

    def operator(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        blocks = x.reshape(n, size, size, c // size**2, h, w).permute(0, 3, 4, 1, 5, 2)
        return blocks.reshape(n, c // size**2, h * size, w * size)

    return operator


def _space_to_depth(node: NodeView) -> Operator:
    size = node.attr("blocksize", 1)

    def operator(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        blocks = x.reshape(n, c, h // size, size, w // size, size).permute(0, 3, 5, 1, 2, 4)
        return blocks.reshape(n, c * size**2, h // size, w // size)

    return operator


SHAPES: Mapping[str, Builder] = {
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Pad": _pad,
    "Range": plain(_range),
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": plain(lambda x: torch.tensor(x.numel())),
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
