"""Choose, layer by layer, the weight split that pays: none, identity or coarse-fine.

Both noises are powers at the layer's output, per position, summed over output channels:

    weight noise      N_w = sum (W - Q(W))[o,i,t]^2  E[x_i^2]
    activation noise  N_a = sum W[o,i,t]^2  step_x^2 / 12

N_a is there whatever the weights do. A layer whose N_w is at most N_a is healthy and stays whole:
ordinary kernels are at a tenth to a half, trained rep kernels at two to twenty. An ill one takes
the cheapest form whose N_w is at most a quarter of N_a (then the weights cost less than 1 dB); if
no form gets there, the one with the least N_w. Under the budget the layers that gain most per cost
go first. A net whose weight noise is in all no larger than its activation noise, each taken
relative to the signal of its layer, is left whole: taking all of it away would gain 3 dB at most.
Rule and cost model: ours.

Cost is counted in multiply-accumulates. One elementwise pass over an output element (the Add, the
Mul) counts as ``_ELEMENTWISE_MACS``: it moves a byte or two and computes next to nothing.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from reptrt.affine import Grid, dequantize
from reptrt.calib.channels import ChannelStats
from reptrt.graph import Net, constant_value, weighted_nodes
from reptrt.qdq import quantize_weight
from reptrt.rewrite import split_coarse_fine as coarse_fine
from reptrt.rewrite import split_identity as identity

Form = Literal["none", "identity", "coarse-fine"]
FloatArray = npt.NDArray[np.floating]

_HEALTHY = 1.0  # weight noise over activation noise that a layer may have unsplit
_ENOUGH = 0.25  # what a split is to bring it down to
_ELEMENTWISE_MACS = 8


@dataclass(frozen=True, slots=True)
class Option:
    """One form of one layer."""

    form: Form
    weight_noise: float
    extra_macs: int  # per image


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided for one layer, with the numbers it was decided on."""

    layer: str
    form: Form
    signal: float  # sum W^2 E[x^2], the unit of the noises
    activation_noise: float
    options: tuple[Option, ...]
    reason: str

    def option(self, form: Form) -> Option:
        """Return the numbers of one form."""
        return next(option for option in self.options if option.form == form)


def choose_splits(
    net: Net, stats: Mapping[str, ChannelStats], grids: tuple[Grid, Grid], max_overhead: float
) -> tuple[Decision, ...]:
    """Return a decision for every convolution.

    Args:
        net: a float net with known shapes; not changed.
        stats: layer name -> statistics of its input.
        grids: of activations and of weights.
        max_overhead: extra multiply-accumulates allowed, as a fraction of the net's own.
    """
    layers = [node for node in weighted_nodes(net.graph) if node.op == "Conv"]
    wanted = {
        node.name: _decide(node, stats[node.name], grids) for node in layers if node.name in stats
    }
    if _is_healthy(wanted.values()):
        return tuple(_left_whole(decision) for decision in wanted.values())
    budget = max_overhead * num_macs(net)
    final: dict[str, Decision] = {}
    for decision in sorted(wanted.values(), key=_gain_per_cost, reverse=True):
        kept = _within(decision, budget)
        budget -= kept.option(kept.form).extra_macs
        final[kept.layer] = kept
    return tuple(final[name] for name in wanted)


def num_macs(net: Net) -> int:
    """Return the multiply-accumulates of a net per image, as far as its shapes are known."""
    return sum(_macs(node) for node in weighted_nodes(net.graph))


def _is_healthy(decisions: Collection[Decision]) -> bool:
    """Whether the weight noise of a net is in all no larger than its activation noise."""
    alive = [decision for decision in decisions if decision.signal > 0]
    weights = sum(d.option("none").weight_noise / d.signal for d in alive)
    return weights <= sum(d.activation_noise / d.signal for d in alive)


def _left_whole(decision: Decision) -> Decision:
    reason = f"{decision.reason}; the net as a whole needs no split"
    return replace(decision, form="none", reason=reason)


def _decide(node: gs.Node, stats: ChannelStats, grids: tuple[Grid, Grid]) -> Decision:
    weight = np.asarray(constant_value(node.inputs[1]), dtype=np.float64)
    per_input = _per_input(weight, stats.mean_square, int(node.attrs.get("group", 1)))
    step = float(stats.maximum.max()) / grids[0].qmax
    floor = float(np.square(weight).sum()) * step**2 / 12.0
    options = tuple(_options(node, weight, per_input, grids[1]))
    limits = {"none": _HEALTHY, "identity": _ENOUGH, "coarse-fine": _ENOUGH}
    enough = [option for option in options if option.weight_noise <= limits[option.form] * floor]
    best = min(enough, key=lambda o: o.extra_macs) if enough else min(options, key=_noise)
    ratio = options[0].weight_noise / floor if floor else float("inf")
    reason = f"weight noise is {ratio:.2g} of the activation noise"
    if best.form != "none" and not enough:
        reason += "; no form gets below a quarter"
    signal = float((np.square(weight) * per_input).sum())
    return Decision(node.name, best.form, signal, floor, options, reason)


def _options(node: gs.Node, weight: FloatArray, per_input: FloatArray, grid: Grid) -> list[Option]:
    area = _positions(node)
    found = [Option("none", _weight_noise(weight, per_input, grid), 0)]
    channels = weight.shape[0]
    if identity.reason_against(node) is None:
        rest = identity.without_diagonal(weight, identity.diagonal_of(weight))
        extra = 2 * channels * _ELEMENTWISE_MACS * area
        found.append(Option("identity", _weight_noise(rest, per_input, grid), extra))
    if coarse_fine.reason_against(node) is None:
        _, fine = coarse_fine.coarse_and_fine(weight, grid)
        extra = (channels * weight.shape[1] + channels * _ELEMENTWISE_MACS) * area
        found.append(Option("coarse-fine", _weight_noise(fine, per_input, grid), extra))
    return found


def _within(decision: Decision, budget: float) -> Decision:
    """Return the decision, or the best one that the rest of the budget allows."""
    if decision.option(decision.form).extra_macs <= budget:
        return decision
    affordable = [option for option in decision.options if option.extra_macs <= budget]
    best = min(affordable, key=_noise)
    reason = f"{decision.reason}; {decision.form} is beyond the budget"
    return replace(decision, form=best.form, reason=reason)


def _gain_per_cost(decision: Decision) -> float:
    """Return the share of noise in the signal that a decision removes, per extra MAC."""
    before, after = decision.option("none"), decision.option(decision.form)
    gain = (before.weight_noise - after.weight_noise) / (decision.signal or 1.0)
    return gain / max(after.extra_macs, 1)


def _noise(option: Option) -> float:
    return option.weight_noise


def _weight_noise(weight: FloatArray, per_input: FloatArray, grid: Grid) -> float:
    quantized = quantize_weight(weight.astype(np.float32), 0, grid)
    error = weight - dequantize(quantized.codes, quantized.scale, 0)
    return float((np.square(error) * per_input).sum())


def _per_input(weight: FloatArray, values: FloatArray, groups: int) -> FloatArray:
    """Spread one value per input channel over a grouped kernel (O, I / groups, 1, 1)."""
    rows = np.repeat(values.reshape(groups, -1), weight.shape[0] // groups, axis=0)
    return np.asarray(rows.reshape(*rows.shape, *[1] * (weight.ndim - 2)))


def _positions(node: gs.Node) -> int:
    """Return the number of output positions per image; 1 if the shape is not known."""
    sizes = [size for size in (node.outputs[0].shape or ())[2:] if isinstance(size, int)]
    return int(np.prod(sizes)) if sizes else 1


def _macs(node: gs.Node) -> int:
    weight = constant_value(node.inputs[1])
    return 0 if weight is None else int(weight.size) * _positions(node)
