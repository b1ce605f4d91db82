"""Equalization, splits and full ranges, chosen together (ours).

The factors of a tensor depend on the splits of its readers and on its step, and what a split or
full range gains depends on the factors. So for each policy (`reptrt.quantize.choose`) factors and
choice are computed in turns, from statistics alone. Where the policies lead to different nets, the
outputs of the judging images decide (`reptrt.pipeline.preparing`): each candidate runs them once,
with rounded weights and activations, and the one with the least error is taken.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from reptrt.core.arrays import Float64Array
from reptrt.core.choices import SplitForm
from reptrt.graph.net import Net, weighted_nodes
from reptrt.pipeline.options import CalibrateOptions
from reptrt.quantize.calib.channels import ChannelStats
from reptrt.quantize.choose import (
    Choice,
    ChooseOptions,
    Noises,
    Policy,
    best_factors,
    choose,
    full_range_macs,
    full_range_of,
    reader_of,
)
from reptrt.quantize.targets import Costs
from reptrt.rewrite.equalize import equalize, find_streams

_ROUNDS = 2  # of factors and choice


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One way to prepare a net."""

    factors: Mapping[str, Float64Array]  # stream -> factor of each channel, (C,)
    choice: Choice
    forms: Mapping[str, SplitForm]  # layer -> form, for those to split

    @property
    def full_range(self) -> frozenset[str]:
        """The activations that use the full range of codes."""
        return frozenset(full_range_of(self.choice.ranges))

    @property
    def key(self) -> tuple[object, ...]:
        """What distinguishes two candidates of one net."""
        split = frozenset((layer, form) for layer, form in self.forms.items() if form != "none")
        return split, self.full_range


@dataclass(frozen=True, slots=True, eq=False)
class _Equalized:
    """A float net whose channels are scaled, for the choice of splits."""

    net: Net
    inputs: Mapping[str, ChannelStats]  # layer -> statistics of its input
    outputs: Mapping[str, float]  # layer -> largest value behind its activation function
    noises: Noises  # computed so far


class Candidates:
    """Finds the candidates of a float net.

    Args:
        net: the net; not changed.
        stats: tensor -> statistics, of every layer's input; empty if nothing is to be chosen.
        layers: layer -> its input, of the layers that will be quantized.
        possible: activations that can have full range.
        forms: layer -> the form that the options ask for; empty if forms are to be chosen.
        options: of calibration.
        costs: of the runtime.
    """

    def __init__(
        self,
        net: Net,
        stats: Mapping[str, ChannelStats],
        layers: Mapping[str, str],
        possible: Collection[str],
        forms: Mapping[str, SplitForm],
        options: CalibrateOptions,
        costs: Costs,
    ) -> None:
        self._net, self._stats, self._layers = net, stats, layers
        self._forms, self._options, self._costs = forms, options, costs
        self._possible = {tensor: full_range_macs(net, tensor, costs) for tensor in possible}
        self._known: dict[tuple[object, ...], Float64Array] = {}
        self._trials: dict[tuple[int, ...], _Equalized] = {}
        self._streams = find_streams(net)[0] if options.parts.equalize else ()

    def all(self) -> list[Candidate]:
        """Return the candidates that differ, the one with least extra work first."""
        policies: tuple[Policy, ...] = ("whole",)
        if self._options.parts.split == "auto" and self._options.max_overhead > 0:
            policies = ("whole", "balance", "identity")
        different: dict[tuple[object, ...], Candidate] = {}
        for policy in policies:
            candidate = self._of(policy)
            different.setdefault(candidate.key, candidate)
        return sorted(different.values(), key=lambda candidate: candidate.choice.extra_macs)

    def _of(self, policy: Policy) -> Candidate:
        options = self._choose_options(policy)
        # On the way to a choice, weights count without the diagonal that a split would take out.
        first: SplitForm = "none" if policy == "whole" else "identity"
        forms = dict(self._forms) or dict.fromkeys(self._layers, first)
        full_range = frozenset(self._possible)
        for _ in range(_ROUNDS):
            factors = self._factors(forms, full_range)
            trial = self._equalized(factors)
            choice = choose(
                trial.net, trial.inputs, options, self._possible, trial.noises, trial.outputs
            )
            forms = dict(self._forms) or {d.layer: d.form for d in choice.splits}
            full_range = frozenset(full_range_of(choice.ranges))
        return Candidate(factors, choice, forms)

    def _equalized(self, factors: Mapping[str, Float64Array]) -> "_Equalized":
        """Return the net with given factors; policies often agree on them in the first round."""
        key = tuple(id(values) for values in factors.values())  # all of them are kept
        if key not in self._trials:
            net = self._net.copy()
            equalize(net, find_streams(net)[0], factors)
            scaled = scaled_stats(self._net, self._stats, factors)
            inputs = {layer: scaled[name] for layer, name in self._layers.items() if name in scaled}
            self._trials[key] = _Equalized(net, inputs, _largest_outputs(net, scaled), {})
        return self._trials[key]

    def _choose_options(self, policy: Policy) -> ChooseOptions:
        activations, weights = self._options.grids
        return ChooseOptions(
            activations=activations,
            weights=weights,
            max_overhead=self._options.max_overhead,
            policy=policy,
            precision=self._options.summands,
            costs=self._costs,
            remaining=self._options.remaining,
        )

    def _factors(
        self, forms: Mapping[str, SplitForm], full_range: frozenset[str]
    ) -> dict[str, Float64Array]:
        """Return the best factors of each stream that a quantized layer reads."""
        grid, weights = self._options.grids
        found = {}
        for stream in self._streams:
            readers = [node for node in stream.consumers if node.name in self._layers]
            if not readers:
                continue
            levels = [
                (grid.full_range if self._layers[node.name] in full_range else grid).qmax
                for node in readers
            ]
            taken = [forms.get(node.name, "none") for node in readers]
            key = (stream.name, *taken, *levels)
            if key not in self._known:
                self._known[key] = best_factors(
                    [
                        reader_of(
                            node,
                            self._stats[self._layers[node.name]],
                            form,
                            input_levels=level,
                            weight_levels=weights.qmax,
                        )
                        for node, form, level in zip(readers, taken, levels, strict=True)
                    ]
                )
            found[stream.name] = self._known[key]
        return found


def _largest_outputs(net: Net, stats: Mapping[str, ChannelStats]) -> dict[str, float]:
    """Return layer -> largest |value| of its output, or of what its only reader makes of it."""
    found: dict[str, float] = {}
    for node in weighted_nodes(net.graph):
        output = node.outputs[0]
        behind = output.outputs[0].outputs[:1] if len(output.outputs) == 1 else []
        known = [stats[tensor.name] for tensor in (output, *behind) if tensor.name in stats]
        if known:
            found[node.name] = float(known[0].maximum.max())
    return found


def scaled_stats(
    net: Net, stats: Mapping[str, ChannelStats], factors: Mapping[str, Float64Array]
) -> dict[str, ChannelStats]:
    """Return the statistics that tensors have when streams are scaled.

    Args:
        net: a float net.
        stats: tensor -> statistics.
        factors: stream -> factor of each channel, (C,).
    """
    scaled = factors_of_tensors(net, factors)
    return {
        name: channels.scaled(scaled[name]) if name in scaled else channels
        for name, channels in stats.items()
    }


def factors_of_tensors(net: Net, factors: Mapping[str, Float64Array]) -> dict[str, Float64Array]:
    """Return tensor -> factor of each channel, (C,), from those of streams."""
    return {
        tensor: factors[stream.name]
        for stream in (find_streams(net)[0] if factors else ())
        if stream.name in factors
        for tensor in stream.tensors
    }
