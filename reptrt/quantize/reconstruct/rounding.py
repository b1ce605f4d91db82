"""Learned rounding of weights (AdaRound, arXiv 2004.10568): each code is a floor or a ceiling.

    q = clip(floor(W / s) + h(v), floor(W / s), ceil(W / s)), clipped to the grid
    h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)
    regularizer = sum 1 - |2 h - 1|^beta           beta falls from 20 to 2: h is driven to 0 or 1

Initially h = frac(W / s), so that q = W / s; `harden` rounds h to 0 or 1. A weight that already is
a code (zero above all) does not change.
"""

import math

import torch
from torch import Tensor

from reptrt.core.grid import Grid
from reptrt.quantize.reconstruct.state import WeightSite

_STRETCH, _SHIFT = 1.2, 0.1
_WARM_UP = 0.2  # share of the iterations that run without the regularizer
_BETA_FIRST, _BETA_LAST = 20.0, 2.0


class SoftCodes:
    """The codes of one weight tensor while they are learned; ``v`` is the parameter."""

    def __init__(self, site: WeightSite, grid: Grid) -> None:
        exact = site.weight / site.scale
        self._floor = torch.floor(exact)
        self._low = self._floor.clamp(grid.qmin, grid.qmax)
        self._high = torch.ceil(exact).clamp(grid.qmin, grid.qmax)
        fraction = exact - self._floor
        self.v = -torch.log(_STRETCH / (fraction + _SHIFT) - 1.0)
        self.v.requires_grad_(True)

    def soft(self) -> Tensor:
        """Return the codes before hardening: real values between floor and ceiling."""
        return (self._floor + self._h()).clamp(self._low, self._high)

    def harden(self) -> Tensor:
        """Return the codes as integers: floor where h < 1/2, else ceiling."""
        codes = self._floor + (self.v.detach() >= 0)
        return codes.clamp(self._low, self._high)

    def regularizer(self, beta: float) -> Tensor:
        """Return sum 1 - |2 h - 1|^beta; it is 0 if all codes are integers."""
        return (1.0 - (2.0 * self._h() - 1.0).abs().pow(beta)).sum()

    def _h(self) -> Tensor:
        return (torch.sigmoid(self.v) * _STRETCH - _SHIFT).clamp(0.0, 1.0)


def beta_at(step: int, steps: int) -> float | None:
    """Return beta at an iteration: None during the warm-up, then a cosine from 20 to 2."""
    progress = step / steps
    if progress < _WARM_UP:
        return None
    done = (progress - _WARM_UP) / (1.0 - _WARM_UP)
    return _BETA_LAST + (_BETA_FIRST - _BETA_LAST) * 0.5 * (1.0 + math.cos(math.pi * done))
