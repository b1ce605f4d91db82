"""evaluate, predict, bench, diagnose, rank_layers and inspect, as a program calls them."""

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from reptrt.api.networks import (
    NetworkLike,
    model_from,
    network_from,
    networks_from,
    path_from,
)
from reptrt.core.errors import ConfigError, option
from reptrt.core.keywords import checked, options_from, takes
from reptrt.data.from_user import images_from
from reptrt.graph.model import Network
from reptrt.judge import bench as benches
from reptrt.judge import evaluate as evaluation
from reptrt.judge.bench_report import BenchReport
from reptrt.judge.diagnose import diagnose as diagnose_network
from reptrt.judge.diagnose import ranking
from reptrt.judge.diagnose.ranking import Ranking
from reptrt.judge.diagnose.report import Diagnosis
from reptrt.judge.evaluate import EvalReport
from reptrt.judge.explain import explain_all
from reptrt.judge.options import BenchOptions, EvaluateOptions, RankOptions
from reptrt.judge.predict.options import PredictOptions
from reptrt.judge.predict.predicting import predict as predict_images
from reptrt.judge.predict.report import Predictions
from reptrt.pipeline import Calibrated, CalibrateOptions, at_most_all
from reptrt.trt.inspect import Inspection
from reptrt.trt.inspect import inspect as inspect_network


@takes(EvaluateOptions)
def evaluate(
    nets: NetworkLike | Iterable[NetworkLike],
    data: Any,
    *,
    reference: NetworkLike | None = None,
    options: EvaluateOptions | None = None,
    **changes: Any,
) -> EvalReport:
    """Judge networks on the same images: top-1 and top-5, agreement and SQNR with a reference.

    >>> reptrt.evaluate([net, int8], (images, labels))

    Args:
        nets: a network, or several: .onnx and .engine files, results of export and calibrate.
        data: held-out images, in the forms that `calibrate` takes. Labels come with them: a pair
            (images, labels), a loader that yields such pairs, an .npz with an array y, a folder
            with one sub-folder for each class. Without labels there is no top-1. For task detect:
            a folder of images with a COCO json (``annotations``), or a pair (images, targets) or a
            loader of them, with a dict of ``boxes`` (n, 4), x1 y1 x2 y2, and ``labels`` (n,), 0 to
            C - 1, for each image.
        reference: what the outputs are compared with; None: the first of several networks.
        options: the options as one value, in place of their defaults.
        **changes: single options.

    Raises:
        ReptrtError: a network or an image cannot be used, or outputs cannot be compared.
    """
    others = ("nets", "data", "reference")
    judging = options_from(EvaluateOptions, options, changes, others)
    networks = networks_from(nets, "nets")
    first = _first(networks, reference, judging.reference, "reference")
    images = images_from(
        data,
        limit=judging.limit,
        labels=judging.task == "classify",
        targets=judging.task == "detect",
        parameter="data",
    )
    return evaluation.evaluate(networks, images, judging, reference=first)


@takes(PredictOptions)
def predict(
    net: NetworkLike,
    images: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    options: PredictOptions | None = None,
    **changes: Any,
) -> Predictions:
    """Return what a network finds in image files, and draw it on them.

    >>> print(reptrt.predict(int8, "photos", "drawn", labels="names.txt"))

    Args:
        net: a detector or a classifier.
        images: the path of an image or of a folder of images, or several of them.
        output: the folder to draw into, or the picture of one image; None: nothing is drawn.
        options: the options as one value, in place of their defaults.
        **changes: single options.

    Raises:
        ReptrtError: the network, an image or an option cannot be used.
    """
    predicting = options_from(PredictOptions, options, changes, ("net", "images", "output"))
    paths = [images] if isinstance(images, str | os.PathLike) else images
    if not isinstance(paths, Iterable):
        raise ConfigError(f"{option('images')}: got {type(images).__name__}, expected paths")
    return predict_images(
        network_from(net, option("net")),
        [path_from(path, "images") for path in paths],
        None if output is None else path_from(output, "output"),
        predicting,
    )


@takes(BenchOptions)
def bench(
    nets: NetworkLike | Iterable[NetworkLike],
    *,
    baseline: NetworkLike | None = None,
    options: BenchOptions | None = None,
    **changes: Any,
) -> BenchReport:
    """Time networks side by side, and explain each that is not clearly faster than the baseline.

    >>> reptrt.bench([net, int8], batches=(1, 8))

    Args:
        nets: a network, or several: .onnx and .engine files, results of export and calibrate.
        baseline: what ratios refer to; None: the first of several networks.
        options: the options as one value, in place of their defaults.
        **changes: single options.

    Raises:
        ReptrtError: a network cannot be opened or fails, or cannot take a batch size.
    """
    timing = options_from(BenchOptions, options, changes, ("nets", "baseline"))
    networks = networks_from(nets, "nets")
    first = _first(networks, baseline, timing.baseline, "baseline")
    if first is not None and first not in networks:
        networks.insert(0, first)
    report = benches.bench(networks, timing, baseline=first)
    return replace(report, explanations=explain_all(report, networks))


def _first(
    networks: list[Network], asked: Any, in_options: Network | None, parameter: str
) -> Network | None:
    """Return what the others are compared with; None for a network alone."""
    if asked is not None:
        return network_from(asked, option(parameter))
    return in_options or (networks[0] if len(networks) > 1 else None)


@takes(CalibrateOptions)
def diagnose(
    net: NetworkLike,
    data: Any,
    *,
    calibrated: Calibrated | None = None,
    layer_images: int = 128,
    options: CalibrateOptions | None = None,
    **changes: Any,
) -> Diagnosis:
    """Measure where a float network loses accuracy in INT8, and what helps.

    Args:
        net: a fused float network.
        data: the calibration images, in the forms that `calibrate` takes.
        calibrated: what `calibrate` made of these arguments; None: it is done here.
        layer_images: on how many of the images the layers are measured.
        options: options of calibration as one value, in place of their defaults.
        **changes: single options of calibration.

    Raises:
        ReptrtError: the network, the images or an option cannot be used.
    """
    others = ("net", "data", "calibrated", "layer_images")
    calibrating = options_from(CalibrateOptions, options, changes, others)
    layer_images = checked("layer_images", layer_images, int)
    if calibrated is not None and not isinstance(calibrated, Calibrated):
        raise ConfigError(
            f"{option('calibrated')}: got {type(calibrated).__name__}, expected what "
            "reptrt.calibrate returns"
        )
    images = images_from(data, limit=calibrating.images, labels=False, parameter="data")
    if options is None and "images" not in changes:
        calibrating = at_most_all(calibrating, images)
    return diagnose_network(
        model_from(net, "net"), images, calibrating, calibrated, layer_images=layer_images
    )


@takes(RankOptions)
def rank_layers(
    net: NetworkLike,
    data: Any,
    eval_data: Any = None,
    *,
    options: RankOptions | None = None,
    **changes: Any,
) -> Ranking:
    """Rank the layers of a float network by what each costs alone in INT8.

    >>> reptrt.rank_layers(net, "calib", "val", task="detect")

    Args:
        net: a fused float network.
        data: the calibration images, in the forms that `calibrate` takes.
        eval_data: the images to judge on, with the labels or annotations that the task needs, in
            the forms that `evaluate` takes; None: the calibration images.
        options: the options as one value, in place of their defaults.
        **changes: single options, those of calibration included.

    Raises:
        ReptrtError: the network, the images or an option cannot be used.
    """
    ranks = options_from(RankOptions, options, changes, ("net", "data", "eval_data"))
    eval_data = data if eval_data is None else eval_data
    images = images_from(data, limit=ranks.calibrate.images, labels=False, parameter="data")
    if options is None and "images" not in changes:
        ranks = replace(ranks, calibrate=at_most_all(ranks.calibrate, images))
    judged = images_from(
        eval_data,
        limit=ranks.eval_limit,
        labels=ranks.task == "classify",
        targets=ranks.task == "detect",
        parameter="eval_data",
    )
    return ranking.rank_layers(model_from(net, "net"), judged, images, ranks)


def inspect(net: NetworkLike) -> Inspection:
    """Return the layers of a network or an engine, and the precision of each.

    An engine of tensorrt-rtx is read without a GPU, one of tensorrt on the GPU it was built for.

    Raises:
        ReptrtError: the file cannot be read, or the engine cannot be used on this machine.
    """
    return inspect_network(network_from(net, option("net")))
