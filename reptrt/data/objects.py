"""The objects in an image: what a detector has to find."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reptrt.core.arrays import AnyArray, Float64Array, IntArray
from reptrt.core.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """What is to be found in one image; boxes in pixels of the image as it was, not prepared."""

    boxes: Float64Array  # (n, 4): x1 y1 x2 y2
    classes: IntArray  # (n,): 0 to C - 1
    areas: Float64Array  # (n,): by which objects are small, medium or large; of a mask, if known
    crowds: IntArray  # (n,): 1 for a group of objects that is neither right nor wrong to find
    size: tuple[int, int] | None = None  # height and width of the image; None: not recorded


def objects_from_target(where: str, target: Mapping[str, Any]) -> Objects:
    """Return the objects of one image, as torchvision's detection data sets give them.

    Args:
        where: names the target in messages.
        target: ``boxes`` (n, 4), x1 y1 x2 y2 in pixels of the image, and ``labels`` (n,), classes 0
            to C - 1; ``area`` (n,) and ``iscrowd`` (n,) if known.

    Raises:
        DataError: something is missing, or has another shape.
    """
    missing = [key for key in ("boxes", "labels") if key not in target]
    if missing:
        names = ", ".join(map(str, target)) or "nothing"
        raise DataError(f"{where} has {names}, expected boxes (n, 4) and labels (n,)")
    boxes = np.asarray(_numpy(target["boxes"]), np.float64)
    boxes = boxes.reshape(-1, 4) if boxes.size == 0 else boxes
    labels = np.asarray(_numpy(target["labels"]))
    if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != (len(boxes),):
        raise DataError(
            f"{where}: boxes have shape {boxes.shape}, labels {labels.shape}; expected (n, 4) and "
            "(n,)"
        )
    sides = boxes[:, 2:] - boxes[:, :2]
    if not np.isfinite(boxes).all() or (sides <= 0).any():
        raise DataError(f"{where}: boxes without width or height, expected x1 y1 x2 y2")
    if labels.size and (not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0):
        raise DataError(f"{where}: labels are {labels.dtype} or negative, expected classes from 0")
    areas = _numpy(target["area"]) if "area" in target else sides[:, 0] * sides[:, 1]
    crowds = _numpy(target["iscrowd"]) if "iscrowd" in target else np.zeros(len(boxes))
    return Objects(
        boxes, labels.astype(np.int64), np.asarray(areas, np.float64), np.asarray(crowds, np.int64)
    )


def are_targets(value: Any) -> bool:
    """Return whether a value is a list of targets, one for each image."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    return is_list and all(isinstance(entry, Mapping) for entry in value)


def _numpy(value: Any) -> AnyArray:
    """Return a list, an array or a tensor, wherever it lies, as an array."""
    array: AnyArray = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    return array
