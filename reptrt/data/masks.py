"""Masks: a PNG for each image that holds the class of each of its pixels.

A mask has a palette or is greyscale; its values are classes from 0 up, `IGNORED` is none. It has
the name of its image with the suffix .png, and its size.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from reptrt.core.arrays import IntArray
from reptrt.core.errors import DataError
from reptrt.data.images import NAMED
from reptrt.graph.preprocess import Fit

IGNORED = 255  # of a pixel that is neither right nor wrong
_KEPT = 128  # masks in memory: networks that run side by side read the same ones
_MODES = ("1", "L", "P", "I", "I;16")
_FORM = f"expected a PNG with a palette or in grey that holds classes, {IGNORED} for none"


def find_masks(folder: Path, names: Sequence[str], fits: Sequence[Fit]) -> tuple[Path, ...]:
    """Return the mask of each image, without reading the pixels.

    Args:
        folder: of the masks; images in sub-folders have theirs in sub-folders of that name.
        names: of the images, relative to their folder.
        fits: of the images, with their sizes.

    Raises:
        DataError: masks are missing, are no PNG of classes, or have another size.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: not a folder; expected one with a PNG mask for each image")
    paths = tuple((folder / name).with_suffix(".png") for name in names)
    missing = [str(path.relative_to(folder)) for path in paths if not path.is_file()]
    if missing:
        more = ", ..." if len(missing) > NAMED else ""
        raise DataError(
            f"{folder}: {len(missing)} of {len(names)} images have no mask: expected "
            f"{', '.join(missing[:NAMED])}{more}"
        )
    for path, name, fit in zip(paths, names, fits, strict=True):
        with _opened(path) as image:
            width, height = image.size
        if (height, width) != (fit.image_height, fit.image_width):
            raise DataError(
                f"{path}: the mask is {height}x{width}, its image {name} "
                f"{fit.image_height}x{fit.image_width}; expected a class for each of its pixels"
            )
    return paths


@lru_cache(_KEPT)
def read_mask(path: Path, fit: Fit, height: int, width: int) -> IntArray:
    """Return the mask of an image as it lies in an input of (height, width).

    It is scaled as its image was, each pixel to the nearest, and moved; pixels beside the image are
    `IGNORED`.

    Raises:
        DataError: the file is damaged.
    """
    size = fit.scaled_width, fit.scaled_height
    try:
        with _opened(path) as image:
            scaled = image.resize(size, Image.Resampling.NEAREST)
    except (OSError, SyntaxError, ValueError) as err:
        raise DataError(f"{path}: cannot be read ({' '.join(str(err).split())}); {_FORM}") from err
    mask = np.full((height, width), IGNORED, dtype=np.int64)
    top, left = max(0, fit.top), max(0, fit.left)
    values = np.asarray(scaled, dtype=np.int64)[top - fit.top :, left - fit.left :]
    values = values[: height - top, : width - left]
    mask[top : top + values.shape[0], left : left + values.shape[1]] = values
    mask.flags.writeable = False
    return mask


def _opened(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
    except OSError as err:
        raise DataError(f"{path}: not an image; {_FORM}") from err
    if image.mode not in _MODES:
        image.close()
        raise DataError(f"{path}: holds pixels of type {image.mode}; {_FORM}")
    return image
