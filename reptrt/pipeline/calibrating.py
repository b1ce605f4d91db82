"""calibrate: from a float ONNX file and images to an INT8 file.

float net -> plan_net -> QuantPlan -> insert_qdq -> learn -> finish -> INT8 net
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from reptrt.core.artifacts import (
    ONNX_SUFFIXES,
    package_versions,
    refuse_overwriting,
    require_folder,
    require_suffix,
)
from reptrt.core.clock import Clock
from reptrt.core.notes import kept_notes
from reptrt.core.options_json import json_from_options
from reptrt.data.dataset import Dataset, Images, count_images, open_dataset
from reptrt.execute.runner import refuse_unrunnable
from reptrt.exporter.front_door import accept
from reptrt.graph.model import Model, blaming, label_of
from reptrt.graph.net import Net, refuse_not_finite
from reptrt.graph.plan import QuantPlan
from reptrt.graph.preprocess import read_preprocess
from reptrt.graph.qdq import insert_qdq
from reptrt.pipeline.float_layers import plan_with_float_layers
from reptrt.pipeline.image_shift import warn_of_other_images
from reptrt.pipeline.options import CalibrateOptions
from reptrt.pipeline.preparing import torch_device
from reptrt.pipeline.reports import CalibrateReport
from reptrt.pipeline.values import Calibrated, Origin, finished_model
from reptrt.quantize.reconstruct.driver import Quantized, reconstruct
from reptrt.quantize.reconstruct.options import LearnOptions, ReconstructReport
from reptrt.quantize.reconstruct.resume import Finished, remove_finished
from reptrt.quantize.targets.roofline import modelled_time
from reptrt.rewrite.contract import Skipped
from reptrt.rewrite.fold_affine import fold_affine
from reptrt.rewrite.fold_skip_scale import fold_skip_scale
from reptrt.rewrite.insert_affine import insert_affine
from reptrt.rewrite.recentre import recentre, round_scales
from reptrt.rewrite.round_biases import round_biases
from reptrt.rewrite.to_fp16 import log_left_fp32, to_fp16
from reptrt.rewrite.to_unsigned import to_unsigned

_LOG = logging.getLogger(__name__)


def calibrate(
    model: Path,
    images: Images,
    output: Path,
    options: CalibrateOptions,
    before_saving: Callable[[Calibrated], None] | None = None,
) -> CalibrateReport:
    """Quantize a float ONNX file and write the INT8 file with its sidecar.

    A learned calibration that was interrupted continues where it stopped.

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
    refuse_overwriting(output, [model, *([images] if isinstance(images, Path) else [])])
    require_suffix(output, ONNX_SUFFIXES, "a network")
    clock = Clock()
    with blaming(model), kept_notes() as notes:
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
    every = tuple(dict.fromkeys((*notes, *calibrated.report.notes)))
    return replace(calibrated.report, path=output, seconds=seconds, notes=every)


def float_model(model: Path | Model) -> Model:
    """Return a float model, read if it is a file, in the form that calibration expects.

    Raises:
        ArtifactError: the file cannot be read.
        ConfigError: `reptrt.exporter.front_door.accept` refuses it.
    """
    source = Model.read(model) if isinstance(model, Path) else model
    with kept_notes() as notes:
        proto = accept(source.proto, label_of(source))
    return Model(
        name=source.name,
        proto=proto,
        sha256=source.sha256,
        path=source.path,
        notes=(*source.notes, *notes),
    )


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
    size = limit or options.images
    return open_dataset(images, preprocess, limit=size, seed=options.seed, parameter="images")


def at_most_all(options: CalibrateOptions, images: Images) -> CalibrateOptions:
    """Return options that take all images if there are fewer than the options ask for.

    Raises:
        DataError: the images cannot be read.
    """
    total = count_images(images)
    return replace(options, images=total) if 0 < total < options.images else options


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
    with blaming(model), kept_notes() as notes:
        made = _calibrate(model, dataset, options, name or _name(model, options), resume)
    report = replace(made.report, notes=(*model.notes, *notes))
    return replace(made, report=report)


def _name(model: Model, options: CalibrateOptions) -> str:
    return f"{model.name.removesuffix('.onnx')} int8 {options.recipe}"


def _calibrate(
    model: Model, dataset: Dataset, options: CalibrateOptions, name: str, resume: Path | None
) -> Calibrated:
    clock = Clock()
    net = model.to_net()
    refuse_not_finite(net)
    warn_of_other_images(net, dataset, torch_device(options.device))
    planned, in_float = plan_with_float_layers(net, dataset, options, clock)
    net, plan = planned.net, planned.plan
    prepared, quantities = planned.prepared, planned.quantities
    for skip in prepared.left_whole:
        _LOG.info("%s is not split: %s", skip.node, skip.reason)
    insert_qdq(net, plan)
    parents = {model.name: model.sha256, Path(dataset.name).name: dataset.digest()}
    learned = None
    if (learning := options.learning) is not None:
        finished = _finished_units(resume, options, parents)
        learned, plan = _learn(net, planned.reference, plan, dataset, options, learning, finished)
        clock.lap("learn")
    left_fp32 = _finish(net, plan, options)
    proto, sha256 = finished_model(net)
    refuse_unrunnable(proto, name, model.proto)
    details = {
        "splits": [asdict(split) for split in prepared.splits],
        **({"costs": asdict(prepared.costs)} if options.costs or options.measure else {}),
        "left_fp32": [asdict(skip) for skip in left_fp32],
        **({} if in_float is None else {"in_float": asdict(in_float)}),
        **({"simulation": options.simulation} if options.simulation else {}),
    }
    clock.lap("finish")
    report = CalibrateReport(
        path=None,
        sha256=sha256,
        images=dataset.length,
        layers=len(quantities.placement.weights),
        excluded=prepared.placement.excluded,
        float_nodes=quantities.placement.float_nodes,
        in_float=in_float,
        dead=quantities.dead,
        idle=planned.idle,
        threshold=quantities.activations.rule,
        margin=quantities.activations.margin,
        tensors=quantities.activations.tensors,
        equalized=prepared.equalized,
        splits=prepared.splits,
        decisions=prepared.decisions,
        left_whole=prepared.left_whole,
        ranges=planned.ranges,
        overhead=prepared.overhead,
        extra_time=modelled_time(proto, options.runtime, batch=1).extra_share,
        learned=learned,
        simulation=options.simulation,
        seconds=clock.laps,
    )
    origin = Origin("int8-onnx", parents, json_from_options(options), details)
    return Calibrated(name=name, proto=proto, sha256=sha256, origin=origin, report=report)


def _finish(net: Net, plan: QuantPlan, options: CalibrateOptions) -> tuple[Skipped, ...]:
    """Bring a Q/DQ graph into the form that is written; return the nodes that FP16 cannot hold."""
    unsigned = options.runtime.unsigned
    if not unsigned:
        plan = round_scales(net, plan)
    round_biases(net)
    if not unsigned:
        recentre(net, plan)
    fold_skip_scale(net)
    if unsigned:
        to_unsigned(net)
    left_fp32 = to_fp16(net).skipped if options.high_precision == "fp16" else ()
    log_left_fp32(left_fp32)
    if options.simulation is not None:
        net.metadata["reptrt.simulation"] = options.simulation
    return left_fp32


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
    """Learn the constants of a Q/DQ graph; fold learned affines unless they are to be kept."""
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
