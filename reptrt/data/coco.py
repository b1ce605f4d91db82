"""Annotations of objects in images: read from a COCO json."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reptrt.core.errors import DataError, option
from reptrt.data.objects import Objects

_BESIDE = ("instances_{}.json", "annotations/instances_{}.json", "{}.json")
_INSIDE = ("_annotations.coco.json", "annotations.json", "instances.json")
_LOG = logging.getLogger(__name__)
_SLACK = 1.0  # pixels that a box may reach beyond its image: rounding
_FORM = "expected a COCO json: an object with the lists images, annotations and categories"


@dataclass(frozen=True, slots=True, eq=False)
class Annotations:
    """The objects of all images."""

    name: str  # what messages call them: a path, or a parameter's name
    class_names: tuple[str, ...]  # of classes 0 to C - 1
    by_file: Mapping[str, Objects]  # file name, as the json has it -> objects


def find_annotations(folder: Path) -> Path | None:
    """Return the COCO json of a folder of images, from the usual names; None if there is none.

    Beside ``val/``: ``instances_val.json``, ``annotations/instances_val.json``, ``val.json``. In
    it: ``_annotations.coco.json``, ``annotations.json``, ``instances.json``.
    """
    place = folder.resolve()
    beside = [place.parent / pattern.format(place.name) for pattern in _BESIDE]
    inside = [place / name for name in _INSIDE]
    found = (path for path in (*beside, *inside) if path.is_file())
    return next(found, None)


def read_annotations(path: Path) -> Annotations:
    """Read a COCO json; category ids in rising order become classes 0 to C - 1.

    A category that groups others (their ``supercategory``) and has no boxes itself is no class:
    Roboflow writes one.

    Raises:
        DataError: the file is no COCO json, has no boxes, or boxes that cannot be right.
    """
    content = _content(path)
    images, entries, categories = (content[key] for key in ("images", "annotations", "categories"))
    if not images or not entries or not categories:
        empty = next(k for k in ("images", "annotations", "categories") if not content[k])
        raise DataError(f"{path}: holds no {empty}; there is nothing to judge by")
    try:
        sizes = {image["id"]: _size(image) for image in images}
        files = {image["id"]: str(image["file_name"]) for image in images}
        names = {category["id"]: str(category["name"]) for category in categories}
        sorted(names)  # ids of different kinds have no order: a TypeError here
    except (KeyError, TypeError, ValueError) as err:
        raise DataError(
            f"{path}: an image or a category has no {_reason(err)}; expected id, file_name, width "
            "and height of images, id and name of categories"
        ) from err
    _refuse_repeated(path, "images with the id", [image["id"] for image in images])
    _refuse_repeated(path, "images with the file_name", list(files.values()))
    _refuse_repeated(path, "categories with the id", [entry["id"] for entry in categories])
    for heading in _headings(categories, entries):
        del names[heading]
    class_of = {identity: index for index, identity in enumerate(sorted(names))}
    by_image: dict[Any, list[Mapping[str, Any]]] = {identity: [] for identity in files}
    for entry in entries:
        _check_entry(path, entry, by_image, class_of)
        by_image[entry["image_id"]].append(entry)
    _check_boxes(path, entries, sizes, files)
    objects = {
        files[identity]: _objects(entries_of_it, class_of, sizes[identity])
        for identity, entries_of_it in by_image.items()
    }
    return Annotations(str(path), tuple(names[identity] for identity in sorted(names)), objects)


def _content(path: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as err:
        raise DataError(f"{path}: does not exist; give {option('annotations')}") from err
    except (OSError, ValueError, RecursionError) as err:
        raise DataError(f"{path}: not readable as json ({' '.join(str(err).split())})") from err
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, {_FORM}")
    missing = [key for key in lists if not isinstance(content.get(key), list)]
    if missing:
        raise DataError(f"{path}: has no list {' and no list '.join(missing)}, {_FORM}")
    return content


def _size(image: Mapping[str, Any]) -> tuple[int, int] | None:
    if image.get("height") is None or image.get("width") is None:
        return None
    return int(image["height"]), int(image["width"])


def _refuse_repeated(path: Path, what: str, values: Sequence[Any]) -> None:
    seen: set[Any] = set()
    for value in values:
        if value in seen:
            raise DataError(f"{path}: two {what} {value!r}; expected each once")
        seen.add(value)


def _headings(categories: Sequence[Any], entries: Sequence[Any]) -> list[Any]:
    """Return the ids of categories that only group others."""
    used = [entry.get("category_id") for entry in entries if isinstance(entry, dict)]
    return [
        of["id"]
        for of in categories
        if of["id"] not in used
        and any(other.get("supercategory") == of["name"] for other in categories if other is not of)
    ]


def _check_entry(
    path: Path, entry: Any, by_image: Mapping[Any, Any], class_of: Mapping[Any, int]
) -> None:
    """Refuse an annotation that has no box, or belongs to no image or category."""
    where = f"{path}: annotation {entry.get('id', '?') if isinstance(entry, dict) else entry!r}"
    try:
        numbers = [float(value) for value in entry["bbox"]]
        image, category = entry["image_id"], entry["category_id"]
        known = image in by_image, category in class_of
    except (KeyError, TypeError, ValueError) as err:
        raise DataError(
            f"{where} has no {_reason(err)}; expected image_id, category_id and bbox: x, y, width, "
            "height"
        ) from err
    if len(numbers) != 4 or not all(math.isfinite(number) for number in numbers):
        raise DataError(f"{where}: bbox is {entry['bbox']}, expected x, y, width, height")
    if not known[0]:
        raise DataError(f"{where} is of image {image!r}, expected one of the list of images")
    if not known[1]:
        raise DataError(
            f"{where} is of category {category!r}, expected one of the list of categories: "
            f"{', '.join(map(str, sorted(class_of)))}"
        )


def _reason(err: Exception) -> str:
    return str(err.args[0]) if isinstance(err, KeyError) else "usable number"


def _check_boxes(
    path: Path,
    entries: Sequence[Mapping[str, Any]],
    sizes: Mapping[Any, tuple[int, int] | None],
    files: Mapping[Any, str],
) -> None:
    """Refuse boxes without area or outside; warn of boxes that reach beyond their images."""
    groups: dict[str, list[Mapping[str, Any]]] = {"no area": [], "outside": [], "beyond": []}
    for entry in entries:
        x, y, width, height = map(float, entry["bbox"])
        high, wide = sizes[entry["image_id"]] or (math.inf, math.inf)
        if width <= 0 or height <= 0:
            groups["no area"].append(entry)
        elif not (0 <= x + width / 2 <= wide and 0 <= y + height / 2 <= high):
            groups["outside"].append(entry)
        elif min(x, y) < -_SLACK or x + width > wide + _SLACK or y + height > high + _SLACK:
            groups["beyond"].append(entry)

    def described(kind: str, reason: str) -> str:
        first = groups[kind][0]
        size = sizes[first["image_id"]]
        of_size = "" if size is None else f" of {size[1]}x{size[0]}"
        return (
            f"{len(groups[kind])} of {len(entries)} boxes {reason}, first annotation "
            f"{first.get('id', '?')}: x, y, width, height {list(first['bbox'])} in "
            f"{files[first['image_id']]}{of_size}"
        )

    if groups["no area"]:
        raise DataError(
            f"{path}: {described('no area', 'have no width or no height')}; correct or remove them"
        )
    if groups["outside"]:
        raise DataError(
            f"{path}: {described('outside', 'have their centre outside the image')}; expected "
            "pixels of the image as it is in the file: correct or remove them"
        )
    if groups["beyond"]:
        reason = described("beyond", "reach beyond the image")
        _LOG.warning("%s: %s; they are judged as they are", path, reason)


def _objects(
    entries: Sequence[Mapping[str, Any]],
    class_of: Mapping[Any, int],
    size: tuple[int, int] | None,
) -> Objects:
    boxes = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
    areas = [entry.get("area") for entry in entries]
    products = boxes[:, 2] * boxes[:, 3]
    known = [p if area is None else area for area, p in zip(areas, products, strict=True)]
    boxes[:, 2:] += boxes[:, :2]
    return Objects(
        boxes,
        np.array([class_of[entry["category_id"]] for entry in entries], np.int64),
        np.array(known, np.float64),
        np.array([int(bool(entry.get("iscrowd", 0))) for entry in entries], np.int64),
        size,
    )
