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
        inside = (scaled >= ctx.grid.qmin - 0.5) & (scaled <= ctx.grid.qmax + 0.5)
        of_step = None
        if ctx.needs_input_grad[1]:
            of_step = (grad * torch.where(inside, codes - scaled, codes)).sum()
        return grad * inside if ctx.needs_input_grad[0] else None, of_step, None
