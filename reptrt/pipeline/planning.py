"""The plan of an INT8 net: prepare the float net, measure scales, round weights.

float net -> prepare -> quantities_of -> QuantPlan
"""

from dataclasses import dataclass

from reptrt.core.clock import Clock
from reptrt.data.dataset import Dataset
from reptrt.graph.net import Net
from reptrt.graph.plan import QuantPlan, plan_from_placement
from reptrt.graph.qdq import insert_qdq
from reptrt.pipeline.options import CalibrateOptions
from reptrt.pipeline.preparing import Prepared, prepare
from reptrt.pipeline.quantities import Quantities, quantities_of
from reptrt.quantize.choose import RangeDecision


@dataclass(frozen=True, slots=True)
class Planned:
    """A prepared net and the plan for its INT8 form."""

    net: Net  # float, with corrected biases
    reference: Net  # the same before biases were corrected
    prepared: Prepared
    quantities: Quantities
    ranges: tuple[RangeDecision, ...]  # of the activations that have a scale
    plan: QuantPlan

    @property
    def layers(self) -> tuple[str, ...]:
        """The INT8 layers, by the names that they had before splits."""
        whole = {part: s.layer for s in self.prepared.splits for part in (s.main, s.side)}
        nodes = (weight.node for weight in self.quantities.placement.weights)
        return tuple(dict.fromkeys(whole.get(node, node) for node in nodes))

    @property
    def idle(self) -> tuple[str, ...]:
        """The layers that stay in float because they read a tensor that is always 0."""
        asked = self.prepared.placement.excluded
        return tuple(sorted({*self.quantities.placement.excluded} - {*asked}))

    def quantized(self) -> Net:
        """Return the net with its Q/DQ pairs."""
        net = self.net.copy()
        insert_qdq(net, self.plan)
        return net


def plan_net(net: Net, dataset: Dataset, options: CalibrateOptions, clock: Clock) -> Planned:
    """Prepare a float net and plan its INT8 form.

    Args:
        net: changed: it is equalized, split, and its biases are corrected.
        dataset: calibration images.
        options: of calibration.
        clock: laps "prepare", "collect", "thresholds", "rounding" and "biases" are added.
    """
    prepared = prepare(net, dataset, options)
    clock.lap("prepare")
    reference = net.copy()
    found = quantities_of(net, prepared, dataset, options, clock)
    ranges = tuple(choice for choice in prepared.ranges if choice.tensor not in found.dead)
    plan = plan_from_placement(
        found.placement,
        found.activations.by_tensor,
        found.weights,
        options.grids[0],
        grids=found.activations.grids,
    )
    return Planned(net, reference, prepared, found, ranges, plan)
