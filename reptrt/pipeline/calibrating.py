"""calibrate: a float ONNX file and images to an INT8 one."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reptrt.core.artifacts import package_versions, refuse_overwriting, require_folder
from reptrt.core.choices import Threshold
from reptrt.core.clock import Clock
from reptrt.core.grid import Grid, scale_from_amax
from reptrt.core.options_json import json_from_options
from reptrt.data.dataset import Dataset, Images, open_dataset
from reptrt.execute.runner import refuse_unrunnable
from reptrt.execute.torchgraph import TorchGraph
from reptrt.exporter.front_door import accept
from reptrt.graph.layers import add_to_bias
from reptrt.graph.model import Model, blaming, label_of
from reptrt.graph.net import Net, refuse_not_finite
from reptrt.graph.placement import Placement
from reptrt.graph.plan import QuantizedWeight, QuantPlan, plan_from_placement
from reptrt.graph.preprocess import read_preprocess
from reptrt.graph.qdq import insert_qdq, quantize_weights
from reptrt.graph.splits import read_splits
from reptrt.pipeline.options import CalibrateOptions
from reptrt.pipeline.preparing import Prepared, prepare, torch_device
from reptrt.pipeline.reports import CalibrateReport, TensorScale
from reptrt.pipeline.values import Calibrated, Origin, finished_model
from reptrt.quantize.calib.bias import bias_errors, deployed_weights
from reptrt.quantize.calib.collect import Statistics, collect, merge_groups
from reptrt.quantize.calib.histogram import NUM_BINS, Histogram
from reptrt.quantize.calib.options import ThresholdOptions
from reptrt.quantize.calib.outputs import Outputs, parts
from reptrt.quantize.calib.saturation import without_dead_values
from reptrt.quantize.calib.thresholds import amax_from_histogram
from reptrt.quantize.choose import full_range_of
from reptrt.quantize.reconstruct.driver import Quantized, reconstruct
from reptrt.quantize.reconstruct.options import LearnOptions, ReconstructReport
from reptrt.quantize.reconstruct.resume import Finished, remove_finished
from reptrt.rewrite.contract import Skipped
from reptrt.rewrite.fold_affine import fold_affine
from reptrt.rewrite.fold_skip_scale import fold_skip_scale
from reptrt.rewrite.insert_affine import insert_affine
from reptrt.rewrite.recentre import recentre, round_scales
from reptrt.rewrite.round_biases import round_biases
from reptrt.rewrite.to_fp16 import log_left_fp32, to_fp16

_LOG = logging.getLogger(__name__)

Float64Array = npt.NDArray[np.float64]

_REPORTED_BINS = 64  # more than half of them are used
_MERGED = NUM_BINS // _REPORTED_BINS
_WIDER = 2 ** (1 / 8)  # one step of the search for a margin
_WIDEST = 4.0  # where it ends


def calibrate(
    model: Path,
    images: Images,
    output: Path,
    options: CalibrateOptions,
    before_saving: Callable[[Calibrated], None] | None = None,
) -> CalibrateReport:
    """Quantize a float ONNX file and write the INT8 file with its sidecar.

    A learned calibration that was interrupted goes on where it stopped.

    Args:
        model: a float ONNX file.
        images: calibration images.
        output: the Q/DQ ONNX file to write.
        options: of calibration.
        before_saving: called with the result before the file is written, e.g. to diagnose it; if
            it raises, nothing is written.

    Raises:
        ReptrtError: the model or the images cannot be used; nothing is written.
    """
    require_folder(output)
    refuse_overwriting(output, [model])
    clock = Clock()
    with blaming(model):
        source = float_model(model)
        dataset = calibration_images(source, images, options)
    clock.lap("load")
    calibrated = calibrate_net(source, dataset, options, resume=output)
    if before_saving is not None:
        before_saving(calibrated)
    calibrated.save(output)
    if options.learning is not None:
        remove_finished(output)
    seconds = clock.laps | dict(calibrated.report.seconds)
    return replace(calibrated.report, path=output, seconds=seconds)


def float_model(model: Path | Model) -> Model:
    """Return a float model, read if it is a file, in the form that calibration expects.

    Raises:
        ArtifactError: the file cannot be read.
        ConfigError: `reptrt.exporter.front_door.accept` refuses it.
    """
    source = Model.read(model) if isinstance(model, Path) else model
    proto = accept(source.proto, label_of(source))
    return Model(name=source.name, proto=proto, sha256=source.sha256, path=source.path)


def calibration_images(
    model: Model, images: Images, options: CalibrateOptions, limit: int | None = None
) -> Dataset:
    """Return the sample of images that a model is calibrated on, prepared for it.

    Args:
        model: a float model, as `float_model` returns it.
        images: to sample from.
        options: the size of the sample and its seed.
        limit: the size of a smaller sample, which is part of the whole one.

    Raises:
        DataError: the images do not fit the model, or there are too few.
    """
    preprocess = read_preprocess(model.to_net())
    return open_dataset(images, preprocess, limit=limit or options.images, seed=options.seed)


def calibrate_net(
    model: Model,
    dataset: Dataset,
    options: CalibrateOptions,
    *,
    name: str | None = None,
    resume: Path | None = None,
) -> Calibrated:
    """Quantize a float model to INT8, with scales measured on images.

    Args:
        model: a float model, as `float_model` returns it; it is not changed.
        dataset: calibration images, prepared for the model; all are used.
        options: of calibration.
        name: of the result; None: that of the model, "int8" and the recipe.
        resume: where the result will be saved. Units that a learned calibration has finished are
            kept in a folder beside it, until `remove_finished`; those of an earlier calibration
            with equal model, images and options are taken up.

    Raises:
        ReptrtError: the model or the images cannot be used.
    """
    with blaming(model):
        return _calibrate(model, dataset, options, name or _name(model, options), resume)


def _name(model: Model, options: CalibrateOptions) -> str:
    return f"{model.name.removesuffix('.onnx')} int8 {options.recipe}"


def _calibrate(
    model: Model, dataset: Dataset, options: CalibrateOptions, name: str, resume: Path | None
) -> Calibrated:
    clock = Clock()
    net = model.to_net()
    refuse_not_finite(net)
    prepared = prepare(net, dataset, options)
    for skip in prepared.left_whole:
        _LOG.info("%s is not split: %s", skip.node, skip.reason)
    clock.lap("prepare")
    placement, full_range = prepared.placement, full_range_of(prepared.ranges)
    reference = net.copy()
    tensors, rule, margin, weights = _quantities(net, prepared, dataset, options, clock)
    scales = {tensor.tensor: tensor.scale for tensor in tensors}
    plan = plan_from_placement(placement, scales, weights, options.grids[0], full_range)
    insert_qdq(net, plan)
    parents = {model.name: model.sha256, Path(dataset.name).name: dataset.digest()}
    learned = None
    if (learning := options.learning) is not None:
        finished = _finished_units(resume, options, parents)
        learned, plan = _learn(net, reference, plan, dataset, options, learning, finished)
        clock.lap("learn")
    left_fp32 = _finish(net, plan, options)
    proto, sha256 = finished_model(net)
    refuse_unrunnable(proto, name, model.proto)
    details = {
        "splits": [asdict(split) for split in prepared.splits],
        "left_fp32": [asdict(skip) for skip in left_fp32],
        **({"simulation": options.simulation} if options.simulation else {}),
    }
    clock.lap("finish")
    report = CalibrateReport(
        path=None,
        sha256=sha256,
        images=dataset.length,
        layers=len(placement.weights),
        excluded=placement.excluded,
        float_nodes=placement.float_nodes,
        threshold=rule,
        margin=margin,
        tensors=tensors,
        equalized=prepared.equalized,
        splits=prepared.splits,
        decisions=prepared.decisions,
        left_whole=prepared.left_whole,
        ranges=prepared.ranges,
        overhead=prepared.overhead,
        learned=learned,
        simulation=options.simulation,
        seconds=clock.laps,
    )
    origin = Origin("int8-onnx", parents, json_from_options(options), details)
    return Calibrated(name=name, proto=proto, sha256=sha256, origin=origin, report=report)


def _finish(net: Net, plan: QuantPlan, options: CalibrateOptions) -> tuple[Skipped, ...]:
    """Bring a Q/DQ graph into the form that is written; return the nodes that FP16 cannot hold."""
    plan = round_scales(net, plan)
    round_biases(net)
    recentre(net, plan)
    fold_skip_scale(net)
    left_fp32 = to_fp16(net).skipped if options.high_precision == "fp16" else ()
    log_left_fp32(left_fp32)
    if options.simulation is not None:
        net.metadata["reptrt.simulation"] = options.simulation
    return left_fp32


def _quantities(
    net: Net, prepared: Prepared, dataset: Dataset, options: CalibrateOptions, clock: Clock
) -> tuple[tuple[TensorScale, ...], Threshold, float, dict[str, QuantizedWeight]]:
    """Return the scales of activations, by which rule and margin, and the codes of weights.

    The biases of ``net`` are corrected, if that is asked for and helps.
    """
    placement = prepared.placement
    with torch.inference_mode():
        graph = TorchGraph(net, torch_device(options.device))
        seen = _collect(graph, net, placement, dataset, options)
        clock.lap("collect")
        _, judges = parts(dataset)
        outputs = Outputs(graph, judges)
        histograms = without_dead_values(net, seen.histograms)
        chosen = _thresholds(net, prepared, histograms, outputs, options)
        clock.lap("thresholds")
        weights = quantize_weights(net, placement, options.grids[1])
        if options.correct_bias:
            _correct_biases(net, graph, seen.means, outputs, weights)
            clock.lap("biases")
    return *chosen, weights


def _collect(
    graph: TorchGraph, net: Net, placement: Placement, dataset: Dataset, options: CalibrateOptions
) -> Statistics:
    inputs = {node.name: node.inputs[0].name for node in net.graph.nodes if node.inputs}
    means = {inputs[weight.node] for weight in placement.weights} if options.correct_bias else ()
    return collect(graph, dataset, [a.tensor for a in placement.activations], means)


def _thresholds(
    net: Net,
    prepared: Prepared,
    histograms: Mapping[str, Histogram],
    outputs: Outputs,
    options: CalibrateOptions,
) -> tuple[tuple[TensorScale, ...], Threshold, float]:
    """Return the scales of all activations, the rule, and by how much they are wider than by it.

    Of auto: the rule that keeps the outputs nearest, then the margin that does, as long as they
    come nearer in steps of an eighth of an octave.
    """
    grid = options.grids[0]
    placement, full_range = prepared.placement, full_range_of(prepared.ranges)

    def error(tensors: tuple[TensorScale, ...]) -> float:
        """Of a net with quantized activations and float weights, ranges not the judges'."""
        trial = net.copy()
        scales = {tensor.tensor: tensor.scale for tensor in tensors}
        floats = replace(placement, weights=())
        insert_qdq(trial, plan_from_placement(floats, scales, {}, grid, full_range))
        limits = {
            tensor.tensor: _clamp(tensor.amax * prepared.without_judges[tensor.tensor])
            for tensor in tensors
            if tensor.tensor in prepared.without_judges
        }
        return outputs.error(TorchGraph(trial, torch_device(options.device)), overrides=limits)

    candidates = [
        (_tensor_scales(placement, histograms, rule, grid, full_range), rule.rule)
        for rule in options.threshold.candidates
    ]
    if len(candidates) == 1:
        return *candidates[0], 1.0
    errors = [error(tensors) for tensors, _ in candidates]
    least = min(errors)
    tensors, rule = candidates[errors.index(least)]
    margin, kept = 1.0, tensors
    while margin < _WIDEST:
        wider = tuple(tensor.widened(margin * _WIDER) for tensor in tensors)
        if (now := error(wider)) >= least:
            break
        margin, kept, least = margin * _WIDER, wider, now
    return kept, rule, margin


def _clamp(limits: Float64Array) -> Callable[[Tensor], Tensor]:
    """Return a function that clamps the channels of (N, C, ...) to limits (C,)."""

    def clamp(x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != len(limits):
            return x  # a net for one image that folds the batch
        limit = torch.from_numpy(limits).to(x).reshape(1, -1, *[1] * (x.dim() - 2))
        return torch.minimum(torch.maximum(x, -limit), limit)

    return clamp


def _tensor_scales(
    placement: Placement,
    histograms: Mapping[str, Histogram],
    threshold: ThresholdOptions,
    grid: Grid,
    full_range: Collection[str],
) -> tuple[TensorScale, ...]:
    groups = merge_groups(placement.activations, histograms)
    tensors = []
    for activation in placement.activations:
        histogram = histograms[activation.tensor]
        total = int(histogram.counts.sum()) + histogram.zeros
        codes = grid.full_range if activation.tensor in full_range else grid
        kept = amax_from_histogram(groups[activation.group], threshold, codes)
        tensors.append(
            TensorScale(
                tensor=activation.tensor,
                maximum=histogram.maximum,
                amax=kept,
                scale=float(scale_from_amax(kept, codes)),
                zeros=histogram.zeros / total,
                bins=_bins(histogram),
                bin_width=histogram.width * _MERGED,
            )
        )
    return tuple(tensors)


def _bins(histogram: Histogram) -> tuple[int, ...]:
    """Return the counts of neighbouring bins together, up to the largest value."""
    counts = histogram.counts.reshape(-1, _MERGED).sum(axis=1)
    last = np.flatnonzero(counts)
    return tuple(counts[: last[-1] + 1].tolist()) if len(last) else ()


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


def _finished_units(
    output: Path | None, options: CalibrateOptions, parents: Mapping[str, str]
) -> Finished:
    """Open what an interrupted calibration of the same file, images and options left behind."""
    key = {"options": json_from_options(options), "parents": dict(parents)}
    return Finished(output, key | {"versions": package_versions()})


def _learn(
    net: Net,
    reference: Net,
    plan: QuantPlan,
    dataset: Dataset,
    options: CalibrateOptions,
    learning: LearnOptions,
    finished: Finished,
) -> tuple[ReconstructReport, QuantPlan]:
    """Learn the constants of a Q/DQ graph; affines come and, unless kept, go."""
    if learning.affine:
        insert_affine(net)
    report, plan = reconstruct(
        Quantized(net, reference, plan, options.grids[1]),
        dataset,
        learning,
        device=torch_device(options.device),
        finished=finished,
    )
    if learning.affine and not options.keep_affine:
        _, plan = fold_affine(net, plan)
    return report, plan
