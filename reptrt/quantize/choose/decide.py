"""Choose the splits and full ranges of a net by the rules of `reptrt.quantize.choose`."""

from collections.abc import Collection, Mapping
from dataclasses import replace

import onnx_graphsurgeon as gs

from reptrt.core.grid import Grid
from reptrt.graph.net import Net, weighted_nodes
from reptrt.quantize.calib.channels import ChannelStats
from reptrt.quantize.choose.budget import within_budget
from reptrt.quantize.choose.cost import num_macs
from reptrt.quantize.choose.decisions import Choice, ChooseOptions, Decision, Option, RangeDecision
from reptrt.quantize.choose.noise import Noises, layer_noise, rounding_of_rest

_HEALTHY = 1.0  # largest weight noise over activation noise of a layer that stays whole
_ENOUGH = 0.25  # largest such ratio of a split layer


def choose(
    net: Net,
    stats: Mapping[str, ChannelStats],
    options: ChooseOptions,
    full_range: Mapping[str, int] | None = None,
    noises: Noises | None = None,
    outputs: Mapping[str, float] | None = None,
) -> Choice:
    """Return a decision for every convolution and for every activation that can have full range.

    Args:
        net: a float net with known shapes; not changed.
        stats: layer name -> statistics of its input; layers without an entry are not considered.
        options: what may be chosen, and what it may cost.
        full_range: activations that can have full range, with its cost (`full_range_macs`).
        noises: of layers of the same net with the same statistics, codes and costs, as far as they
            were computed for other policies; those of this call are added.
        outputs: layer -> largest value behind it and its activation function, as far as it is
            known: what INT8 summands lose where they are rounded.
    """
    known: Noises = {} if noises is None else noises
    possible = full_range or {}
    layers = [
        node for node in weighted_nodes(net.graph) if node.name in stats and node.op == "Conv"
    ]
    desired = {
        node.name: _desired_form(
            node, stats[node.name], options, possible, known, (outputs or {}).get(node.name, 0.0)
        )
        for node in layers
    }
    ranges = [
        _range_decision(
            tensor,
            [desired[node.name] for node in layers if node.inputs[0].name == tensor],
            options.activations,
            extra_macs,
        )
        for tensor, extra_macs in possible.items()
    ]
    budget = options.max_overhead * num_macs(net)
    return within_budget(desired.values(), ranges, budget, remaining=options.remaining)


def _desired_form(
    node: gs.Node,
    stats: ChannelStats,
    options: ChooseOptions,
    full_range: Collection[str],
    known: Noises,
    output: float,
) -> Decision:
    """Return the form that one layer should take if the budget allows it."""
    has_full_range = node.inputs[0].name in full_range
    activations = options.activations.full_range if has_full_range else options.activations
    key = node.name, activations
    if key not in known:
        known[key] = layer_noise(node, stats, activations, options.weights, options.costs)
    noise = known[key]
    forms = noise.options
    if options.precision == "int8":
        forms = _with_int8_summands(node, stats, options, forms, output)
    whole, floor = forms[0].weight_noise, noise.activation_noise
    ratio = whole / floor if floor else float("inf")
    reason = f"weight noise is {ratio:.2g} of the activation noise"
    best = forms[0]
    if options.policy == "identity":
        halved = [o for o in forms if o.form.startswith("identity") and o.weight_noise <= whole / 2]
        best = min(halved, key=_noise, default=best)
    elif options.policy == "balance" and whole > _HEALTHY * floor:
        enough = [option for option in forms if option.weight_noise <= _ENOUGH * floor]
        best = min(enough, key=_cost) if enough else min(forms, key=_noise)
        if best.form != "none" and not enough:
            reason += "; no form gets below a quarter"
    return Decision(node.name, best.form, noise.signal, floor, forms, reason)


def _with_int8_summands(
    node: gs.Node,
    stats: ChannelStats,
    options: ChooseOptions,
    forms: Collection[Option],
    output: float,
) -> tuple[Option, ...]:
    """Return the forms that are left with INT8 summands; the noise of rounding one is added.

    It is not compensated as errors of weights are, so it counts as a larger noise of weights.
    """
    left = [option for option in forms if option.form in ("none", "identity-scalar")]
    if len(left) == 1:
        return (*left,)
    rounding = rounding_of_rest(node, stats, output, options.activations, options.weights)
    return tuple(
        option
        if option.form == "none"
        else replace(option, weight_noise=option.weight_noise + rounding / options.remaining)
        for option in left
    )


def _cost(option: Option) -> tuple[int, float]:
    return option.extra_macs, option.weight_noise


def _noise(option: Option) -> float:
    return option.weight_noise


def _range_decision(
    tensor: str, readers: Collection[Decision], grid: Grid, extra_macs: int
) -> RangeDecision:
    """Return the gain and the cost of full range for one tensor; it is not yet granted.

    The decisions of its readers count the noise with full range. Without it, the noise is larger by
    the square of the ratio of the steps.
    """
    removed = (grid.full_range.qmax / grid.qmax) ** 2 - 1.0
    gain = sum(removed * d.activation_noise / (d.signal or 1.0) for d in readers)
    return RangeDecision(tensor, False, gain, extra_macs)
