"""What is done to a float graph before it is quantized: equalize, split, choose code ranges."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

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

Float64Array = npt.NDArray[np.float64]


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
    without_judges: Mapping[str, Float64Array]  # tensor -> by how much each channel's range would
    # be smaller without the images that judge, (C,), at most 1


def prepare(net: Net, dataset: Dataset, options: CalibrateOptions) -> Prepared:
    """Equalize and split a float net in place, as the options say; its output stays the same.

    Args:
        net: a float net.
        dataset: calibration images.
        options: of calibration.
    """
    net.graph.cleanup(remove_unused_graph_inputs=False)  # nodes that lead to no output
    placement = place(net, options.exclude, options.float_nodes)
    in_float = (exactly(placement.excluded), exactly(placement.float_nodes))
    layers = {
        node.name: node.inputs[0].name
        for node in weighted_nodes(net.graph)
        if node.name not in placement.excluded
    }
    linked = [link.tensor.name for link in find_links(net)[0]] if options.equalize else []
    stats: dict[str, ChannelStats] = {}
    shares: dict[str, Float64Array] = {}
    if options.equalize or options.split == "auto" or options.full_range or options.is_auto:
        quantized = (activation.tensor for activation in placement.activations)
        tensors = sorted({*layers.values(), *linked, *quantized})
        with torch.inference_mode():
            graph = TorchGraph(net, torch_device(options.device))
            stats, shares = _statistics(graph, dataset, tensors, linked)
    inputs = {layer: stats[name] for layer, name in layers.items() if name in stats}
    equalized = 0
    if options.equalize:
        report, grown = equalize(net, {name: channels.maximum for name, channels in stats.items()})
        equalized = len(report.changed)
        inputs = {
            layer: channels.scaled(grown[layer]) if layer in grown else channels
            for layer, channels in inputs.items()
        }
    choice = choose(
        net,
        inputs,
        _choose_options(options),
        _can_have_full_range(net, place(net, *in_float)) if options.full_range else (),
    )
    total = num_macs(net)
    if options.split == "auto":
        decisions = choice.splits
        split_layers(net, {decision.layer: decision.form for decision in decisions}, options)
        whole = [decision for decision in decisions if decision.form == "none"]
        left_whole = tuple(Skipped(decision.layer, decision.reason) for decision in whole)
    else:
        decisions = ()
        left_whole = _split_as_asked(net, layers, options)
    possible = set(_can_have_full_range(net, place(net, *in_float))) if choice.ranges else set()
    ranges = tuple(
        replace(decision, full=decision.full and decision.tensor in possible)
        for decision in choice.ranges
    )
    extra = replace(choice, ranges=ranges).extra_macs
    overhead = extra / total if total else 0.0
    placement = place(net, *in_float)
    return Prepared(
        equalized, read_splits(net), decisions, left_whole, ranges, overhead, placement, shares
    )


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
    """Return statistics over all images, and what part of the ranges is not the judges'."""
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
