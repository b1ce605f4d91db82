"""The plan of a quantized net: what calibration decided, in numbers.

`reptrt.graph.placement` says where Q/DQ pairs may go; a plan adds the step size and the codes of
each. `reptrt.graph.qdq` writes a plan into a float graph, and the steps that follow read the plan
and not the graph: learning and rounding of scales return the changed plan. The plan of a file is
read by `reptrt.graph.quantized.plan_from_net`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from reptrt.core.grid import Grid, dequantize
from reptrt.graph.placement import Placement


@dataclass(frozen=True, slots=True)
class QuantizedActivation:
    """The Q/DQ pair of one tensor: x ~ scale * code, with the codes of ``grid``."""

    readers: tuple[tuple[str, int], ...]  # (node name, input index) that read the dequantized x
    group: int  # activations of one group have the same scale
    scale: float  # a float32 number
    grid: Grid

    @property
    def has_full_range(self) -> bool:
        """Whether x is never negative and takes all codes, from 0 on."""
        return self.grid.qmin == 0


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """INT8 codes and the scale of each output channel: weight ~ codes * scale along ``axis``."""

    codes: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float32]  # (O,)
    axis: int

    def dequantized(self) -> npt.NDArray[np.float32]:
        """Return codes * scale."""
        return dequantize(self.codes, self.scale, self.axis)


@dataclass(frozen=True, slots=True, eq=False)
class QuantPlan:
    """All activations and weights that a net quantizes.

    Raises:
        ValueError: activations of one group have different scales or codes.
    """

    activations: Mapping[str, QuantizedActivation]  # by tensor
    weights: Mapping[str, QuantizedWeight]  # by the node that reads the weight
    excluded: tuple[str, ...] = ()  # weighted layers that stay in float

    def __post_init__(self) -> None:
        groups: dict[int, QuantizedActivation] = {}
        for tensor, activation in self.activations.items():
            first = groups.setdefault(activation.group, activation)
            if (activation.scale, activation.grid) != (first.scale, first.grid):
                raise ValueError(
                    f"{tensor}: scale {activation.scale} and {activation.grid}, expected "
                    f"{first.scale} and {first.grid} as all of group {activation.group}"
                )

    @property
    def full_range(self) -> tuple[str, ...]:
        """The activations that take all codes."""
        return tuple(name for name, a in self.activations.items() if a.has_full_range)

    def with_scales(self, scales: Mapping[str, float]) -> "QuantPlan":
        """Return the plan with other scales for some activations: tensor -> scale."""
        changed = {name: replace(self.activations[name], scale=s) for name, s in scales.items()}
        return replace(self, activations={**self.activations, **changed})

    def with_weights(self, weights: Mapping[str, QuantizedWeight]) -> "QuantPlan":
        """Return the plan with other codes or scales for the weights of some nodes."""
        return replace(self, weights={**self.weights, **weights})


def plan_from_placement(
    placement: Placement,
    scales: Mapping[str, float],
    weights: Mapping[str, QuantizedWeight],
    grid: Grid,
    full_range: Collection[str] = (),
    grids: Mapping[str, Grid] = MappingProxyType({}),
) -> QuantPlan:
    """Return the plan that fills a placement with numbers.

    Args:
        placement: where pairs go.
        scales: tensor -> scale, for every activation of the placement.
        weights: node -> codes and scales, for every weight of the placement.
        grid: the codes of activations.
        full_range: activations that are never negative and take the codes ``grid.full_range``.
        grids: tensor -> codes, of activations that have others.
    """
    codes = {**dict.fromkeys(full_range, grid.full_range), **grids}
    return QuantPlan(
        activations={
            activation.tensor: QuantizedActivation(
                activation.readers,
                activation.group,
                float(np.float32(scales[activation.tensor])),
                codes.get(activation.tensor, grid),
            )
            for activation in placement.activations
        },
        weights={weight.node: weights[weight.node] for weight in placement.weights},
        excluded=placement.excluded,
    )
