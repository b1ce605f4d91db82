"""``detect``: the outputs hold boxes and scores of classes; judged by mAP as COCO defines it.

    map, map50, map75                 mean over IoU 0.50 to 0.95; at IoU 0.50; at 0.75
    map_small, map_medium, map_large  objects below 32 x 32 pixels of the image, above 96 x 96
    classes                           name of the class -> its mAP
    map_change                        {"value", "low", "high"}: difference to the reference's mAP,
                                      and its 95 % interval over resampled images

All are fractions 0..1, and None where there are no such objects.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from reptrt.core.arrays import AnyArray, Float64Array
from reptrt.core.errors import ConfigError, DataError, option
from reptrt.data.arrays import Arrays
from reptrt.data.coco import Annotations, find_annotations, read_annotations
from reptrt.data.dataset import Dataset, Images
from reptrt.data.images import NAMED, list_images
from reptrt.data.objects import Objects
from reptrt.graph.preprocess import Fit, fit_of
from reptrt.judge.detect.bootstrap import draws, interval_of_change, resampled_map
from reptrt.judge.detect.boxes import Detections
from reptrt.judge.detect.reader import Reader, reader_of
from reptrt.judge.detect.scoring import Scores, score_detections
from reptrt.judge.options import TaskOptions
from reptrt.judge.outputs import Outputs
from reptrt.judge.tasks.protocol import Column, Measures, change_text, hundredths

_LOG = logging.getLogger(__name__)
_SIZES = ("small", "medium", "large")


@dataclass(frozen=True, eq=False)  # no slots: of a cached property
class Found:
    """What a detector found in all images, and how good that is."""

    detections: tuple[Detections, ...]  # of each image, in pixels of the image
    objects: tuple[Objects, ...]
    class_names: tuple[str, ...]
    files: tuple[str, ...]  # of the images, below their folder
    scores: Scores

    @property
    def measures(self) -> Measures:
        """The JSON fields of the task."""
        scores = self.scores
        return {
            "map": scores.mean,
            "map50": scores.at_50,
            "map75": scores.at_75,
            **{f"map_{size}": scores.by_size[size] for size in _SIZES},
            "classes": dict(zip(self.class_names, scores.by_class, strict=True)),
        }

    @property
    def rows(self) -> Mapping[str, Measures]:
        """A row for each class."""
        names = zip(self.class_names, self.scores.by_class, strict=True)
        return {name: {"map": mean} for name, mean in names} if len(self.class_names) > 1 else {}

    @cached_property
    def resampled(self) -> Float64Array | None:
        """The mAP of the resamples of `draws`; None if it cannot be computed."""
        if self.scores.matches is None:
            return None
        return resampled_map(self.scores.matches, draws(len(self.objects)))


class _Tally:
    """Detections, batch by batch."""

    def __init__(self, name: str, dataset: Dataset, truth: "_Truth", options: TaskOptions) -> None:
        self._name = name
        self._preprocess = dataset.preprocess
        self._truth = truth
        self._options = options
        self._fits = _fits(dataset)
        self._objects = truth.of(dataset)
        self._files = dataset.names or ()
        self._reader: Reader | None = None
        self._num_classes: int | None = None  # of the outputs; None: unknown
        self._detections: list[Detections] = []

    def add(self, outputs: Outputs, reference: Outputs | None = None) -> None:
        options = self._options
        if self._reader is None:
            names = self._truth.class_names
            known = None if names is None else len(names)
            self._reader = reader_of(self._name, outputs, self._preprocess, options, known)
            self._num_classes = self._reader.layout.num_classes
        for found in self._reader.detections(outputs, options):
            fit = self._fits[len(self._detections)]
            self._detections.append(found.in_image(fit, clip=options.clip))

    def findings(self) -> Found:
        names = self._truth.class_names or _numbered(self._name, self._objects, self._num_classes)
        scores = score_detections(
            self._objects, self._detections, len(names), self._options.max_boxes
        )
        return Found(tuple(self._detections), tuple(self._objects), names, self._files, scores)

    def kept(self) -> dict[str, AnyArray]:
        found = self._detections
        return {
            "counts": np.array([len(of.scores) for of in found], np.int64),
            "boxes": np.concatenate([of.boxes for of in found]),
            "scores": np.concatenate([of.scores for of in found]),
            "classes": np.concatenate([of.classes for of in found]),
            "num_classes": np.array(-1 if self._num_classes is None else self._num_classes),
        }

    def add_kept(self, kept: Mapping[str, AnyArray]) -> None:
        ends = np.cumsum(kept["counts"])[:-1]
        parts = (np.split(kept[name], ends) for name in ("boxes", "scores", "classes"))
        self._detections += [Detections(*of) for of in zip(*parts, strict=True)]
        number = int(kept["num_classes"])
        self._num_classes = None if number < 0 else number


class Detect:
    """Boxes and scores of classes; see `reptrt.judge.tasks.protocol`.

    Args:
        options: of the task.
        images: a folder of images, or images in memory with the objects in them.

    Raises:
        DataError: annotations are missing, cannot be used, or are those of other images.
    """

    columns = (
        Column("map", "mAP", hundredths),
        Column("map50", "AP50", hundredths),
        Column("map75", "AP75", hundredths),
        *(Column(f"map_{size}", size, hundredths) for size in _SIZES),
        Column("map_change", "change of mAP (95 %)", change_text),
    )
    ranked_by: tuple[str, ...] = ("map",)

    def __init__(self, options: TaskOptions, images: Images) -> None:
        self._options = options
        self._truth = _Truth(images, options)

    def tally(self, name: str, dataset: Dataset) -> _Tally:
        """Return an empty tally for a network."""
        return _Tally(name, dataset, self._truth, self._options)

    def compare(self, reference: Found | None, findings: Found) -> Measures:
        """Return the change of mAP with its interval."""
        if reference is None or reference is findings:
            return {"map_change": None}
        means = reference.scores.mean, findings.scores.mean
        before, after = reference.resampled, findings.resampled
        if None in means or before is None or after is None:
            return {"map_change": None}
        value = (means[1] or 0.0) - (means[0] or 0.0)
        return {"map_change": asdict(interval_of_change(value, before, after))}


class _Truth:
    """The annotations of a folder of images, matched to its files; or those of images in memory.

    Attributes:
        class_names: None: the number of classes is that of the network.
    """

    class_names: tuple[str, ...] | None = None

    def __init__(self, images: Images, options: TaskOptions) -> None:
        path = options.annotations
        if isinstance(images, Arrays) and images.objects is not None:
            if path is not None:
                raise ConfigError(
                    f"{option('annotations')}: got {path} beside images with targets; give one"
                )
            return
        if not isinstance(images, Path) or not images.is_dir():
            what = images.name if isinstance(images, Arrays) else images
            raise DataError(
                f"{what}: has no annotations of boxes; expected a folder of images with a COCO "
                "json, or in memory a pair of images and a list with boxes and labels of each"
            )
        path = path or find_annotations(images)
        if path is None:
            raise DataError(
                f"{images}: no annotations found (instances_{images.resolve().name}.json beside "
                f"it); give a COCO json with {option('annotations')}"
            )
        self._annotations = read_annotations(path)
        files = [file.relative_to(images).as_posix() for file in list_images(images).paths]
        self._objects = _matched(images, files, self._annotations, options.subset)
        self.class_names = self._annotations.class_names

    def of(self, dataset: Dataset) -> list[Objects]:
        """Return the objects of each image of a data set.

        Raises:
            DataError: images have another size than the annotations say.
        """
        if dataset.objects is not None:
            return list(dataset.objects)
        objects = [self._objects[name] for name in dataset.names or ()]
        wrong = []
        for name, fit, of in zip(dataset.names or (), _fits(dataset), objects, strict=True):
            high, wide = of.size or (fit.image_height, fit.image_width)
            if (high, wide) != (fit.image_height, fit.image_width):
                is_size = f"{fit.image_width}x{fit.image_height}"
                wrong.append(f"{name} is {is_size}, annotated as {wide}x{high}")
        if wrong:
            raise DataError(
                f"{self._annotations.name}: {len(wrong)} of {len(objects)} images have another "
                f"size: {wrong[0]}; expected the annotations of these files"
            )
        if not any(len(of.boxes) for of in objects):
            raise DataError(
                f"{self._annotations.name}: no boxes in the {len(objects)} images of "
                f"{dataset.name}; there is nothing to judge by"
            )
        return objects


def _matched(
    folder: Path, files: Sequence[str], truth: Annotations, subset: bool
) -> dict[str, Objects]:
    """Return file -> its objects; matched by file_name, or by its last part where that is unique.

    Args:
        folder: of the images.
        files: its files.
        truth: the objects of all images.
        subset: whether it may have images that the folder does not have; they are logged.

    Raises:
        DataError: a file without annotations, or annotations without a file.
    """
    by_file: Mapping[str, Objects] = truth.by_file
    if not set(files) & set(by_file):  # the json may say val/1.jpg of a folder val, or ./1.jpg
        by_last = {PurePosixPath(name).name: of for name, of in by_file.items()}
        if len(by_last) == len(by_file):
            by_file = by_last
            last = [PurePosixPath(name).name for name in files]
            if len(set(last)) == len(last):
                by_file = {
                    name: by_last[short]
                    for name, short in zip(files, last, strict=True)
                    if short in by_last
                } | {k: of for k, of in by_last.items() if k not in last}
    if unknown := _missing(files, by_file):
        raise DataError(
            f"{unknown[0]} of {folder} have no entry in {truth.name}: {unknown[1]}; expected one "
            "entry for each file, with its file_name"
        )
    if absent := _missing(by_file, files):
        if not subset:
            raise DataError(
                f"{absent[0]} of {truth.name} are not in {folder}: {absent[1]}; expected a file "
                f"for each entry, or {option('subset', True)} to judge without them"
            )
        _LOG.warning("%s of %s are not in %s, and judge nothing", absent[0], truth.name, folder)
    return {name: by_file[name] for name in files}


def _missing(names: Collection[str], known: Collection[str]) -> tuple[str, str] | None:
    """Return "3 of 72 images" and the first names that are not known; None: all are."""
    known = set(known)
    missing = sorted(name for name in names if name not in known)
    if not missing:
        return None
    more = ", ..." if len(missing) > NAMED else ""
    return f"{len(missing)} of {len(names)} images", ", ".join(missing[:NAMED]) + more


def _fits(dataset: Dataset) -> tuple[Fit, ...]:
    if dataset.fits is not None:
        return dataset.fits
    size = (dataset.preprocess.height, dataset.preprocess.width)
    return (fit_of("none", *size, *size),) * dataset.length


def _numbered(name: str, objects: Sequence[Objects], num_classes: int | None) -> tuple[str, ...]:
    """Return names of classes that are known by their numbers alone.

    Args:
        name: of the network, for messages.
        objects: of all images.
        num_classes: of the network; None: its outputs do not tell.

    Raises:
        DataError: objects of classes that the network does not have.
    """
    largest = max((int(of.classes.max()) for of in objects if len(of.classes)), default=-1)
    if num_classes is not None and largest >= num_classes:
        raise DataError(
            f"{name}: label {largest} in the targets, but the net has {num_classes} classes; "
            f"expected 0 to {num_classes - 1} (subtract 1 if 0 is the background)"
        )
    return tuple(str(k) for k in range(num_classes or largest + 1))
