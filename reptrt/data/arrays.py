"""Images in arrays: read from .npz and .npy files, or handed over in memory."""

import logging
import tokenize
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from reptrt.core.arrays import AnyArray, IntArray
from reptrt.core.errors import DataError
from reptrt.data.objects import Objects
from reptrt.graph.preprocess import Preprocess

BLOCK = 256  # images at a time in passes over all of them; bounds their memory
_MARGIN = 0.05  # of the range of prepared pixels: floats this far beyond it are accepted
_BRIGHTEST = 255.0  # value of a pixel
_LARGEST = 20.0  # prepared floats are hardly ever larger; pixels 0..255 are
_BROKEN_FILE = (  # what numpy and zipfile raise on damaged bytes
    *(OSError, ValueError, EOFError, SyntaxError, OverflowError, MemoryError, NotImplementedError),
    *(tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Arrays:
    """Images in one array, with labels where they are known; not yet prepared for a network."""

    name: str  # what messages and sidecars call them: a path, or a parameter's name
    images: AnyArray  # (N, C, H, W), or (N, H, W, C) in memory: uint8 pixels, or ready floats
    labels: IntArray | None = None  # (N,), class indices
    objects: tuple[Objects, ...] | None = None  # of each image, boxes in pixels of the array

    def checked(self, preprocess: Preprocess) -> "Arrays":
        """Return the images as (N, C, H, W), as one network takes them.

        Raises:
            DataError: another shape, size or type than the network takes.
        """
        return replace(self, images=_checked_images(self.name, self.images, preprocess))


class ArrayImages:
    """A selection of an array (N, C, H, W).

    Raises:
        DataError: selected floats that are NaN or infinite.
    """

    def __init__(self, arrays: Arrays, taken: IntArray, preprocess: Preprocess) -> None:
        self._images = arrays.images
        self._taken = taken
        if arrays.images.dtype != np.uint8:
            self._check_floats(arrays.name, preprocess)

    def read(self, start: int, stop: int) -> AnyArray:
        """Return selected images ``start`` to ``stop``, (n, C, H, W)."""
        taken = self._taken[start:stop]
        if taken[-1] - taken[0] == len(taken) - 1:  # without a gap: a view will do
            return self._images[taken[0] : taken[-1] + 1]
        return self._images[taken]

    def _check_floats(self, name: str, preprocess: Preprocess) -> None:
        """Refuse NaN and infinity; warn of floats that do not look like a network's input."""
        bad: list[int] = []
        lowest, highest, whole = np.inf, -np.inf, True
        for start in range(0, len(self._taken), BLOCK):
            with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf and is refused
                block = self.read(start, start + BLOCK).astype(np.float32)
            finite = np.isfinite(block).reshape(len(block), -1).all(axis=1)
            bad += self._taken[start : start + BLOCK][~finite].tolist()
            if not bad:
                lowest = min(lowest, float(block.min(initial=np.inf)))
                highest = max(highest, float(block.max(initial=-np.inf)))
                whole = whole and bool((block == np.rint(block)).all())
        if bad:
            raise DataError(
                f"{name}: {len(bad)} of {len(self._taken)} images hold NaN or infinity in float32, "
                f"first at index {bad[0]}; remove them"
            )
        doubt = _doubt(lowest, highest, whole, preprocess)
        if doubt is not None:
            _LOG.warning("%s: %s", name, doubt)


def load_arrays(path: Path) -> Arrays:
    """Read an .npz (``x``, optional ``y``) or .npy; an .npy is mapped, not read.

    Raises:
        DataError: the file cannot be used.
    """
    if not path.exists():
        raise DataError(f"{path}: does not exist; expected a folder of images, an .npz or an .npy")
    if path.suffix.lower() not in (".npz", ".npy"):
        raise DataError(f"{path}: not usable as data; expected a folder of images, .npz or .npy")
    try:
        with path.open("rb") as stream:
            if stream.read(2) != b"PK":
                return Arrays(str(path), np.load(path, mmap_mode="r", allow_pickle=False))
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as members:
                arrays = {name: members[name] for name in ("x", "y") if name in members.files}
                names = ", ".join(members.files) or "nothing"
    except _BROKEN_FILE as err:
        reason = " ".join(str(err).split()) or type(err).__name__
        raise DataError(f"{path}: not a readable array file ({reason})") from err
    if "x" not in arrays:
        raise DataError(f"{path}: holds {names}; expected an array named x of shape (N, C, H, W)")
    labels = None
    if "y" in arrays:
        labels = checked_labels(f"{path}: y", arrays["y"], len(arrays["x"]))
    return Arrays(str(path), arrays["x"], labels)


def checked_labels(where: str, labels: AnyArray, num_images: int) -> IntArray:
    """Return labels as int64 class indices (N,).

    Raises:
        DataError: another shape, another type, or negative.
    """
    if labels.shape != (num_images,):
        raise DataError(
            f"{where} has shape {labels.shape}, expected ({num_images},): one class for each image"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min(initial=0) < 0:
        raise DataError(
            f"{where} is {labels.dtype} or negative, expected integer class indices from 0"
        )
    return labels.astype(np.int64)


def _checked_images(name: str, images: AnyArray, preprocess: Preprocess) -> AnyArray:
    size = (preprocess.channels, preprocess.height, preprocess.width)
    expected = f"expected (N, {', '.join(map(str, size))})"
    if preprocess.layout == "NHWC":
        expected += f" or NHWC (N, {', '.join(map(str, (*size[1:], size[0])))})"
    if images.ndim != 4:
        hint = "; one image is a batch of one: images[None]" if images.ndim == 3 else ""
        raise DataError(f"{name}: images have shape {images.shape}, {expected}{hint}")
    if len(images) == 0:
        raise DataError(f"{name}: got 0 images, expected at least 1")
    if images.shape[1:] == (*size[1:], size[0]) != size:
        images = images.transpose(0, 3, 1, 2)
    if images.shape[1] != preprocess.channels:
        raise DataError(
            f"{name}: {images.shape[1]} channels in an array {images.shape}, {expected}"
        )
    if images.shape[1:] != size:
        raise DataError(
            f"{name}: images have shape {images.shape}, {expected}; arrays are not resized"
        )
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise DataError(
            f"{name}: images are {images.dtype}, expected uint8 pixels or network-ready floats"
        )
    if preprocess.values == "bytes" and images.dtype != np.uint8:
        raise DataError(
            f"{name}: images are {images.dtype}, expected uint8: the input of the net is UINT8 and "
            "takes pixels 0..255"
        )
    return images


def _doubt(lowest: float, highest: float, whole: bool, preprocess: Preprocess) -> str | None:
    """Return why floats hardly are the input of a network; None if nothing speaks against it.

    Pixels p become (p / 255 - mean) / std, between (0 - mean) / std and (1 - mean) / std. Floats
    can be judged by that only where the network has a mean and std; a network without them may have
    been exported for images that somebody else normalizes.
    """
    mean, std = np.asarray(preprocess.mean), np.asarray(preprocess.std)
    low, high = float((-mean / std).min()), float(((1 - mean) / std).max())
    got = f"floats between {lowest:.3g} and {highest:.3g} are taken as the network's input as they "
    if preprocess.values == "pixels":
        if lowest < 0 or not 1 < highest <= _BRIGHTEST:
            return f"{got}are, but the net takes pixels 0..255 and scales them itself"
        return None
    if preprocess == Preprocess.plain(*(preprocess.channels, preprocess.height, preprocess.width)):
        if lowest >= 0 and highest > _LARGEST and whole:
            return f"{got}are, but look like pixels 0..255; pass those as uint8"
        return None
    prepared = f"pixels prepared as the network says lie between {low:.3g} and {high:.3g}"
    margin = _MARGIN * (high - low)
    if lowest < low - margin or highest > high + margin:
        return f"{got}are, but {prepared}; pass uint8 pixels, or floats prepared like them"
    if low < 0 <= lowest and highest <= 1:
        return (
            f"{got}are, but look like pixels / 255 without mean and std ({prepared}); pass uint8 "
            "pixels, or normalize them"
        )
    return None
