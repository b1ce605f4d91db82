"""``segment``: the first output says of each pixel what it belongs to.

It holds logits (N, C, h, w), or classes as integers (N, h, w) or (N, 1, h, w). Logits are enlarged
to the size of the network's input, bilinearly, with the middles of corner pixels half a pixel from
the border (``align_corners=False``); the class is that of the largest. Masks are brought to the
same size as the images are; see `reptrt.data.masks`.

A single map of numbers (N, 1, h, w) is that of class 1: a pixel belongs to it if its logit is above
0, or its probability above 1/2 where all numbers of the first images lie in 0..1.

Over all pixels of all images that have a class, with p pixels of class c in the masks, q pixels
that the network gives c, and n of both:

    IoU of c = n / (p + q - n)        mIoU = mean of the IoU of the classes that exist (p + q > 0)

The agreement with a reference is the fraction of pixels with the same class, where the output has
pixels of its own: h x w, without the border of a letterbox.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from reptrt.core.arrays import AnyArray, Float32Array, IntArray
from reptrt.core.errors import ArtifactError, ConfigError, DataError, option
from reptrt.data.dataset import Dataset, Images
from reptrt.data.masks import IGNORED, find_masks, read_mask
from reptrt.judge.options import TaskOptions
from reptrt.judge.outputs import Outputs, first_of
from reptrt.judge.tasks.protocol import Column, Measures, hundredths, percent

_FASTEST = 1  # level of zlib


@dataclass(frozen=True, slots=True)
class Pixels:
    """The classes of all pixels, and how well they fit the masks."""

    measures: Measures  # miou, pixel_accuracy, class_iou; None without masks
    maps: tuple[bytes, ...]  # of each image: uint16 classes where the output has pixels, compressed
    rows: Mapping[str, Measures] = field(default_factory=dict)


class _Tally:
    """Classes and their confusion, batch by batch."""

    def __init__(self, name: str, dataset: Dataset, masks: tuple[Path, ...] | None) -> None:
        self._name = name
        self._dataset = dataset
        self._masks = masks
        self._confusion: IntArray = np.zeros((0, 0), dtype=np.int64)  # [mask, network]: pixels
        self._maps: list[bytes] = []
        self._least: float | None = None  # value of a single map above which class 1 begins

    def add(self, outputs: Outputs, reference: Outputs | None = None) -> None:
        for output in self._of_two_classes(_scores_or_classes(self._name, first_of(outputs))):
            classes = output.argmax(axis=0) if output.ndim == 3 else output
            index = len(self._maps)
            own = self._without_border(classes, index).astype(np.uint16)
            self._maps.append(zlib.compress(own.tobytes(), _FASTEST))
            if self._masks is not None:
                self._count(output, self._masks[index], index)

    def findings(self) -> Pixels:
        measures = _measures(self._confusion) if self._masks is not None else _unknown()
        return Pixels(measures, tuple(self._maps))

    def kept(self) -> dict[str, AnyArray]:
        return {
            "maps": np.frombuffer(b"".join(self._maps), np.uint8),
            "sizes": np.array([len(of) for of in self._maps], np.int64),
            "confusion": self._confusion,
            "least": np.array(np.nan if self._least is None else self._least),
        }

    def add_kept(self, kept: Mapping[str, AnyArray]) -> None:
        least = None if np.isnan(kept["least"]) else float(kept["least"])
        if self._maps and least != self._least:
            raise ArtifactError(
                f"{self._name}: its values are probabilities on some images and not on others; "
                "judge all images in one part"
            )
        self._least = least
        parts = np.split(kept["maps"], np.cumsum(kept["sizes"])[:-1])
        self._maps += [part.tobytes() for part in parts]
        self._add_confusion(kept["confusion"])

    def _add_confusion(self, found: IntArray) -> None:
        larger, smaller = sorted((self._confusion, found), key=len, reverse=True)
        self._confusion = larger.copy()
        self._confusion[: len(smaller), : len(smaller)] += smaller

    def _of_two_classes(self, output: AnyArray) -> AnyArray:
        """Return logits (N, 2, h, w) of a single map (N, 1, h, w), anything else as it is."""
        if output.ndim != 4 or output.shape[1] > 1:
            return output
        if self._least is None:
            is_probability = output.min(initial=1) >= 0 and output.max(initial=0) <= 1
            self._least = 0.5 if is_probability else 0.0
        return np.concatenate([np.full_like(output, self._least), output], axis=1)

    def _count(self, output: AnyArray, path: Path, index: int) -> None:
        preprocess, fits = self._dataset.preprocess, self._dataset.fits
        if fits is None:
            raise AssertionError("masks were found by the names of files, which have fits")
        size = preprocess.height, preprocess.width
        mask = read_mask(path, fits[index], *size)
        if output.ndim == 3:
            known, classes = len(output), enlarged(output, *size).argmax(axis=0)
            self._refuse_beyond(path, mask, known)
        else:
            classes = _nearest(output, *size)
            known = 1 + max(int(classes.max()), int(np.where(mask == IGNORED, 0, mask).max()))
        counted = mask != IGNORED
        pairs = mask[counted] * known + classes[counted]
        found = np.bincount(pairs, minlength=known * known).reshape(known, known)
        self._add_confusion(found)

    def _refuse_beyond(self, path: Path, mask: IntArray, known: int) -> None:
        beyond = mask[(mask >= known) & (mask != IGNORED)]
        if len(beyond):
            raise DataError(
                f"{path}: class {beyond.max()} in the mask, but {self._name} has {known} classes; "
                f"expected 0 to {known - 1}, or {IGNORED} for pixels without a class"
            )

    def _without_border(self, classes: AnyArray, index: int) -> AnyArray:
        """Return the part of the classes (h, w) whose middles lie on the picture."""
        if self._dataset.fits is None:
            return classes
        fit, preprocess = self._dataset.fits[index], self._dataset.preprocess
        middles = [
            (np.arange(count) + 0.5) * size / count
            for count, size in zip(
                classes.shape, (preprocess.height, preprocess.width), strict=True
            )
        ]
        rows = (middles[0] >= fit.top) & (middles[0] < fit.top + fit.scaled_height)
        columns = (middles[1] >= fit.left) & (middles[1] < fit.left + fit.scaled_width)
        return classes[np.ix_(rows, columns)]


class Segment:
    """Classes of pixels; see `reptrt.judge.tasks.protocol`."""

    columns = (
        Column("miou", "mIoU", hundredths),
        Column("pixel_accuracy", "pixels right", percent),
        Column("pixel_agreement", "pixels agreeing", percent),
    )
    ranked_by: tuple[str, ...] = ("miou", "pixel_agreement")

    def __init__(self, options: TaskOptions, images: Images) -> None:
        self._folder = options.annotations

    def tally(self, name: str, dataset: Dataset) -> _Tally:
        """Return an empty tally for a network.

        Raises:
            DataError: masks are missing, or do not fit the images.
        """
        if self._folder is None:
            return _Tally(name, dataset, None)
        if dataset.names is None or dataset.fits is None:
            raise DataError(
                f"{dataset.name}: arrays have no names by which their masks in {self._folder} "
                f"could be found; expected a folder of images, or no {option('annotations')}"
            )
        return _Tally(name, dataset, find_masks(self._folder, dataset.names, dataset.fits))

    def compare(self, reference: Pixels | None, findings: Pixels) -> Measures:
        """Return the fraction of pixels with the same class."""
        if reference is None or len(reference.maps) != len(findings.maps):
            return {"pixel_agreement": None}
        same = total = 0
        for pair in zip(reference.maps, findings.maps, strict=True):
            expected, got = (np.frombuffer(zlib.decompress(part), np.uint16) for part in pair)
            if len(expected) != len(got):
                return {"pixel_agreement": None}
            same += int((expected == got).sum())
            total += len(got)
        return {"pixel_agreement": same / total if total else None}


def enlarged(logits: Float32Array, height: int, width: int) -> Float32Array:
    """Return logits (C, h, w) at (C, height, width), bilinear as the module says."""
    rows, columns = (
        _weights(count, size) for count, size in zip(logits.shape[1:], (height, width), strict=True)
    )
    large: Float32Array = rows @ logits.astype(np.float32) @ columns.T
    return large


@lru_cache(16)
def _weights(count: int, size: int) -> Float32Array:
    """Return the weights (size, count) of ``count`` values in each of ``size`` between them."""
    at = np.clip((np.arange(size) + 0.5) * count / size - 0.5, 0, count - 1)
    weights: Float32Array = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(count))).astype("f")
    return weights


def _nearest(classes: AnyArray, height: int, width: int) -> IntArray:
    """Return classes (h, w) at (height, width)."""
    rows, columns = (
        (np.arange(size) * 2 + 1) * count // (2 * size)
        for count, size in zip(classes.shape, (height, width), strict=True)
    )
    return classes[np.ix_(rows, columns)].astype(np.int64)


def _scores_or_classes(name: str, output: AnyArray) -> AnyArray:
    """Return (N, C, h, w) of logits (or N, 1, h, w), or (N, h, w) of classes."""
    if np.issubdtype(output.dtype, np.integer):
        classes = output[:, 0] if output.ndim == 4 and output.shape[1] == 1 else output
        if classes.ndim == 3 and classes.min(initial=0) >= 0:
            return classes
    elif output.ndim == 4 and output.shape[1] > 0:
        return output
    raise ConfigError(
        f"{name}: the first output is {output.dtype} {output.shape}; expected logits (N, C, h, w), "
        f"or classes (N, h, w) as integers from 0, for {option('task', 'segment')}"
    )


def _measures(confusion: IntArray) -> Measures:
    """Return mIoU, the fraction of pixels that are right, and the IoU of each class."""
    both = np.diagonal(confusion)
    either = confusion.sum(axis=0) + confusion.sum(axis=1) - both
    by_class = [n / total if total else None for n, total in zip(both, either, strict=True)]
    existing = [float(iou) for iou in by_class if iou is not None]
    if not existing:
        return _unknown()
    return {
        "miou": float(np.mean(existing)),
        "pixel_accuracy": float(both.sum() / confusion.sum()),
        "class_iou": [None if iou is None else float(iou) for iou in by_class],
    }


def _unknown() -> Measures:
    return {"miou": None, "pixel_accuracy": None, "class_iou": None}
