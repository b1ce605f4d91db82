"""The numbers of a calibration: scales of activations, codes of weights, corrected biases."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reptrt.core.arrays import Float64Array
from reptrt.core.clock import Clock
from reptrt.data.dataset import Dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.layers import add_to_bias
from reptrt.graph.net import Net
from reptrt.graph.placement import Placement, exactly, place
from reptrt.graph.plan import QuantizedWeight
from reptrt.graph.qdq import quantize_weights
from reptrt.graph.splits import read_splits
from reptrt.pipeline.activation_scales import ActivationScales, choose_scales
from reptrt.pipeline.dead import dead_tensors, refuse_dead_trunk
from reptrt.pipeline.options import CalibrateOptions
from reptrt.pipeline.preparing import Prepared, torch_device
from reptrt.quantize.calib.bias import bias_errors, deployed_weights
from reptrt.quantize.calib.collect import Statistics, collect, collect_kept
from reptrt.quantize.calib.outputs import Outputs
from reptrt.quantize.calib.saturation import renamed, with_needed
from reptrt.quantize.rounding.compensate import compensate
from reptrt.quantize.rounding.curvature import collect_curvature, layer_outputs

_LOG = logging.getLogger(__name__)

_CURVED = 128  # images whose gradients say how errors count: a sixth of the time of `fast`


@dataclass(frozen=True, slots=True, eq=False)
class Quantities:
    """What a quantized net computes with."""

    activations: ActivationScales
    weights: dict[str, QuantizedWeight]  # layer -> codes and scales
    placement: Placement  # where pairs go: not at dead tensors
    dead: tuple[str, ...]  # tensors that are 0 on all images


def quantities_of(
    net: Net, prepared: Prepared, dataset: Dataset, options: CalibrateOptions, clock: Clock
) -> Quantities:
    """Return the scales of activations and the codes of weights.

    Args:
        net: the prepared float net; its biases are corrected if that is asked for and helps.
        prepared: what was done to the net, and where pairs go.
        dataset: calibration images.
        options: of calibration.
        clock: laps "collect", "thresholds", "rounding" and "biases" are added.
    """
    with torch.inference_mode():
        graph = TorchGraph(net, torch_device(options.device))
        watched, needed = with_needed(net)
        watching = TorchGraph(watched, torch_device(options.device)) if needed else graph
        seen, placement, dead = _collect_alive(watching, net, prepared, dataset, options, needed)
        prepared = replace(prepared, placement=placement)
        clock.lap("collect")
        outputs = prepared.outputs
        activations = choose_scales(net, prepared, seen.histograms, outputs, options, needed)
        clock.lap("thresholds")
        weights = quantize_weights(net, placement, options.grids[1])
        if options.compensates:
            layers = [node for node in net.graph.nodes if node.name in weights]
            weights = compensate(
                net,
                graph,
                dataset,
                weights,
                options.grids[1],
                centred=options.parts.correct_bias,
                seed=options.seed,
                memory=int(options.memory_budget * 2**30) // 4,
                kept=prepared.kept,
                curvature=collect_curvature(
                    net,
                    dataset,
                    layer_outputs(layers),
                    images=_CURVED,
                    seed=options.seed,
                    device=torch_device(options.device),
                ),
            )
            clock.lap("rounding")
        prepared.kept.clear()
        if options.parts.correct_bias:
            _correct_biases(net, graph, seen.means, outputs, weights)
            clock.lap("biases")
    return Quantities(activations, weights, placement, dead)


def _collect_alive(
    graph: TorchGraph,
    net: Net,
    prepared: Prepared,
    dataset: Dataset,
    options: CalibrateOptions,
    needed: Mapping[str, str],
) -> tuple[Statistics, Placement, tuple[str, ...]]:
    """Collect statistics; take dead tensors, and the layers that read one, out of the placement.

    Layers that stay in float may let other tensors take a pair, so this may need further rounds.
    """
    placement = prepared.placement
    in_float = (exactly(placement.excluded), exactly(placement.float_nodes))
    seen = _collect(graph, net, prepared, dataset, options, needed)
    if seen.same_images:
        _LOG.warning("%s: all %d images are equal: ranges of one", dataset.name, dataset.length)
    dead: tuple[str, ...] = ()
    while found := dead_tensors(placement.activations, seen.histograms):
        dead = (*dead, *found)
        refuse_dead_trunk(net, dead, dataset.length)
        placement = place(net, *in_float, dead)
        new = {a.tensor for a in placement.activations} - seen.histograms.keys()
        if new:
            more = collect(graph, dataset, new)
            seen = replace(seen, histograms={**seen.histograms, **more.histograms})
    if dead:
        _LOG.warning("%s: 0 on all %d images: no scale", ", ".join(dead), dataset.length)
    return seen, placement, dead


def _collect(
    graph: TorchGraph,
    net: Net,
    prepared: Prepared,
    dataset: Dataset,
    options: CalibrateOptions,
    needed: Mapping[str, str],
) -> Statistics:
    """Collect what calibration needs; without a pass over the images if the values were kept.

    Splits into INT8 summands make tensors that were not there in the first pass.
    """
    placement, kept = prepared.placement, prepared.kept
    inputs = {node.name: node.inputs[0].name for node in net.graph.nodes if node.inputs}
    means = (
        {inputs[weight.node] for weight in placement.weights}
        if options.parts.correct_bias
        else set()
    )
    tensors = {needed.get(a.tensor, a.tensor) for a in placement.activations}
    if kept.holds(tensors | means):
        seen = collect_kept(kept, dataset, tensors, means)
    else:
        seen = collect(graph, dataset, tensors, means)
    return replace(seen, histograms=renamed(seen.histograms, needed))


def _correct_biases(
    net: Net,
    graph: TorchGraph,
    means: Mapping[str, Tensor],
    outputs: Outputs,
    weights: Mapping[str, QuantizedWeight],
) -> None:
    """Take the mean error of every quantized weight out of its layer's bias, if that helps.

    Args:
        net: changed.
        graph: the same net.
        means: E[x] of every layer's input.
        outputs: of the same net.
        weights: node name -> codes and scales.
    """
    errors = bias_errors(graph, means, weights)
    corrected = net.copy()
    _subtract(corrected, errors)
    deployed = deployed_weights(graph, weights)
    trial = TorchGraph(corrected, graph.placement.device)
    if outputs.error(trial, deployed) < outputs.error(graph, deployed):
        _subtract(net, errors)
    else:
        _LOG.info("biases stay as they are: correcting them does not help this net")


def _subtract(net: Net, errors: Mapping[str, Float64Array]) -> None:
    """Subtract errors from the biases of layers, of split ones from the part that has it."""
    nodes = {node.name: node for node in net.graph.nodes}
    holders = {split.side: split.main for split in read_splits(net)}
    for name, error in errors.items():
        add_to_bias(net, nodes[holders.get(name, name)], -error)
