"""Pictures with digits of scikit-learn on them, and their boxes: a small data set for detectors.

Nothing is downloaded. A picture is a background that numpy makes (a gradient, with clouds, stripes
or lines on it, and noise) with one to seven digits of any size, slant, colour and contrast. Every
picture follows from the seed of its set and its own number. The sets share no digit: ``train`` has
those that nets are trained and calibrated with, ``held_out`` the others.

A set is a folder of JPEG files with COCO annotations beside it, as detectors are usually fed::

    held_out/0000.jpg ...      instances_held_out.json
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from reptrt.core.artifacts import write_json
from reptrt.demo.digits import Digits, load_digits

SIZES = ((192, 256), (256, 192), (224, 224))  # height, width of the pictures
CLASSES = tuple("0123456789")
SEEDS = {"train": 0, "held_out": 1}
MOST_DIGITS = 7  # in a picture; the fewest are 1
_HEIGHTS = (36, 112)  # of a digit in pixels; uniform in the logarithm
_NARROWEST, _WIDEST = 0.85, 1.2  # width of a digit, by its natural width
_CONTRAST = (60, 160)  # grey levels between a digit and what is behind it
_SLANT = 15  # degrees to either side
_INK = 0.3  # a box encloses the pixels where a digit hides this part of the background, or more
_MAX_COVERED = 0.1  # part of the smaller of two boxes that the other may cover
_JPEG_QUALITY = 90

Plane = npt.NDArray[np.float64]  # (H, W), or (H, W, 3) of colours 0..255
Box = npt.NDArray[np.float64]  # (4,): x1, y1, x2, y2 in pixels


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture and the digits in it."""

    pixels: npt.NDArray[np.uint8]  # (H, W, 3)
    boxes: npt.NDArray[np.float64]  # (n, 4): x1, y1, x2, y2 in pixels; n > 0
    classes: npt.NDArray[np.int64]  # (n,): 0..9


def make_scene(digits: Digits, seed: int, index: int) -> Scene:
    """Return picture ``index`` of the set that these digits and this seed make."""
    rng = np.random.default_rng((seed, index))
    pixels = _background(rng, *SIZES[rng.integers(len(SIZES))])
    boxes: list[Box] = []
    classes: list[int] = []
    for _ in range(rng.integers(1, MOST_DIGITS, endpoint=True)):
        chosen = rng.integers(len(digits.x))
        ink = _written(rng, digits.x[chosen, 0])
        top, left = rng.integers(0, np.subtract(pixels.shape[:2], ink.shape), endpoint=True)
        box = _extent(ink) + np.array([left, top, left, top])
        if all(_covered(box, other) <= _MAX_COVERED for other in boxes):
            _write_over(rng, pixels[top : top + ink.shape[0], left : left + ink.shape[1]], ink)
            boxes.append(box)
            classes.append(int(digits.y[chosen]))
    pixels += rng.normal(0, rng.uniform(0, 8), pixels.shape)
    return Scene(_bytes(pixels), np.array(boxes), np.array(classes))


def write_sets(folder: Path, counts: Mapping[str, int]) -> Mapping[str, Path]:
    """Write so many pictures of ``train`` and ``held_out``; return the folders by name.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    split = load_digits()
    return {
        name: _write_set(folder / name, getattr(split, name), SEEDS[name], count)
        for name, count in counts.items()
    }


def annotations_of(folder: Path) -> Path:
    """Return the COCO file of a folder of pictures."""
    return folder.with_name(f"instances_{folder.name}.json")


def coco_from_scenes(files: Sequence[str], scenes: Sequence[Scene]) -> dict[str, Any]:
    """Return the annotations of pictures in COCO's form; digit d is category d + 1."""
    found = [
        (image, box.tolist(), int(digit))
        for image, scene in enumerate(scenes)
        for box, digit in zip(scene.boxes, scene.classes, strict=True)
    ]
    return {
        "images": [
            {
                "id": index,
                "file_name": file,
                "height": scene.pixels.shape[0],
                "width": scene.pixels.shape[1],
            }
            for index, (file, scene) in enumerate(zip(files, scenes, strict=True))
        ],
        "annotations": [
            {
                "id": index,
                "image_id": image,
                "category_id": digit + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
            }
            for index, (image, (x1, y1, x2, y2), digit) in enumerate(found, start=1)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
    }


def _write_set(folder: Path, digits: Digits, seed: int, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [make_scene(digits, seed, index) for index in range(count)]
    files = [f"{index:04d}.jpg" for index in range(count)]
    for file, scene in zip(files, scenes, strict=True):
        Image.fromarray(scene.pixels).save(folder / file, quality=_JPEG_QUALITY)
    write_json(annotations_of(folder), coco_from_scenes(files, scenes))
    return folder


def _background(rng: np.random.Generator, height: int, width: int) -> Plane:
    """Return a gradient between four colours, with one of the patterns on it, (H, W, 3)."""
    corners = rng.uniform(20, 235) + rng.uniform(-45, 45, (2, 2, 3))
    gradient = np.stack([_enlarged(corners[..., c], height, width) for c in range(3)], axis=2)
    pattern = (_clouds, _stripes, _lines)[rng.integers(3)](rng, height, width)
    colour = rng.normal(0, 1, 3) / 3 + rng.choice((-1, 1))
    pixels: Plane = gradient + rng.uniform(0, 40) * pattern[..., None] * colour
    return pixels


def _clouds(rng: np.random.Generator, height: int, width: int) -> Plane:
    """Return smooth noise of three sizes, about -1..1."""
    octaves = [
        _enlarged(rng.normal(0, 0.5, (cells, cells)), height, width) / (1 + octave)
        for octave, cells in enumerate((4, 12, 40))
    ]
    plane: Plane = np.sum(octaves, axis=0)
    return plane


def _stripes(rng: np.random.Generator, height: int, width: int) -> Plane:
    """Return one or two waves across each other, -1..1."""
    y, x = np.mgrid[:height, :width]
    waves = []
    for _ in range(rng.integers(1, 2, endpoint=True)):
        angle, period = rng.uniform(0, np.pi), rng.uniform(8, 60)
        along = (x * np.cos(angle) + y * np.sin(angle)) / period + rng.uniform()
        waves.append(np.sin(2 * np.pi * along))
    plane: Plane = np.mean(waves, axis=0)
    return plane


def _lines(rng: np.random.Generator, height: int, width: int) -> Plane:
    """Return strokes with soft edges, as wide as those of digits, 0..1."""
    y, x = np.mgrid[:height, :width]
    plane = np.zeros((height, width))
    for _ in range(rng.integers(2, 8)):
        angle, half_width = rng.uniform(0, np.pi), rng.uniform(1, 5)
        offset = (x - rng.uniform(0, width)) * np.cos(angle)
        offset += (y - rng.uniform(0, height)) * np.sin(angle)
        plane = np.maximum(plane, np.clip(half_width + 1 - np.abs(offset), 0, 1))
    return plane


def _written(rng: np.random.Generator, digit: npt.NDArray[np.uint8]) -> Plane:
    """Return a digit (8, 8) scaled and turned, with a border of one of its pixels: ink 0..1."""
    rows, columns = (np.flatnonzero(digit.any(axis=axis)) for axis in (1, 0))
    ink = np.pad(digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)
    step = np.exp(rng.uniform(*np.log(_HEIGHTS))) / (ink.shape[0] - 2)
    steps = step * rng.uniform(_NARROWEST, _WIDEST), step
    size = [round(cells * step) for cells, step in zip(ink.shape[::-1], steps, strict=True)]
    enlarged = Image.fromarray(ink).resize((size[0], size[1]), Image.Resampling.BICUBIC)
    turned = enlarged.rotate(
        rng.uniform(-_SLANT, _SLANT), Image.Resampling.BILINEAR, expand=True, fillcolor=0
    )
    plane: Plane = np.asarray(turned, dtype=np.float64)
    return plane / float(plane.max())


def _extent(ink: Plane) -> Box:
    """Return the box around the ink."""
    rows, columns = (np.flatnonzero((ink >= _INK).any(axis=axis)) for axis in (1, 0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float64)


def _write_over(rng: np.random.Generator, place: Plane, ink: Plane) -> None:
    """Blend ink of one colour, lighter or darker than the place (h, w, 3), into it."""
    behind = place.mean()
    contrast = rng.uniform(*_CONTRAST) * (1 if behind < rng.uniform(80, 175) else -1)
    colour = behind + contrast + rng.uniform(-25, 25, 3)
    place += ink[..., None] * (colour - place)


def _covered(one: Box, other: Box) -> float:
    """Return which part of the smaller box is in the other."""
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    areas = [float(np.prod(box[2:] - box[:2])) for box in (one, other)]
    return float(np.prod(np.maximum(sides, 0))) / min(areas)


def _enlarged(plane: Plane, height: int, width: int) -> Plane:
    image = Image.fromarray(plane.astype(np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)


def _bytes(pixels: Plane) -> npt.NDArray[np.uint8]:
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
