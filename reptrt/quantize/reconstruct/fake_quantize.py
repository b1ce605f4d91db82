"""Fake quantization that gradients pass through."""

from typing import Any

import torch
from torch import Tensor

from reptrt.core.grid import Grid


def fake_quantize(x: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """Return clip(round(x / step), qmin, qmax) * step, the same values as `reptrt.core.grid`.

    The gradient for x is 1 inside the range and 0 where x is clipped. The gradient for the step is
    round(x / step) - x / step inside, and qmin or qmax where x is clipped (learned step size,
    arXiv 1902.08153).

    Args:
        x: any shape.
        step: the scale, a scalar.
        grid: the codes.
    """
    if not torch.is_grad_enabled() or not (x.requires_grad or step.requires_grad):
        return x.div(step).round_().clamp_(grid.qmin, grid.qmax).mul_(step)
    return _FakeQuantize.apply(x, step, grid)  # type: ignore[no-untyped-call,no-any-return]


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, grid: Grid) -> Tensor:
        scaled = x / step
        codes = torch.round(scaled).clamp_(grid.qmin, grid.qmax)
        ctx.save_for_backward(scaled, codes)
        ctx.grid = grid
        return codes * step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        scaled, codes = ctx.saved_tensors
        of_x, of_step = None, None
        if ctx.needs_input_grad[1]:
            # grad * (codes - scaled) inside, grad * codes outside
            of_step = (codes - _inside(scaled, scaled, ctx.grid)).mul_(grad).sum()
        if ctx.needs_input_grad[0]:
            of_x = _inside(grad, scaled, ctx.grid)
        return of_x, of_step, None


def _inside(values: Tensor, scaled: Tensor, grid: Grid) -> Tensor:
    """Return the values where ``scaled`` lies inside the grid, else 0, in one pass."""
    low, high = grid.qmin - 0.5, grid.qmax + 0.5
    inside: Tensor = torch.ops.aten.hardtanh_backward(values, scaled, low, high)
    return inside
