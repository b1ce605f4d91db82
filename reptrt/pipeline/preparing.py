"""Prepare a float graph for quantization: equalize, split, choose which tensors get full range."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from reptrt.core.arrays import Float64Array
from reptrt.core.choices import SplitForm
from reptrt.core.errors import ConfigError, option
from reptrt.data.dataset import Dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.made_for import record_target
from reptrt.graph.net import Net, weighted_nodes
from reptrt.graph.placement import Placement, exactly, place
from reptrt.graph.splits import Split, read_splits
from reptrt.pipeline.candidates import Candidate, Candidates, factors_of_tensors, scaled_stats
from reptrt.pipeline.measuring import measured_costs
from reptrt.pipeline.options import CalibrateOptions
from reptrt.pipeline.splitting import split_as_asked, split_layers
from reptrt.pipeline.trial import error_at_maxima
from reptrt.quantize.calib.channels import ChannelStats, collect_channels
from reptrt.quantize.calib.collect import Kept
from reptrt.quantize.calib.outputs import Outputs, least, parts
from reptrt.quantize.choose import (
    Decision,
    RangeDecision,
    full_range_of,
    keep_ends,
    num_macs,
    prices_of_ends,
    range_of_channels,
    splits_macs,
)
from reptrt.quantize.targets import Costs
from reptrt.rewrite.contract import Skipped
from reptrt.rewrite.equalize import equalize, find_streams
from reptrt.rewrite.insert_offsets import insert_offsets, remove_offsets
from reptrt.rewrite.recentre import full_range_obstacle, unsigned_obstacle


@dataclass(frozen=True, slots=True)
class Prepared:
    """What was done to a float graph before it was quantized."""

    equalized: int  # streams of tensors whose channels were scaled
    splits: tuple[Split, ...]
    decisions: tuple[Decision, ...]  # made where splits are chosen automatically
    left_whole: tuple[Skipped, ...]  # layers that are not split although a form was asked for
    ranges: tuple[RangeDecision, ...]  # of all activations that can take all codes
    overhead: float  # extra multiply-accumulates of all splits and full ranges, of the net's own
    placement: Placement  # where Q/DQ pairs go in the net as it is now
    # tensor -> range of each channel without the judging images / range with them, (C,), at most 1
    without_judges: Mapping[str, Float64Array]
    outputs: Outputs  # of the float net on the judging images
    kept: Kept  # values of tensors
    costs: Costs  # that the choice counted with


def prepare(net: Net, dataset: Dataset, options: CalibrateOptions) -> Prepared:
    """Equalize and split a float net in place, as the options say; its output stays the same.

    Args:
        net: a float net.
        dataset: calibration images.
        options: of calibration.
    """
    record_target(net, options.target)  # placement depends on it
    net.graph.cleanup(remove_unused_graph_inputs=False)  # nodes that lead to no output
    placement = place(net, options.exclude, options.float_patterns)
    # Rewrites name the parts of a layer after it: later placements match today's names exactly.
    in_float = (exactly(placement.excluded), exactly(placement.float_nodes))
    layers = {
        node.name: node.inputs[0].name
        for node in weighted_nodes(net.graph)
        if node.name not in placement.excluded
    }
    costs = measured_costs(net, layers, options) if options.measure else options.runtime.costs
    shifted = options.parts.full_range and not options.runtime.unsigned
    offsets = insert_offsets(net, placement) if shifted else ()
    form = options.split_form
    asked = dict.fromkeys(layers, form) if form != "none" else {}
    with torch.inference_mode():
        graph = TorchGraph(net, torch_device(options.device))
        kept = Kept(options.kept_bytes, dataset.length)
        outputs = Outputs(graph, parts(dataset)[1])
        stats, shares = _measure(graph, net, placement, layers, dataset, options, kept, outputs)
        possible = (
            _can_have_full_range(net, place(net, *in_float), options)
            if options.parts.full_range
            else []
        )
        candidates = Candidates(net, stats, layers, possible, asked, options, costs).all()

        def error(
            candidate: Candidate,
            most: float,
            ends: Sequence[str] = (),
            limits: Mapping[str, Float64Array] = shares,
        ) -> float:
            trial = net.copy()
            _apply(trial, candidate, asked, options)
            return error_at_maxima(
                trial,
                place(trial, (*in_float[0], *exactly(ends)), in_float[1]),
                scaled_stats(net, stats, candidate.factors),
                candidate.full_range,
                limits,
                outputs,
                options,
                most,
            )

        chosen = candidates[0] if len(candidates) == 1 else least(candidates, error)[0]
        if options.runtime.float_ends and stats:
            trial = net.copy()
            _apply(trial, chosen, asked, options)
            whole = {node.name for node in weighted_nodes(trial.graph)} & layers.keys()
            prices = prices_of_ends(trial, whole, costs, num_macs(net))
            no_limits = {name: np.ones_like(share) for name, share in shares.items()}
            ends = keep_ends(prices, lambda ends: error(chosen, math.inf, ends, no_limits))
            in_float = ((*in_float[0], *exactly(ends)), in_float[1])
    kept.factors = factors_of_tensors(net, chosen.factors)
    total = num_macs(net)
    left_whole = _apply(net, chosen, asked, options)
    placement = place(net, *in_float)  # of the net with its splits
    still_possible = _can_have_full_range(net, placement, options) if chosen.full_range else ()
    ranges = tuple(
        replace(decision, full=decision.full and decision.tensor in still_possible)
        for decision in chosen.choice.ranges
    )
    remove_offsets(net, offsets, full_range_of(ranges))
    extra = splits_macs(net, costs) + sum(
        decision.extra_macs for decision in ranges if decision.full
    )
    return Prepared(
        equalized=len(chosen.factors),
        splits=read_splits(net),
        decisions=chosen.choice.splits if options.parts.split == "auto" else (),
        left_whole=left_whole,
        ranges=ranges,
        overhead=extra / total if total else 0.0,
        placement=placement,
        without_judges=shares,
        outputs=outputs,
        kept=kept,
        costs=costs,
    )


def _apply(
    net: Net, chosen: Candidate, asked: Mapping[str, SplitForm], options: CalibrateOptions
) -> tuple[Skipped, ...]:
    """Equalize and split a net; return the layers that stay whole, with the reason."""
    equalize(net, find_streams(net)[0], chosen.factors)
    if options.parts.split != "auto":
        return split_as_asked(net, asked, options)
    split_layers(net, chosen.forms, options)
    whole = [decision for decision in chosen.choice.splits if decision.form == "none"]
    return tuple(Skipped(decision.layer, decision.reason) for decision in whole)


def _measure(
    graph: TorchGraph,
    net: Net,
    placement: Placement,
    layers: Mapping[str, str],
    dataset: Dataset,
    options: CalibrateOptions,
    kept: Kept,
    outputs: Outputs,
) -> tuple[dict[str, ChannelStats], dict[str, Float64Array]]:
    """Return what `_statistics` does, of every tensor that a decision needs; empty if none does."""
    parts = options.parts
    if not (parts.equalize or parts.split == "auto" or parts.full_range or options.is_auto):
        return {}, {}
    streams = find_streams(net)[0] if parts.equalize else ()
    equalized = {tensor for stream in streams for tensor in stream.tensors}
    quantized = (activation.tensor for activation in placement.activations)
    tensors = sorted({*layers.values(), *quantized})
    return _statistics(graph, dataset, tensors, equalized, kept, outputs)


def _statistics(
    graph: TorchGraph,
    dataset: Dataset,
    tensors: Sequence[str],
    equalized: Collection[str],
    kept: Kept,
    outputs: Outputs,
) -> tuple[dict[str, ChannelStats], dict[str, Float64Array]]:
    """Return the statistics of tensors over all images, and a ratio of ranges per channel.

    The ratio is the range without the judging images / the range with them, (C,), at most 1.
    """
    others, judges = parts(dataset)
    without = collect_channels(graph, others, tensors, kept)
    compared = dict.fromkeys(outputs.names, outputs.record)
    alone = collect_channels(graph, judges, tensors, kept, compared)
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


def _can_have_full_range(net: Net, placement: Placement, options: CalibrateOptions) -> list[str]:
    obstacle = unsigned_obstacle if options.runtime.unsigned else full_range_obstacle
    return [
        activation.tensor
        for activation in placement.activations
        if obstacle(net, placement, activation.tensor) is None
    ]


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
