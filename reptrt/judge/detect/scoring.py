"""mAP of detections, as COCO defines it; faster-coco-eval computes it and is imported only here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reptrt.core.arrays import Float64Array, FloatArray
from reptrt.core.errors import MissingDependencyError
from reptrt.data.objects import Objects
from reptrt.judge.detect.bootstrap import Matches, resampled_map
from reptrt.judge.detect.boxes import Detections

_AREAS = ("all", "small", "medium", "large")
_EQUAL = 1e-9  # largest difference of our mean precision from the library's


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Average precision 0..1: mean over IoU 0.50, 0.55, ..., 0.95, recall and classes.

    None where there is nothing to find: no object of that class or size.
    """

    mean: float | None
    at_50: float | None  # IoU 0.50 alone
    at_75: float | None
    by_size: Mapping[str, float | None]  # small (below 32 x 32 pixels), medium, large (96 x 96)
    by_class: tuple[float | None, ...]
    # (C, 101): precision at IoU 0.50 where recall reaches 0, 0.01, ..., 1; -1: nothing to find
    curves: Float64Array
    matches: tuple[Matches, ...] | None  # of each class; None: the library does not show them


def score_detections(
    objects: Sequence[Objects],
    found: Sequence[Detections],
    num_classes: int,
    max_boxes: int,
) -> Scores:
    """Compare detections with the objects of the same images.

    Args:
        objects: what is to be found in each image.
        found: what was found in it, in the same order.
        num_classes: C; an object's class is 0 to C - 1.
        max_boxes: the most detections of a class and an image that count.

    Raises:
        MissingDependencyError: faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as err:
        raise MissingDependencyError(
            'mAP needs faster-coco-eval, which is not installed: pip install "reptrt[detect]"'
        ) from err
    truth = COCO(_truth(objects, num_classes))
    judge = COCOeval_faster(truth, truth.loadRes(_results(found)), "bbox", separate_eval=True)
    judge.params.maxDets = [max_boxes]
    judge.evaluate()
    judge.accumulate()
    precision = judge.eval["precision"][..., 0]  # (IoU, recall, class, area); -1: nothing to find
    names = list(judge.params.areaRngLbl)
    area = {name: precision[..., names.index(name)] for name in _AREAS}
    every = area["all"]
    mean = _mean(every)
    matches = _matches(judge, len(objects), num_classes)
    if matches is not None:
        ours = resampled_map(matches, np.ones((1, len(objects)), np.int64))[0]
        if mean is None or abs(ours - mean) > _EQUAL:
            matches = None
    return Scores(
        mean=mean,
        at_50=_mean(every[0]),
        at_75=_mean(every[5]),
        by_size={name: _mean(area[name]) for name in _AREAS[1:]},
        by_class=tuple(_mean(every[:, :, k]) for k in range(num_classes)),
        curves=np.asarray(every[0].T, np.float64),
        matches=matches,
    )


def _mean(precision: FloatArray) -> float | None:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else None


def _truth(objects: Sequence[Objects], num_classes: int) -> dict[str, Any]:
    """Return objects as COCO has them; ids start at 1, as 0 means "no match" to the library."""
    rows = [(image, index) for image, of in enumerate(objects) for index in range(len(of.boxes))]
    return {
        "images": [{"id": image + 1} for image in range(len(objects))],
        "categories": [{"id": k + 1, "name": str(k)} for k in range(num_classes)],
        "annotations": [
            {
                "id": number + 1,
                "image_id": image + 1,
                "category_id": int(objects[image].classes[index]) + 1,
                "bbox": _xywh(objects[image].boxes[index]),
                "area": float(objects[image].areas[index]),
                "iscrowd": int(objects[image].crowds[index]),
            }
            for number, (image, index) in enumerate(rows)
        ],
    }


def _results(found: Sequence[Detections]) -> list[dict[str, Any]]:
    return [
        {"image_id": image + 1, "category_id": int(k) + 1, "bbox": _xywh(box), "score": float(s)}
        for image, of in enumerate(found)
        for box, s, k in zip(of.boxes, of.scores, of.classes, strict=True)
    ]


def _xywh(box: Float64Array) -> list[float]:
    x1, y1, x2, y2 = box.tolist()
    return [x1, y1, x2 - x1, y2 - y1]


def _matches(judge: Any, num_images: int, num_classes: int) -> tuple[Matches, ...] | None:
    """Return which detections the library matched, of areas of all sizes, by class.

    The library keeps a result for each class, area and image, in this order, whose state, as pickle
    stores it, is: matches of detections (IoU x detections, 0: none), matches of objects, scores,
    whether objects and detections are ignored. `score_detections` checks them against the mAP.
    """
    try:
        stride = len(judge.params.areaRng) * num_images
        states = [
            [one.__getstate__() for one in judge._evalImgs_cpp[start : start + num_images]]
            for start in range(0, stride * num_classes, stride)
        ]
        num_ious = len(judge.params.iouThrs)
        return tuple(_matches_of(of_class, num_ious) for of_class in states)
    except (AttributeError, IndexError, TypeError, ValueError):  # another version of the library
        return None


def _matches_of(states: Sequence[Any], num_ious: int) -> Matches:
    """Return the matches of one class, from the states of all images."""
    hits = [np.array(state[0]).reshape(num_ious, -1) > 0 for state in states]
    ignored = [np.array(state[4], dtype=bool).reshape(num_ious, -1) for state in states]
    scores = [np.array(state[2], np.float64) for state in states]
    return Matches.of(
        scores=np.concatenate(scores),
        images=np.repeat(np.arange(len(states)), [len(of) for of in scores]),
        hits=np.concatenate(hits, axis=1),
        ignored=np.concatenate(ignored, axis=1),
        objects=np.array([np.count_nonzero(~np.array(s[3], dtype=bool)) for s in states]),
    )
