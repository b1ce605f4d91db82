"""Boxes with scores: what a detector finds in one image, after non-maximum suppression."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reptrt.core.arrays import Float64Array, FloatArray, IntArray
from reptrt.graph.preprocess import Fit

Flags = npt.NDArray[np.bool_]

_BLOCK = 256  # candidates that are compared at a time


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """The objects that were found in one image, the most certain first."""

    boxes: Float64Array  # (n, 4): x1 y1 x2 y2, in pixels
    scores: Float64Array  # (n,): 0 to 1, falling
    classes: IntArray  # (n,): 0 to C - 1

    def in_image(self, fit: Fit, *, clip: bool) -> "Detections":
        """Return detections in a network's input as those in the image."""
        boxes = fit.boxes_in_image(self.boxes)
        if clip:
            sides = [fit.image_width, fit.image_height]
            boxes = np.clip(boxes, 0.0, sides * 2)
        return Detections(boxes, self.scores, self.classes)


def suppress(
    boxes: FloatArray, scores: FloatArray, *, confidence: float, iou: float, max_boxes: int
) -> Detections:
    """Return the detections of one image: greedy non-maximum suppression in each class.

    Every pair of a box and a class with a score above ``confidence`` is a candidate. From the
    highest score on, a candidate is kept unless its IoU with a kept one of its class is above
    ``iou``. It ends after ``max_boxes`` of all classes. Candidates are compared in blocks with all
    that were kept, so that the cost is that of the part of the list that is looked at.

    Args:
        boxes: (A, 4), x1 y1 x2 y2.
        scores: (A, C), 0 to 1.
        confidence: lowest score, excluded.
        iou: largest overlap of two boxes of one class, included.
        max_boxes: most detections of the image.
    """
    rows, classes = np.nonzero(scores > confidence)
    order = np.argsort(-scores[rows, classes], kind="stable")
    rows, classes = rows[order], classes[order]
    candidates = boxes[rows].astype(np.float64)
    kept = np.empty(0, np.int64)
    for start in range(0, len(rows), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(rows)))
        block = block[~_covered(candidates, classes, block, kept, iou).any(axis=1)]
        overlaps = _covered(candidates, classes, block, block, iou)
        alive = np.ones(len(block), dtype=bool)
        chosen: list[int] = []
        for index in range(len(block)):
            if len(kept) + len(chosen) == max_boxes:
                break
            if alive[index]:
                chosen.append(index)
                alive &= ~overlaps[index]
        kept = np.concatenate([kept, block[chosen]])
        if len(kept) == max_boxes:
            break
    rows, classes = rows[kept], classes[kept]
    values = scores[rows, classes].astype(np.float64)
    return Detections(candidates[kept], values, classes.astype(np.int64))


def _overlap_more(a: Float64Array, b: Float64Array, iou: float) -> Flags:
    """Return which boxes (n, 4) overlap which boxes (m, 4) by more than ``iou``, as (n, m)."""
    width = np.minimum(a[:, None, 2], b[None, :, 2]) - np.maximum(a[:, None, 0], b[None, :, 0])
    height = np.minimum(a[:, None, 3], b[None, :, 3]) - np.maximum(a[:, None, 1], b[None, :, 1])
    np.maximum(width, 0.0, out=width)
    np.maximum(height, 0.0, out=height)
    shared = np.multiply(width, height, out=width)
    union = _areas(a)[:, None] + _areas(b)[None] - shared
    covered: Flags = shared > iou * union
    return covered


def _areas(boxes: Float64Array) -> Float64Array:
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0.0)
    areas: Float64Array = sides[:, 0] * sides[:, 1]
    return areas


def _covered(
    boxes: Float64Array, classes: IntArray, some: IntArray, others: IntArray, iou: float
) -> Flags:
    """Return which candidates overlap others of their class too much, (some, others)."""
    covered = _overlap_more(boxes[some], boxes[others], iou)
    covered &= classes[some][:, None] == classes[others][None]
    return covered
