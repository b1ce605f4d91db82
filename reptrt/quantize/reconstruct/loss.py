"""The error of a unit's outputs.

    sum |B(x^) - Y|^n / sum |Y|^n                       n = 1 ("mae") or 2 ("mse")

for each output, B(x^) in the quantized net and Y in the float net. At the raw heads of a detector
it is what `calib.measure` says. Where the curvature G of a tensor is known (`rounding.curvature`),
its errors count as they do at the outputs of the net: they are multiplied by M before, with
M M^T = G, so that the squares are e^T G e.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reptrt.quantize.calib.measure import Measure, relative
from reptrt.quantize.rounding.nearest_plane import damped

_LEAST_SIGNAL = 1e-30


@dataclass(frozen=True, slots=True, eq=False)
class Loss:
    """How the outputs of units are compared."""

    measure: Measure  # of the net
    kind: Literal["mae", "mse"]
    roots: Mapping[str, Tensor]  # tensor (N, C, ...) -> M, (C, C)

    def errors(self, values: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the relative error of each target, or of each group of raw heads.

        Args:
            values: name -> values, of all targets at least.
            targets: name -> values in the float net.
        """
        if any(self.measure.is_measured(name) for name in targets):
            sums = self.measure.sums(targets, values, 1 if self.kind == "mae" else 2)
            return [relative(*pair) for pair in sums.values()]
        return [
            relative_error(self._counted(name, values[name]), self._counted(name, y), self.kind)
            for name, y in targets.items()
        ]

    def _counted(self, name: str, value: Tensor) -> Tensor:
        root = self.roots.get(name)
        return value if root is None else value.movedim(1, -1) @ root


def roots_of(curvature: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return tensor -> M, the root of its damped curvature, (C, C), in units of the mean diagonal.

    Args:
        curvature: tensor -> G, (C, C).
        device: of the results.
    """
    return {
        name: torch.linalg.cholesky(damped(g / g.diagonal().mean())).float().to(device)
        for name, g in curvature.items()
    }


def relative_error(value: Tensor, target: Tensor, kind: str) -> Tensor:
    """Return sum |value - target| / sum |target| ("mae"), or the same of squares ("mse").

    Sums, because the gradient of a mean is a tensor of another memory layout.
    """
    if kind == "mae":
        return (value - target).abs().sum() / target.abs().sum().clamp_min(_LEAST_SIGNAL)
    return (value - target).square().sum() / target.square().sum().clamp_min(_LEAST_SIGNAL)
