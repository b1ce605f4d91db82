"""Run a network on image files, and draw what it finds on them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from reptrt.core.arrays import FloatArray
from reptrt.core.errors import ConfigError, option
from reptrt.core.metrics import class_scores
from reptrt.core.progress import track
from reptrt.data.dataset import network_input
from reptrt.data.images import ImageFiles
from reptrt.data.labels import read_labels
from reptrt.execute.runner import Runner, open_runner
from reptrt.graph.detector_layouts import DetectorLayout, layout_of_outputs
from reptrt.graph.model import Network, is_engine, label_of, proto_of
from reptrt.graph.net import net_from_model
from reptrt.graph.preprocess import Fit, Preprocess, stored_preprocess
from reptrt.judge.detect.boxes import Detections
from reptrt.judge.detect.reader import Reader, reader_of
from reptrt.judge.evaluate import preprocess_of
from reptrt.judge.options import TaskOptions
from reptrt.judge.outputs import Outputs, first_of, run_batch
from reptrt.judge.predict.draw import Bar, Mark, draw_boxes, draw_classes
from reptrt.judge.predict.files import Listed, listed_images, pictures_of, write_picture
from reptrt.judge.predict.options import PredictOptions
from reptrt.judge.predict.report import Finding, Prediction, Predictions
from reptrt.trt.details import read_engine_record

_BATCH = 8  # images that are run at a time
_BEST = 5  # classes that a classifier names
_SUM_SLACK = 1e-2  # that probabilities may sum to something else than 1

Kind = Literal["classify", "detect"]


def predict(
    network: Network,
    images: Sequence[Path],
    output: Path | None = None,
    options: PredictOptions = PredictOptions(),
) -> Predictions:
    """Return what a network finds in images, and draw it on them.

    A detector's boxes are suppressed in each class and brought back from the network's input to the
    image. A classifier's five best classes are listed below the image, with their softmax.

    Args:
        network: an .onnx or .engine file, or a model in memory.
        images: files, and folders of files.
        output: the folder to draw into, or the file if there is one image; None: nothing is drawn.
        options: of the prediction.

    Raises:
        ConfigError: what the outputs mean is not known, or an option does not fit the network.
        DataError: an image does not exist or cannot be read.
        ArtifactError: the network cannot be used, or a picture cannot be written.
    """
    listed = listed_images(images)
    targets = None if output is None else pictures_of(listed, output)
    labels = None
    if options.labels is not None:
        labels = read_labels(options.labels, None, label_of(network))
    preprocess = _preprocess(network, options)
    with open_runner(
        network, runner=options.runner, threads=options.threads, device=options.device
    ) as runner:
        task = _task(label_of(network), _probe(runner, preprocess), labels, options)
        if task == "detect" and options.resize is None and _says_nothing(network):
            preprocess = replace(preprocess, resize="letterbox")
        files = ImageFiles(listed.folder, listed.paths, preprocess)
        finder = _Finder(label_of(network), task, labels, preprocess, options)
        found = _all_found(runner, files, listed, finder)
        predictions = [
            _drawn(path, items, None if targets is None else targets[index], task)
            for index, (path, items) in enumerate(found)
        ]
    return Predictions(label_of(network), task, tuple(predictions))


def _preprocess(network: Network, options: PredictOptions) -> Preprocess:
    if isinstance(network, Path) and is_engine(network):
        record = read_engine_record(network)
        if record is None or record.details.preprocess is None:
            raise ConfigError(
                f"{network}: how its images are prepared is unknown; expected {network.name}.json "
                "beside it, as reptrt build-engine writes it for a file of reptrt export"
            )
    preprocess = preprocess_of(network)
    return preprocess if options.resize is None else replace(preprocess, resize=options.resize)


def _says_nothing(network: Network) -> bool:
    """Return whether a network does not say how its images are prepared."""
    return not is_engine(network) and stored_preprocess(net_from_model(proto_of(network))) is None


def _probe(runner: Runner, preprocess: Preprocess) -> Outputs:
    """Return the outputs for an image of zeros, whose shapes tell the task."""
    shape = (1, preprocess.channels, preprocess.height, preprocess.width)
    return run_batch(runner, network_input(np.zeros(shape, np.uint8), preprocess))


def _task(
    name: str, outputs: Outputs, labels: tuple[str, ...] | None, options: PredictOptions
) -> Kind:
    """Return the task of a network, and refuse labels that are too few or too many."""
    count = None if labels is None else len(labels)
    shapes = [("N", *value.shape[1:]) for value in outputs.values()]
    layout = layout_of_outputs(
        shapes, count, names=list(outputs), form=options.layout, boxes=options.boxes
    )
    scores = class_scores(first_of(outputs)) if len(outputs) == 1 else None
    if options.task == "detect" or (options.task == "auto" and isinstance(layout, DetectorLayout)):
        if isinstance(layout, str):
            raise ConfigError(f"{name}: {layout}")
        return "detect"
    if scores is None:
        if isinstance(layout, DetectorLayout):
            raise ConfigError(
                f"{name}: its outputs are those of a detector, {layout}; expected scores of "
                f"classes (N, C): leave out {option('task', 'classify')}"
            )
        raise ConfigError(f"{name}: {layout}, and not one output with scores of classes (N, C)")
    if count not in (None, scores.shape[1]):
        raise ConfigError(
            f"{option('labels')}: {options.labels} has {count} names, the net has "
            f"{scores.shape[1]} classes; give one name for each"
        )
    return "classify"


@dataclass(slots=True)
class _Finder:
    """Turns outputs into findings."""

    name: str
    task: Kind
    labels: tuple[str, ...] | None
    preprocess: Preprocess
    options: PredictOptions
    reader: Reader | None = field(default=None, init=False)  # made of the first outputs

    def find(self, outputs: Outputs, fits: Sequence[Fit]) -> Iterator[tuple[Finding, ...]]:
        """Yield the findings of each image."""
        if self.task == "classify":
            scores = class_scores(first_of(outputs))
            assert scores is not None  # as in the probe
            yield from (self._classes(row) for row in _probabilities(scores))
            return
        options = self.options
        detecting = TaskOptions(
            task="detect",
            layout=options.layout,
            boxes=options.boxes,
            confidence=options.confidence,
            iou=options.iou,
            max_boxes=options.max_boxes,
        )
        if self.reader is None:
            count = None if self.labels is None else len(self.labels)
            self.reader = reader_of(self.name, outputs, self.preprocess, detecting, count)
        all_found = self.reader.detections(outputs, detecting)
        for found, fit in zip(all_found, fits, strict=True):
            yield self._objects(found.in_image(fit, clip=True))

    def _classes(self, row: FloatArray) -> tuple[Finding, ...]:
        best = np.argsort(-row, kind="stable")[:_BEST]
        return tuple(Finding(int(i), self._label(int(i)), float(row[i]), None) for i in best)

    def _objects(self, found: Detections) -> tuple[Finding, ...]:
        objects = []
        for box, score, index in zip(found.boxes, found.scores, found.classes, strict=True):
            x1, y1, x2, y2 = map(float, box)
            kind = int(index)
            objects.append(Finding(kind, self._label(kind), float(score), (x1, y1, x2, y2)))
        return tuple(objects)

    def _label(self, index: int) -> str:
        if self.labels is None or not 0 <= index < len(self.labels):
            return f"class {index}"
        return self.labels[index]


def _probabilities(scores: FloatArray) -> FloatArray:
    """Return the softmax of scores (n, C), unless they are probabilities already."""
    sums = scores.sum(axis=1)
    if scores.min() >= 0 and np.abs(sums - 1).max() < _SUM_SLACK:
        return scores
    powers = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    softmax: FloatArray = powers / powers.sum(axis=1, keepdims=True)
    return softmax


def _all_found(
    runner: Runner, files: ImageFiles, listed: Listed, finder: _Finder
) -> Iterator[tuple[Path, tuple[Finding, ...]]]:
    """Yield each image with its findings."""
    starts = range(0, len(listed.paths), _BATCH)
    for start in track(iter(starts), len(starts), "predict"):
        stop = min(start + _BATCH, len(listed.paths))
        outputs = run_batch(runner, network_input(files.read(start, stop), finder.preprocess))
        found = finder.find(outputs, files.fits[start:stop])
        yield from zip(listed.paths[start:stop], found, strict=True)


def _drawn(path: Path, found: tuple[Finding, ...], target: Path | None, task: Kind) -> Prediction:
    """Draw the findings of one image, if there is where to."""
    if target is not None:
        with Image.open(path) as image:
            if task == "detect":
                marks = [
                    Mark(item.box, f"{item.label} {item.score:.2f}", item.index)
                    for item in found
                    if item.box is not None
                ]
                picture = draw_boxes(image, marks)
            else:
                bars = [
                    Bar(f"{item.label}  {100 * item.score:.1f} %", item.score, item.index)
                    for item in found
                ]
                picture = draw_classes(image, bars)
        write_picture(picture, target)
    return Prediction(path, found, target)
