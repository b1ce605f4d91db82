"""Choose the splits and full ranges of a net by the rules of `reptrt.quantize.choose`."""

from collections.abc import Collection, Mapping
from dataclasses import replace

import onnx_graphsurgeon as gs

from reptrt.core.choices import SplitForm
from reptrt.core.grid import Grid
from reptrt.graph.net import Net, weighted_nodes
from reptrt.quantize.calib.channels import ChannelStats
from reptrt.quantize.choose.budget import within_budget
from reptrt.quantize.choose.cost import full_range_macs, num_macs
from reptrt.quantize.choose.decisions import Choice, ChooseOptions, Decision, Option, RangeDecision
from reptrt.quantize.choose.noise import layer_noise

_HEALTHY = 1.0  # largest weight noise over activation noise of a layer that stays whole
_ENOUGH = 0.25  # largest such ratio of a split layer
LEFT_BY_LEARNING = 0.1  # of the weight noise: learning removed 11 dB of it on the unsplit RepVGG


def choose(
    net: Net,
    stats: Mapping[str, ChannelStats],
    options: ChooseOptions,
    full_range: Collection[str] = (),
) -> Choice:
    """Return a decision for every convolution and for every activation that can have full range.

    Args:
        net: a float net with known shapes; not changed.
        stats: layer name -> statistics of its input; layers without an entry are not considered.
        options: what may be chosen, and what it may cost.
        full_range: activations that can have full range.
    """
    layers = [
        node for node in weighted_nodes(net.graph) if node.name in stats and node.op == "Conv"
    ]
    remaining = LEFT_BY_LEARNING if options.learned else 1.0
    desired = {
        node.name: _desired_form(node, stats[node.name], options, full_range) for node in layers
    }
    if not options.splits or _is_healthy(desired.values(), remaining):
        desired = {name: _left_whole(decision) for name, decision in desired.items()}
    ranges = [
        _range_decision(
            net,
            tensor,
            [desired[node.name] for node in layers if node.inputs[0].name == tensor],
            options.activations,
        )
        for tensor in full_range
    ]
    budget = options.max_overhead * num_macs(net)
    return within_budget(desired.values(), ranges, budget, remaining=remaining)


def _desired_form(
    node: gs.Node, stats: ChannelStats, options: ChooseOptions, full_range: Collection[str]
) -> Decision:
    """Return the form that one layer should take if the budget allows it."""
    has_full_range = node.inputs[0].name in full_range
    activations = options.activations.full_range if has_full_range else options.activations
    noise = layer_noise(node, stats, activations, options.weights)
    forms = noise.options
    if options.precision == "int8":
        forms = tuple(o for o in forms if o.form in ("none", "identity-scalar"))
    floor = noise.activation_noise
    enough = [option for option in forms if option.weight_noise <= _limit(option.form) * floor]
    best = min(enough, key=_cost) if enough else min(forms, key=_noise)
    ratio = forms[0].weight_noise / floor if floor else float("inf")
    reason = f"weight noise is {ratio:.2g} of the activation noise"
    if best.form != "none" and not enough:
        reason += "; no form gets below a quarter"
    return Decision(node.name, best.form, noise.signal, floor, forms, reason)


def _limit(form: SplitForm) -> float:
    return _HEALTHY if form == "none" else _ENOUGH


def _cost(option: Option) -> int:
    return option.extra_macs


def _noise(option: Option) -> float:
    return option.weight_noise


def _is_healthy(decisions: Collection[Decision], remaining: float) -> bool:
    """Return whether the layers' remaining weight noise is at most their activation noise."""
    alive = [decision for decision in decisions if decision.signal > 0]
    weights = sum(d.option("none").weight_noise / d.signal for d in alive)
    return remaining * weights <= sum(d.activation_noise / d.signal for d in alive)


def _left_whole(decision: Decision) -> Decision:
    reason = f"{decision.reason}; the net as a whole needs no split"
    return replace(decision, form="none", reason=reason)


def _range_decision(
    net: Net, tensor: str, readers: Collection[Decision], grid: Grid
) -> RangeDecision:
    """Return the gain and the cost of full range for one tensor; it is not yet granted.

    The decisions of its readers count the noise with full range. Without it, the noise is larger by
    the square of the ratio of the steps.
    """
    removed = (grid.full_range.qmax / grid.qmax) ** 2 - 1.0
    gain = sum(removed * d.activation_noise / (d.signal or 1.0) for d in readers)
    return RangeDecision(tensor, False, gain, full_range_macs(net, tensor))
