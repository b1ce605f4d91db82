"""Image files -> uint8 pixels of one size, decoded on demand by a few threads.

Headers are read first: what is no image, or a folder of mixed sizes, is found before any work is
done. Orientation tags are ignored and transparency is dropped, as torchvision's folder loader does.
"""

import logging
import math
import os
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from reptrt.core.choices import Resize
from reptrt.core.errors import DataError, option
from reptrt.graph.preprocess import GREY, Preprocess, fit_of

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})
CACHE_BYTES = 512 << 20  # decoded pixels up to this size are kept for the next pass
MAX_THREADS = 16
THREADED_PIXELS = 128 * 128  # below this, threads only fight for the interpreter lock (measured)
_PARTS = {  # what folders of the parts of a data set are called
    *("train", "training", "val", "valid", "validation", "test", "testing", "eval", "dev"),
    *("calib", "calibration", "holdout"),
}
NAMED = 5  # files, or sizes, that a message names

_MODES = {1: "L", 3: "RGB"}  # channels -> PIL mode
_DEEP_MODES = ("I", "F")  # more than 8 bits a channel: PIL would clip the values to 255
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)

Pixels = npt.NDArray[np.uint8]
Size = tuple[int, int]  # height, width
Result = TypeVar("Result")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ImageList:
    """The images of a folder in a fixed order: by name, whatever order the file system has."""

    paths: tuple[Path, ...]
    labels: npt.NDArray[np.int64] | None  # (n,): index of the sorted class folder; None if flat
    num_classes: int | None = None  # number of class folders; None if flat


@dataclass(frozen=True, slots=True)
class _Damage:
    reason: str


def list_images(folder: Path) -> ImageList:
    """List a flat folder of images, or one with a sub-folder for each class.

    Names that start with a dot are skipped. Class folders are searched to any depth.

    Raises:
        DataError: no images, images both in the folder and in its sub-folders, or sub-folders that
            are the parts of a data set (train, test...).
    """
    entries = _visible(folder)
    classes = [path for path in entries if path.is_dir()]
    flat = tuple(path for path in entries if _is_image(path))
    below = [_images_below(path) for path in classes]
    nested = tuple(path for paths in below for path in paths)
    if flat and nested:
        raise DataError(
            f"{folder}: {len(flat)} images beside sub-folders with {len(nested)} images; expected "
            "images only, or one sub-folder for each class: move one of the two away"
        )
    if not flat and not nested:
        raise DataError(
            f"{folder}: no images found; expected files ending in "
            f"{' '.join(sorted(IMAGE_SUFFIXES))}, in the folder or in one sub-folder for each class"
        )
    if flat:
        return ImageList(flat, None)
    _refuse_parts(folder, [path for path, images in zip(classes, below, strict=True) if images])
    labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in below])
    return ImageList(nested, labels, len(classes))


def _refuse_parts(folder: Path, classes: Sequence[Path]) -> None:
    """Refuse sub-folders that are parts of a data set, each with class folders of its own.

    They are known by their names, or because all of them hold the same sub-folders. Neither is true
    of classes: a data set may have a class "train", but hardly a class "test" beside it.
    """
    parts = [path for path in classes if path.name.lower().rstrip("0123456789_-") in _PARTS]
    if len(parts) < 2:
        inside = [{path.name for path in _visible(part) if path.is_dir()} for part in classes]
        is_repeated = len(inside) > 1 < len(inside[0]) and all(d == inside[0] for d in inside)
        parts = list(classes) if is_repeated else []
    if parts:
        names = ", ".join(f"{path.name}/" for path in parts[:NAMED])
        raise DataError(
            f"{folder}: {names} are parts of a data set, not classes; give one of them, such as "
            f"{parts[0]}"
        )


class ImageFiles:
    """Image files, read as uint8 pixels; each is decoded once if all of them fit the cache.

    Args:
        folder: where the files are, for messages.
        paths: the files, in the order of the data set.
        preprocess: size, channels and resize rule.
        cache_bytes: the most memory for decoded pixels; above it every pass decodes again.

    Attributes:
        fits: where each image lies in the network's input; holds its original size.
        names: of each image, relative to the folder, with slashes.

    Raises:
        DataError: unreadable images, or sizes that ``preprocess`` does not allow.
    """

    def __init__(
        self,
        folder: Path,
        paths: Sequence[Path],
        preprocess: Preprocess,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if preprocess.channels not in _MODES:
            raise DataError(
                f"{folder}: image files have 1 or 3 channels, the net takes {preprocess.channels}; "
                f"give an .npz or .npy of arrays (N, C, H, W){_layout_hint(preprocess)}"
            )
        self._folder = folder
        self._paths = tuple(paths)
        self._mode = _MODES[preprocess.channels]
        self._shape = (preprocess.height, preprocess.width, preprocess.channels)
        sizes = _sizes(folder, self._paths)
        self._resize = _resize_for(folder, self._paths, sizes, preprocess)
        target = (preprocess.height, preprocess.width)
        self.fits = tuple(fit_of(self._resize, *size, *target) for size in sizes)
        self.names = tuple(path.relative_to(folder).as_posix() for path in self._paths)
        large = max(height * width for height, width in sizes) >= THREADED_PIXELS
        self._threads = min(MAX_THREADS, os.cpu_count() or 1) if large else 1
        fits = len(paths) * math.prod(self._shape) <= cache_bytes
        self._cache = np.empty((len(paths), *self._shape), np.uint8) if fits else None
        self._num_cached = 0

    def read(self, start: int, stop: int) -> Pixels:
        """Return images ``start`` to ``stop`` as a uint8 view (n, C, H, W), not to be changed.

        Raises:
            DataError: images that cannot be decoded, named and counted over the whole data set.
        """
        if self._cache is None:
            pixels = self._decoded(start, stop)
        else:
            if stop > self._num_cached:
                self._cache[self._num_cached : stop] = self._decoded(self._num_cached, stop)
                self._num_cached = stop
            pixels = self._cache[start:stop]
        channels_first: Pixels = pixels.transpose(0, 3, 1, 2)
        return channels_first

    def _decoded(self, start: int, stop: int) -> Pixels:
        """Return images ``start`` to ``stop`` as uint8 (n, H, W, C)."""
        images = _attempt_all(self._decode, self._paths[start:stop], self._threads)
        good = [image for image in images if not isinstance(image, _Damage)]
        if len(good) < len(images):
            everywhere = _attempt_all(self._verify, self._paths, self._threads)
            _refuse_damaged(self._folder, self._paths, everywhere)
        pixels: Pixels = np.stack(good)
        return pixels

    def _decode(self, path: Path) -> Pixels:
        """Return one image as uint8 (H, W, C)."""
        with Image.open(path) as opened:
            image = opened if opened.mode == self._mode else _converted(opened, self._mode)
            image = resized(image, self._shape[0], self._shape[1], self._resize)
            pixels: Pixels = np.frombuffer(image.tobytes(), np.uint8).reshape(self._shape)
            return pixels

    def _verify(self, path: Path) -> None:
        self._decode(path)


def _layout_hint(preprocess: Preprocess) -> str:
    if preprocess.width not in _MODES:
        return ""
    sizes = f"{preprocess.channels}, {preprocess.height}, {preprocess.width}"
    return (
        f"; if its input (N, {sizes}) is NHWC, export it with (N, C, H, W), or with a Transpose "
        "of the input alone in front"
    )


def resized(image: Image.Image, height: int, width: int, resize: Resize) -> Image.Image:
    """Return ``image`` at (height, width): bilinear with antialiasing, as Preprocess defines."""
    if resize == "none":
        return image
    fit = fit_of(resize, image.height, image.width, height, width)
    size = (fit.scaled_width, fit.scaled_height)
    scaled = image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)
    if size == (width, height):
        return scaled
    canvas = Image.new(scaled.mode, (width, height), (GREY,) * len(scaled.getbands()))
    canvas.paste(scaled, (fit.left, fit.top))
    return canvas


def _sizes(folder: Path, paths: Sequence[Path]) -> list[Size]:
    """Return the size of every image, from its header alone."""
    sizes = _attempt_all(_header_size, paths, threads=1)
    _refuse_damaged(folder, paths, sizes)
    return [size for size in sizes if not isinstance(size, _Damage)]


def _resize_for(
    folder: Path, paths: Sequence[Path], sizes: Sequence[Size], preprocess: Preprocess
) -> Resize:
    """Return what to do with these images; ``none`` may become a fit, see Preprocess."""
    counts = Counter(sizes)
    target = (preprocess.height, preprocess.width)
    if preprocess.resize != "none" or set(counts) == {target}:
        return preprocess.resize
    if len(counts) > 1:
        named = ", ".join(
            f"{_text(size)} ({count} images, e.g. {paths[sizes.index(size)].relative_to(folder)})"
            for size, count in counts.most_common(NAMED)
        )
        more = ", ..." if len(counts) > NAMED else ""
        raise DataError(
            f"{folder}: images of {len(counts)} sizes: {named}{more}; the net takes "
            f"{_text(target)} and does not resize: export it with {option('resize', 'crop')}, "
            f"{option('resize', 'stretch')} or {option('resize', 'letterbox')}"
        )
    height, width = next(iter(counts))
    fit: Resize = "stretch" if height * target[1] == width * target[0] else "crop"
    _log.warning(
        "%s: all images are %dx%d, the net takes %s: resizing them by '%s'",
        *(folder, height, width, _text(target), fit),
    )
    return fit


def _refuse_damaged(folder: Path, paths: Sequence[Path], results: Sequence[object]) -> None:
    """Raise one error that counts all damaged images and names the first."""
    pairs = zip(paths, results, strict=True)
    bad = [
        f"{path.relative_to(folder)} ({r.reason})" for path, r in pairs if isinstance(r, _Damage)
    ]
    if bad:
        raise DataError(
            f"{folder}: {len(bad)} of {len(paths)} images cannot be read: "
            f"{', '.join(bad[:NAMED])}{', ...' if len(bad) > NAMED else ''}; repair or remove them"
        )


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns when such an image goes straight to RGB
    return image.convert(mode)


def _header_size(path: Path) -> Size:
    """Return (height, width) without decoding the pixels."""
    with Image.open(path) as image:
        if image.mode.startswith(_DEEP_MODES):
            raise ValueError(f"pixel type {image.mode}, expected 8 bits a channel")
        return image.height, image.width


def _attempt_all(
    read: Callable[[Path], Result], paths: Sequence[Path], threads: int
) -> list[Result | _Damage]:
    """Read every path, results in order; what fails gives a one-line reason instead."""

    def attempt(path: Path) -> Result | _Damage:
        try:
            return read(path)
        except UnidentifiedImageError:
            return _Damage("not an image" if path.stat().st_size else "empty file")
        except _DAMAGE as err:
            reason = getattr(err, "strerror", None) or str(err) or type(err).__name__
            return _Damage(" ".join(reason.split()))

    if threads == 1:
        return [attempt(path) for path in paths]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(attempt, paths))


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _images_below(folder: Path) -> list[Path]:
    paths: list[Path] = []
    for path in _visible(folder):
        if path.is_dir() and not path.is_symlink():  # a link could lead round in a circle
            paths += _images_below(path)
        elif _is_image(path):
            paths.append(path)
    return paths
