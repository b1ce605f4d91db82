"""Learned rounding of weights (AdaRound, arXiv 2004.10568): each code is one of two neighbours.

    q = low + h(v) (high - low), clipped to the grid
    h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)
    regularizer = sum 1 - |2 h - 1|^beta           beta falls from 20 to 2: h is driven to 0 or 1

The neighbours are the code that learning starts from and the next one towards W / s; for a code
rounded to nearest they are the floor and the ceiling. Initially q lies between the code and W / s;
`harden` rounds h to 0 or 1. A weight that already is a code (zero above all) does not change.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reptrt.core.grid import Grid
from reptrt.quantize.reconstruct.state import WeightSite

_STRETCH, _SHIFT = 1.2, 0.1
_TOWARDS_EXACT = 0.2  # where learning starts: the share of the way from the code to W / s
_WARM_UP = 0.2  # share of the iterations that run without the regularizer
_BETA_FIRST, _BETA_LAST = 20.0, 2.0


class SoftCodes:
    """The codes of all weights of a unit while they are learned, in one flat buffer of N values.

    Args:
        sites: the weights.
        codes: node -> codes to start from.
        grid: of the codes.

    Attributes:
        v: the parameter, (N,).
    """

    def __init__(
        self, sites: Sequence[WeightSite], codes: Mapping[str, Tensor], grid: Grid
    ) -> None:
        self._sites = tuple(sites)
        self._sizes = [site.weight.numel() for site in sites]
        exact = torch.cat([_flat(site.weight / site.scale) for site in sites])
        scale = torch.cat([_flat(site.scale.expand_as(site.weight)) for site in sites])
        start = torch.cat([_flat(codes[site.node]) for site in sites])
        other = torch.where(exact == start, start, start + torch.sign(exact - start))
        self._low = torch.minimum(start, other).clamp(grid.qmin, grid.qmax)
        self._high = torch.maximum(start, other).clamp(grid.qmin, grid.qmax)
        self._lowest, self._span = self._low * scale, (self._high - self._low) * scale
        towards = torch.lerp(start, exact, _TOWARDS_EXACT)
        fraction = (towards - torch.minimum(start, other)).clamp(0.0, 1.0)
        self.v = -torch.log(_STRETCH / (fraction + _SHIFT) - 1.0)
        self.v.requires_grad_(True)

    def weights(self, beta: float | None = None, strength: float = 0.0) -> dict[str, Tensor]:
        """Return node -> dequantized weight before hardening: between the neighbours.

        A backward pass through them adds the gradient of ``strength`` times the regularizer.

        Args:
            beta: of the regularizer; None: without it.
            strength: weight of the regularizer.
        """
        flat = _SoftWeights.apply(self.v, self._lowest, self._span, beta, strength)  # type: ignore[no-untyped-call]
        return self._by_node(flat)

    def harden(self) -> dict[str, Tensor]:
        """Return node -> codes as integers: low where h < 1/2, else high."""
        return self._by_node(torch.where(self.v.detach() >= 0, self._high, self._low))

    def _by_node(self, flat: Tensor) -> dict[str, Tensor]:
        parts = torch.split(flat, self._sizes)
        return {
            site.node: _like(part, site.weight)
            for site, part in zip(self._sites, parts, strict=True)
        }


def _flat(weight: Tensor) -> Tensor:
    """Return all values in the order in which convolutions read them: on a CPU channels last."""
    return (weight.permute(0, 2, 3, 1) if _is_last(weight) else weight).reshape(-1)


def _like(flat: Tensor, weight: Tensor) -> Tensor:
    """Return the values that `_flat` laid out in the shape of a weight, without a copy."""
    if not _is_last(weight):
        return flat.view(weight.shape)
    outputs, inputs, *window = weight.shape
    return flat.view(outputs, *window, inputs).permute(0, 3, 1, 2)


def _is_last(weight: Tensor) -> bool:
    return weight.dim() == 4 and weight.device.type == "cpu"


class _SoftWeights(torch.autograd.Function):
    """low + h(v) * span; backward adds the gradient of the regularizer.

    The value of the regularizer is not needed, and its gradient shares h'(v) with that of the loss:
    one pass in place of a dozen over all weights.
    """

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, lowest: Tensor, span: Tensor, beta: float | None, strength: float
    ) -> Tensor:
        sigmoid = torch.sigmoid(v)
        h = (sigmoid * _STRETCH).sub_(_SHIFT).clamp_(0.0, 1.0)
        ctx.save_for_backward(sigmoid, h, span)
        ctx.beta, ctx.strength = beta, strength
        return torch.addcmul(lowest, h, span)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        sigmoid, h, span = ctx.saved_tensors
        of_h = grad * span
        if ctx.beta is not None:
            # d/dh (1 - |2h-1|^b) = -2^b b |h-1/2|^(b-2) (h-1/2); exp and log are fast, pow is not
            signed = h - 0.5
            power = signed.abs().log_().mul_(ctx.beta - 2.0).exp_()
            factor = -(2.0**ctx.beta) * ctx.beta * ctx.strength
            of_h.addcmul_(power, signed, value=factor)
        of_v = torch.addcmul(sigmoid, sigmoid, sigmoid, value=-1.0)  # sigmoid'
        of_v.mul_(of_h).mul_(_STRETCH)
        # 0 where h is clipped to 0 or 1
        return torch.ops.aten.hardtanh_backward(of_v, h, 0.0, 1.0), None, None, None, None


def beta_at(step: int, steps: int) -> float | None:
    """Return beta at an iteration: None during the warm-up, then a cosine from 20 to 2."""
    progress = step / steps
    if progress < _WARM_UP:
        return None
    done = (progress - _WARM_UP) / (1.0 - _WARM_UP)
    return _BETA_LAST + (_BETA_FIRST - _BETA_LAST) * 0.5 * (1.0 + math.cos(math.pi * done))
