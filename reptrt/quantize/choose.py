"""Choose what pays: a weight split for each layer, the full range of codes for each activation.

Both noises are powers at the layer's output, per position, summed over output channels:

    weight noise      N_w = sum (W - Q(W))[o,i,t]^2  Var[x_i]      (bias correction takes the mean)
    activation noise  N_a = sum W[o,i,t]^2  step_x^2 / 12

N_a is there whatever the weights do. A layer whose N_w is at most N_a is healthy and stays whole:
ordinary kernels are at a tenth to a half, trained rep kernels at two to twenty. An ill one takes
the cheapest form whose N_w is at most a quarter of N_a (then the weights cost less than 1 dB); if
no form gets there, the one with the least N_w. Under the budget the layers that gain most per cost
go first. A net whose weight noise is in all no larger than its activation noise, each taken
relative to the signal of its layer, is left whole: taking all of it away would gain 3 dB at most.
An activation with full range has half the step, so a quarter of N_a; N_a above is counted with it
where it is possible. It takes an elementwise pass for each padded convolution that reads it (the
border's map) and is free elsewhere. Rules and cost model: ours.

Cost is counted in multiply-accumulates. One elementwise pass over an output element (the Add, the
Mul) counts as ``_ELEMENTWISE_MACS``: it moves a byte or two and computes next to nothing.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from reptrt.core.choices import SplitForm, SplitPrecision
from reptrt.core.grid import Grid, channel_amax, dequantize
from reptrt.graph.net import Net, constant_value, weighted_nodes
from reptrt.graph.qdq import quantize_weight
from reptrt.quantize.calib.channels import ChannelStats
from reptrt.rewrite import split_coarse_fine as coarse_fine
from reptrt.rewrite import split_identity as identity
from reptrt.rewrite.linear import spread_over_kernel
from reptrt.rewrite.recentre import padded_readers
from reptrt.rewrite.surroundings import Surroundings

FloatArray = npt.NDArray[np.floating]

_HEALTHY = 1.0  # weight noise over activation noise that a layer may have unsplit
_ENOUGH = 0.25  # what a split is to bring it down to
_ELEMENTWISE_MACS = 8
_LEFT_BY_LEARNING = 0.1  # of the weight noise: learning took 11 dB of error off the unsplit RepVGG


@dataclass(frozen=True, slots=True)
class Option:
    """One form of one layer."""

    form: SplitForm
    weight_noise: float
    extra_macs: int  # per image


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided for one layer, with the numbers it was decided on."""

    layer: str
    form: SplitForm
    signal: float  # sum W^2 E[x^2], the unit of the noises
    activation_noise: float
    options: tuple[Option, ...]
    reason: str

    def option(self, form: SplitForm) -> Option:
        """Return the numbers of one form."""
        return next(option for option in self.options if option.form == form)


@dataclass(frozen=True, slots=True)
class RangeDecision:
    """Whether one activation gets all codes."""

    tensor: str
    full: bool
    gain: float  # activation noise that it removes, over the signal, summed over its layers
    extra_macs: int  # per image


def full_range_of(ranges: Collection[RangeDecision]) -> tuple[str, ...]:
    """Return the activations that get all codes."""
    return tuple(decision.tensor for decision in ranges if decision.full)


@dataclass(frozen=True, slots=True)
class Choice:
    """All decisions for one net."""

    splits: tuple[Decision, ...]
    ranges: tuple[RangeDecision, ...]

    @property
    def extra_macs(self) -> int:
        """What was spent, in multiply-accumulates per image."""
        splits = sum(decision.option(decision.form).extra_macs for decision in self.splits)
        return splits + sum(decision.extra_macs for decision in self.ranges if decision.full)


def choose(
    net: Net,
    stats: Mapping[str, ChannelStats],
    grids: tuple[Grid, Grid],
    max_overhead: float,
    *,
    splits: bool = True,
    precision: SplitPrecision = "float",
    ranges: Collection[str] = (),
    learned: bool = False,
) -> Choice:
    """Return a decision for every convolution and for every activation that can have full range.

    What removes most noise per cost goes first, as long as the budget lasts.

    Args:
        net: a float net with known shapes; not changed.
        stats: layer name -> statistics of its input.
        grids: of activations and of weights.
        max_overhead: extra multiply-accumulates allowed, as a fraction of the net's own.
        splits: whether layers may be split.
        precision: of the summands. INT8 ones would be rounded, which costs more than it brings,
            but for those of the scalar identity: its skip is not, and its rest has known bounds.
        ranges: activations that can have full range.
        learned: whether the rounding of weights will be learned, which leaves less of their noise:
            a net needs splits for what is left only, and full range goes before them.
    """
    layers = [
        node for node in weighted_nodes(net.graph) if node.name in stats and node.op == "Conv"
    ]
    wanted = {
        node.name: _decide(
            node,
            stats[node.name],
            grids,
            precision,
            full_range=node.inputs[0].name in ranges,
        )
        for node in layers
    }
    left = _LEFT_BY_LEARNING if learned else 1.0
    if not splits or _is_healthy(wanted.values(), left):
        wanted = {name: _left_whole(decision) for name, decision in wanted.items()}
    readers = {tensor: [n.name for n in layers if n.inputs[0].name == tensor] for tensor in ranges}
    given = {
        tensor: _range_decision(net, tensor, [wanted[name] for name in names], grids[0])
        for tensor, names in readers.items()
    }
    moves = [
        replace(move, gain=left * move.gain)
        for decision in wanted.values()
        for move in _upgrades(decision)
    ]
    moves += [_Move(d.tensor, None, d.gain, d.extra_macs) for d in given.values()]
    taken = _taken(moves, max_overhead * num_macs(net))
    return Choice(
        tuple(_settled(decision, taken) for decision in wanted.values()),
        tuple(replace(d, full=(d.tensor, None) in taken) for d in given.values()),
    )


@dataclass(frozen=True, slots=True)
class _Move:
    """One step that costs something: another form of a layer, or full range of a tensor."""

    name: str  # of the layer or tensor
    form: SplitForm | None  # None: full range
    gain: float  # noise that it removes, over the signal
    extra_macs: int  # beyond those of the step before it

    @property
    def rate(self) -> float:
        """Gain per cost."""
        return self.gain / self.extra_macs if self.extra_macs else float("inf")


def _upgrades(decision: Decision) -> list[_Move]:
    """Return the steps from the whole layer to its wanted form, each with a lower rate.

    They are the lower convex hull of noise over cost: what the budget cuts off is worth least.
    """
    now, moves = decision.option("none"), []
    target = decision.option(decision.form)
    while now.form != target.form:
        ahead = [
            option
            for option in decision.options
            if now.extra_macs < option.extra_macs < target.extra_macs or option is target
        ]
        steps = [
            _Move(
                decision.layer,
                option.form,
                (now.weight_noise - option.weight_noise) / (decision.signal or 1.0),
                option.extra_macs - now.extra_macs,
            )
            for option in ahead
        ]
        best = max(steps, key=lambda move: move.rate)
        moves.append(best)
        now = decision.option(best.form or "none")
    return moves


def _taken(moves: Collection[_Move], budget: float) -> set[tuple[str, SplitForm | None]]:
    """Return the steps that the budget allows, the best rate first; none after one left out."""
    taken: set[tuple[str, SplitForm | None]] = set()
    closed: set[str] = set()
    for move in sorted(moves, key=lambda move: move.rate, reverse=True):
        if move.extra_macs > budget or move.name in closed:
            closed.add(move.name)
            continue
        budget -= move.extra_macs
        taken.add((move.name, move.form))
    return taken


def _settled(decision: Decision, taken: Collection[tuple[str, SplitForm | None]]) -> Decision:
    """Return the decision with the last form that was taken on the way to the wanted one."""
    final: SplitForm = "none"
    for move in _upgrades(decision):
        if (move.name, move.form) in taken and move.form is not None:
            final = move.form
    if final == decision.form:
        return decision
    reason = f"{decision.reason}; {decision.form} is beyond the budget"
    return replace(decision, form=final, reason=reason)


def int8_obstacle(node: gs.Node, form: SplitForm, grid: Grid) -> str | None:
    """Return why a split into INT8 summands does not pay for a layer, or None if it does.

    Rounding a summand adds noise, so each rounded summand has to bring 3 dB: sum_o step_o^2 of the
    rest must be at most half of the whole kernel's in the identity form, whose skip is not rounded,
    and at most a quarter in the coarse-fine form. Only the weight is looked at. Rule: ours.
    """
    weight = constant_value(node.inputs[1])
    if form == "coarse-fine":
        reason = coarse_fine.reason_against(node)
        if reason is not None or weight is None:
            return reason
        rest, limit = coarse_fine.coarse_and_fine(weight, grid)[1], 1 / 4
    else:
        reason = identity.reason_against(node)
        if reason is not None or weight is None:
            return reason
        factor = identity.factor_of(weight, grid, "scalar")
        if factor is None:
            return identity.NO_FACTOR
        rest, limit = identity.without_diagonal(weight, factor), 1 / 2
    before, after = (np.square(channel_amax(part, 0)).sum() for part in (weight, rest))
    if after <= limit * before:
        return None
    return (
        "rounding the INT8 summands would add more noise than the split removes (squared steps "
        f"fall to {after / before:.2g} of the whole kernel's, expected at most {limit:g})"
    )


def num_macs(net: Net) -> int:
    """Return the multiply-accumulates of a net per image, as far as its shapes are known."""
    return sum(_macs(node) for node in weighted_nodes(net.graph))


def _is_healthy(decisions: Collection[Decision], left: float) -> bool:
    """Whether what is left of the weight noise is in all no larger than the activation noise."""
    alive = [decision for decision in decisions if decision.signal > 0]
    weights = sum(d.option("none").weight_noise / d.signal for d in alive)
    return left * weights <= sum(d.activation_noise / d.signal for d in alive)


def _left_whole(decision: Decision) -> Decision:
    reason = f"{decision.reason}; the net as a whole needs no split"
    return replace(decision, form="none", reason=reason)


def _range_decision(
    net: Net, tensor: str, readers: Collection[Decision], grid: Grid
) -> RangeDecision:
    """Return what full range of one tensor gains and costs; it is not granted yet.

    The noise in the decisions of its readers is counted with full range already: without, it is
    larger by the square of the steps.
    """
    removed = (grid.full_range.qmax / grid.qmax) ** 2 - 1.0
    gain = sum(removed * d.activation_noise / (d.signal or 1.0) for d in readers)
    return RangeDecision(tensor, False, gain, _ELEMENTWISE_MACS * _full_range_elements(net, tensor))


def _full_range_elements(net: Net, tensor: str) -> int:
    """Return the elements that full range of a tensor adds to: borders and averages."""
    maps = [reader.map_shape or () for reader in padded_readers(net, tensor)]
    readers = Surroundings(net, set()).readers(net.graph.tensors()[tensor], fixed=False)
    averages = [] if isinstance(readers, str) else readers.averages
    channels = [int((node.outputs[0].shape or (0, 1))[1]) for node in averages]
    return int(sum(np.prod(shape) for shape in maps)) + sum(channels)


def _decide(
    node: gs.Node,
    stats: ChannelStats,
    grids: tuple[Grid, Grid],
    precision: SplitPrecision,
    *,
    full_range: bool,
) -> Decision:
    weight = np.asarray(constant_value(node.inputs[1]), dtype=np.float64)
    groups = int(node.attrs.get("group", 1))
    grid = grids[0].full_range if full_range else grids[0]
    step = float(stats.maximum.max()) / grid.qmax
    floor = float(np.square(weight).sum()) * step**2 / 12.0
    options = tuple(
        _options(node, weight, spread_over_kernel(stats.variance, weight, groups), grids[1])
    )
    if precision == "int8":
        options = tuple(o for o in options if o.form in ("none", "identity-scalar"))
    enough = [option for option in options if option.weight_noise <= _limit(option.form) * floor]
    best = min(enough, key=lambda o: o.extra_macs) if enough else min(options, key=_noise)
    ratio = options[0].weight_noise / floor if floor else float("inf")
    reason = f"weight noise is {ratio:.2g} of the activation noise"
    if best.form != "none" and not enough:
        reason += "; no form gets below a quarter"
    signal = float(
        (np.square(weight) * spread_over_kernel(stats.mean_square, weight, groups)).sum()
    )
    return Decision(node.name, best.form, signal, floor, options, reason)


def _limit(form: SplitForm) -> float:
    return _HEALTHY if form == "none" else _ENOUGH


def _options(node: gs.Node, weight: FloatArray, per_input: FloatArray, grid: Grid) -> list[Option]:
    area = _positions(node)
    found = [Option("none", _weight_noise(weight, per_input, grid), 0)]
    channels = weight.shape[0]
    if identity.reason_against(node) is None:
        addition = channels * _ELEMENTWISE_MACS * area
        forms: tuple[tuple[SplitForm, identity.Form, int], ...] = (
            ("identity-scalar", "scalar", addition),
            ("identity", "per-channel", 2 * addition),
        )
        for name, form, extra in forms:
            factor = identity.factor_of(weight, grid, form)
            if factor is not None:
                rest = identity.without_diagonal(weight, factor)
                found.append(Option(name, _weight_noise(rest, per_input, grid), extra))
    if coarse_fine.reason_against(node) is None:
        _, fine = coarse_fine.coarse_and_fine(weight, grid)
        extra = (channels * weight.shape[1] + channels * _ELEMENTWISE_MACS) * area
        found.append(Option("coarse-fine", _weight_noise(fine, per_input, grid), extra))
    return found


def _noise(option: Option) -> float:
    return option.weight_noise


def _weight_noise(weight: FloatArray, per_input: FloatArray, grid: Grid) -> float:
    quantized = quantize_weight(weight.astype(np.float32), 0, grid)
    error = weight - dequantize(quantized.codes, quantized.scale, 0)
    return float((np.square(error) * per_input).sum())


def _positions(node: gs.Node) -> int:
    """Return the number of output positions per image; 1 if the shape is not known."""
    sizes = [size for size in (node.outputs[0].shape or ())[2:] if isinstance(size, int)]
    return int(np.prod(sizes)) if sizes else 1


def _macs(node: gs.Node) -> int:
    weight = constant_value(node.inputs[1])
    return 0 if weight is None else int(weight.size) * _positions(node)
