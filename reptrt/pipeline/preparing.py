"""Prepare a float graph for quantization: equalize, split, choose which tensors get full range."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from reptrt.core.arrays import Float64Array
from reptrt.core.choices import SplitForm
from reptrt.core.errors import ConfigError, option
from reptrt.data.dataset import Dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import Net, weighted_nodes
from reptrt.graph.placement import Placement, exactly, place
from reptrt.graph.splits import Split, read_splits
from reptrt.pipeline.options import CalibrateOptions
from reptrt.quantize.calib.channels import ChannelStats, collect_channels
from reptrt.quantize.calib.outputs import parts
from reptrt.quantize.choose import (
    ChooseOptions,
    Decision,
    RangeDecision,
    choose,
    int8_obstacle,
    num_macs,
)
from reptrt.rewrite.contract import Skipped
from reptrt.rewrite.equalize import equalize, find_links, range_of_channels
from reptrt.rewrite.recentre import full_range_obstacle
from reptrt.rewrite.split_coarse_fine import split_coarse_fine
from reptrt.rewrite.split_identity import split_identity


@dataclass(frozen=True, slots=True)
class Prepared:
    """What was done to a float graph before it was quantized."""

    equalized: int  # tensors whose channels were given equal ranges
    splits: tuple[Split, ...]
    decisions: tuple[Decision, ...]  # made where splits are chosen automatically
    left_whole: tuple[Skipped, ...]  # layers that are not split although a form was asked for
    ranges: tuple[RangeDecision, ...]  # of all activations that can take all codes
    overhead: float  # extra multiply-accumulates that were chosen, of the net's own
    placement: Placement  # where Q/DQ pairs go in the net as it is now
    # tensor -> range of each channel without the judging images / range with them, (C,), at most 1
    without_judges: Mapping[str, Float64Array]


def prepare(net: Net, dataset: Dataset, options: CalibrateOptions) -> Prepared:
    """Equalize and split a float net in place, as the options say; its output stays the same.

    Args:
        net: a float net.
        dataset: calibration images.
        options: of calibration.
    """
    net.graph.cleanup(remove_unused_graph_inputs=False)  # nodes that lead to no output
    placement = place(net, options.exclude, options.float_patterns)
    # Rewrites name the parts of a layer after it: later placements match today's names exactly.
    in_float = (exactly(placement.excluded), exactly(placement.float_nodes))
    layers = {
        node.name: node.inputs[0].name
        for node in weighted_nodes(net.graph)
        if node.name not in placement.excluded
    }
    stats, shares = _measure(net, placement, layers, dataset, options)
    inputs, equalized = _equalize(net, layers, stats, options)
    possible = _can_have_full_range(net, place(net, *in_float)) if options.full_range else ()
    choice = choose(net, inputs, _choose_options(options), possible)
    total = num_macs(net)
    decisions = choice.splits if options.split == "auto" else ()
    left_whole = _split(net, layers, decisions, options)
    placement = place(net, *in_float)  # of the net with its splits
    still_possible = _can_have_full_range(net, placement) if choice.ranges else ()
    ranges = tuple(
        replace(decision, full=decision.full and decision.tensor in still_possible)
        for decision in choice.ranges
    )
    extra = replace(choice, ranges=ranges).extra_macs
    overhead = extra / total if total else 0.0
    return Prepared(
        equalized, read_splits(net), decisions, left_whole, ranges, overhead, placement, shares
    )


def _measure(
    net: Net,
    placement: Placement,
    layers: Mapping[str, str],
    dataset: Dataset,
    options: CalibrateOptions,
) -> tuple[dict[str, ChannelStats], dict[str, Float64Array]]:
    """Return what `_statistics` does, of every tensor that a decision needs; empty if none does."""
    if not (options.equalize or options.split == "auto" or options.full_range or options.is_auto):
        return {}, {}
    linked = [link.tensor.name for link in find_links(net)[0]] if options.equalize else []
    quantized = (activation.tensor for activation in placement.activations)
    tensors = sorted({*layers.values(), *linked, *quantized})
    with torch.inference_mode():
        graph = TorchGraph(net, torch_device(options.device))
        return _statistics(graph, dataset, tensors, linked)


def _equalize(
    net: Net,
    layers: Mapping[str, str],
    stats: Mapping[str, ChannelStats],
    options: CalibrateOptions,
) -> tuple[dict[str, ChannelStats], int]:
    """Equalize the net if asked for; return the statistics of every layer's input afterwards.

    The second result is the number of tensors that were equalized.
    """
    inputs = {layer: stats[name] for layer, name in layers.items() if name in stats}
    if not options.equalize:
        return inputs, 0
    report, grown = equalize(net, {name: channels.maximum for name, channels in stats.items()})
    scaled = {
        layer: channels.scaled(grown[layer]) if layer in grown else channels
        for layer, channels in inputs.items()
    }
    return scaled, len(report.changed)


def _split(
    net: Net,
    layers: Collection[str],
    decisions: Collection[Decision],
    options: CalibrateOptions,
) -> tuple[Skipped, ...]:
    """Split layers as decided, or as asked for; return those left whole with the reason."""
    if options.split != "auto":
        return _split_as_asked(net, layers, options)
    split_layers(net, {decision.layer: decision.form for decision in decisions}, options)
    whole = [decision for decision in decisions if decision.form == "none"]
    return tuple(Skipped(decision.layer, decision.reason) for decision in whole)


def _choose_options(options: CalibrateOptions) -> ChooseOptions:
    activations, weights = options.grids
    return ChooseOptions(
        activations=activations,
        weights=weights,
        max_overhead=options.max_overhead,
        splits=options.split == "auto",
        precision=options.split_precision,
        learned=options.learning is not None and options.learning.rounding,
    )


def _statistics(
    graph: TorchGraph, dataset: Dataset, tensors: Sequence[str], equalized: Collection[str]
) -> tuple[dict[str, ChannelStats], dict[str, Float64Array]]:
    """Return the statistics of tensors over all images, and a ratio of ranges per channel.

    The ratio is the range without the judging images / the range with them, (C,), at most 1.
    """
    others, judges = parts(dataset)
    without = collect_channels(graph, others, tensors)
    alone = collect_channels(graph, judges, tensors)
    share = judges.length / dataset.length
    stats = {name: without[name].merged(alone[name], share) for name in tensors}
    shares = {}
    for name, channels in stats.items():
        smaller, whole = (
            range_of_channels(part) if name in equalized else np.full(len(part), part.max())
            for part in (without[name].maximum, channels.maximum)
        )
        shares[name] = np.divide(smaller, whole, out=np.ones(len(whole)), where=whole > 0)
    return stats, shares


def _can_have_full_range(net: Net, placement: Placement) -> list[str]:
    return [
        activation.tensor
        for activation in placement.activations
        if full_range_obstacle(net, placement, activation.tensor) is None
    ]


def _split_as_asked(
    net: Net, layers: Collection[str], options: CalibrateOptions
) -> tuple[Skipped, ...]:
    """Split all layers that take the form of the options; return the others with their reasons."""
    form, grid = options.split_form, options.grids[1]
    if form == "none":
        return ()
    nodes = [node for node in weighted_nodes(net.graph) if node.name in layers]
    obstacles: dict[str, str] = {}
    if options.split_precision == "int8":
        reasons = {node.name: int8_obstacle(node, form, grid) for node in nodes}
        obstacles = {name: reason for name, reason in reasons.items() if reason is not None}
    forms = {node.name: form for node in nodes if node.name not in obstacles}
    obstacles |= {skip.node: skip.reason for skip in split_layers(net, forms, options)}
    return tuple(Skipped(node, obstacles[node]) for node in layers if node in obstacles)


def split_layers(
    net: Net, forms: Mapping[str, SplitForm], options: CalibrateOptions
) -> tuple[Skipped, ...]:
    """Split layers of a float net in place; return those that cannot be split, with the reason.

    Args:
        net: a float net.
        forms: layer -> form to split it into; "none" leaves it whole.
        options: the grid of weights and the precision of summands.
    """
    grid, precision = options.grids[1], options.split_precision

    def of(form: SplitForm) -> list[str]:
        return [layer for layer, chosen in forms.items() if chosen == form]

    scalar: SplitForm = "identity-scalar"
    reports = (
        split_identity(net, of("identity"), grid=grid, precision=precision),
        split_identity(net, of(scalar), grid=grid, form=scalar, precision=precision),
        split_coarse_fine(net, of("coarse-fine"), grid=grid, precision=precision),
    )
    return tuple(skip for report in reports for skip in report.skipped)


def torch_device(name: str) -> torch.device:
    """Return the device of a name, cpu or cuda.

    Raises:
        ConfigError: torch finds no CUDA device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"{option('device', 'cuda')}: torch finds no CUDA device; give "
            f"{option('device', 'cpu')}, or install a CUDA build of torch and a driver"
        )
    return torch.device(name)
