"""Images as a network's input: a folder, or arrays in an .npz or .npy file.

A uint8 pixel p of channel c becomes (p / 255 - mean[c]) / std[c], computed in float32 in this order
(bit for bit what torchvision's ToTensor and Normalize give). Float arrays are the network's input
already and stay as they are.
"""

import hashlib
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from reptrt.core.errors import ConfigError, DataError
from reptrt.data.images import ImageFiles, list_images
from reptrt.graph.preprocess import Preprocess

AnyArray = npt.NDArray[Any]
Float32Array = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

_BLOCK = 256  # images at a time in passes over all of them; bounds their memory
_BROKEN_FILE = (  # what numpy and zipfile raise on damaged bytes
    *(OSError, ValueError, EOFError, SyntaxError, OverflowError, MemoryError, NotImplementedError),
    *(tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


class PixelSource(Protocol):
    """Where the images of a data set come from."""

    def read(self, start: int, stop: int) -> AnyArray:
        """Return images ``start`` to ``stop`` (n, C, H, W): uint8 pixels, or ready floats."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Images in a fixed order, prepared for one network; may be passed over many times."""

    path: Path
    length: int
    labels: IntArray | None  # (length,), read-only; None: the data has no labels
    preprocess: Preprocess
    source: PixelSource

    def batches(self, size: int) -> Iterator[Float32Array]:
        """Yield the images in order, float32 (n, C, H, W), ``size`` at a time, the last fewer.

        Raises:
            ConfigError: ``size`` is not positive.
            DataError: images that cannot be decoded, all named or counted.
        """
        if size < 1:
            raise ConfigError(f"batch size: got {size}, expected at least 1")
        for start in range(0, self.length, size):
            pixels = self.source.read(start, min(start + size, self.length))
            yield network_input(pixels, self.preprocess)

    def parted(self, stride: int) -> tuple["Dataset", "Dataset"]:
        """Return all images but every ``stride``-th, and those; the order stays.

        Raises:
            ConfigError: a part would be empty.
        """
        if not 1 < stride <= self.length:
            raise ConfigError(f"stride: got {stride}, expected 2 to {self.length}, the images")
        indices = np.arange(self.length)
        taken = indices % stride == stride - 1
        return self._selected(indices[~taken]), self._selected(indices[taken])

    def _selected(self, taken: IntArray) -> "Dataset":
        labels = None if self.labels is None else self.labels[taken]
        return replace(
            self, length=len(taken), labels=labels, source=SelectedImages(self.source, taken)
        )

    def digest(self) -> str:
        """Return the sha256 of all pixels in order, in hex: what the data set is, not its name."""
        digest = hashlib.sha256()
        for start in range(0, self.length, _BLOCK):
            pixels = self.source.read(start, min(start + _BLOCK, self.length))
            digest.update(np.ascontiguousarray(pixels).data)
        return digest.hexdigest()


def open_dataset(
    path: Path,
    preprocess: Preprocess,
    *,
    limit: int | None = None,
    seed: int = 0,
    labels: bool = False,
) -> Dataset:
    """Open a folder of images, or an .npz (``x``, optional ``y``) or .npy of arrays (N, C, H, W).

    Args:
        path: the folder or file. In a folder with class sub-folders the label of an image is the
            index of its sub-folder, sorted by name.
        preprocess: what the network takes.
        limit: how many images to take: a uniform random sample without replacement over all
            images, which depends on ``seed`` and the names alone; kept in order. None takes all.
        seed: of the sample.
        labels: whether labels are required.

    Raises:
        ConfigError: ``limit`` is not positive.
        DataError: the images cannot be used; the message says which and what to do.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"number of images: got {limit}, expected at least 1")
    if path.is_dir():
        listed = list_images(path)
        taken = _sample(path, len(listed.paths), limit, seed)
        source: PixelSource = ImageFiles(path, [listed.paths[i] for i in taken], preprocess)
        known = listed.labels
    else:
        images, known = _load_arrays(path)
        _check_images(path, images, preprocess)
        taken = _sample(path, len(images), limit, seed)
        source = ArrayImages(path, images, taken)
    if labels and known is None:
        raise DataError(
            f"{path}: no labels; expected one sub-folder for each class, or an .npz with an array y"
        )
    if known is not None:
        known = known[taken]
        known.flags.writeable = False
    return Dataset(path, len(taken), known, preprocess, source)


def network_input(pixels: AnyArray, preprocess: Preprocess) -> Float32Array:
    """Return (p / 255 - mean) / std of uint8 pixels (n, C, H, W) in float32; floats are kept."""
    values: Float32Array = pixels.astype(np.float32, order="C")
    if pixels.dtype == np.uint8:
        values /= np.float32(255.0)
        values -= np.asarray(preprocess.mean, np.float32)[:, None, None]
        values /= np.asarray(preprocess.std, np.float32)[:, None, None]
    return values


class SelectedImages:
    """Some images of a source, in its order."""

    def __init__(self, source: PixelSource, taken: IntArray) -> None:
        self._source = source
        self._taken = taken

    def read(self, start: int, stop: int) -> AnyArray:
        """Return selected images ``start`` to ``stop``, (n, C, H, W)."""
        taken = self._taken[start:stop]
        images: AnyArray = self._source.read(int(taken[0]), int(taken[-1]) + 1)
        selected: AnyArray = images[taken - taken[0]]
        return selected


class ArrayImages:
    """A selection of an array (N, C, H, W).

    Raises:
        DataError: selected floats that are NaN or infinite.
    """

    def __init__(self, path: Path, images: AnyArray, taken: IntArray) -> None:
        self._images = images
        self._taken = taken
        if images.dtype != np.uint8:
            self._refuse_nonfinite(path)

    def read(self, start: int, stop: int) -> AnyArray:
        """Return selected images ``start`` to ``stop``, (n, C, H, W)."""
        taken = self._taken[start:stop]
        if taken[-1] - taken[0] == len(taken) - 1:  # without a gap: a view will do
            return self._images[taken[0] : taken[-1] + 1]
        return self._images[taken]

    def _refuse_nonfinite(self, path: Path) -> None:
        bad: list[int] = []
        for start in range(0, len(self._taken), _BLOCK):
            with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf and is refused
                block = self.read(start, start + _BLOCK).astype(np.float32)
            finite = np.isfinite(block).reshape(len(block), -1).all(axis=1)
            bad += self._taken[start : start + _BLOCK][~finite].tolist()
        if bad:
            raise DataError(
                f"{path}: {len(bad)} of {len(self._taken)} images hold NaN or infinity in float32, "
                f"first at index {bad[0]}; remove them"
            )


def _sample(path: Path, total: int, limit: int | None, seed: int) -> IntArray:
    """Return the sorted indices of the images to take."""
    if limit is None:
        return np.arange(total, dtype=np.int64)
    if limit > total:
        raise DataError(
            f"{path}: got {total} images, expected {limit}; add images or ask for fewer"
        )
    return np.sort(np.random.default_rng(seed).permutation(total)[:limit]).astype(np.int64)


def _load_arrays(path: Path) -> tuple[AnyArray, IntArray | None]:
    """Return the images and, if the file has them, the labels; an .npy is mapped, not read."""
    if not path.exists():
        raise DataError(f"{path}: does not exist; expected a folder of images, an .npz or an .npy")
    if path.suffix.lower() not in (".npz", ".npy"):
        raise DataError(f"{path}: not usable as data; expected a folder of images, .npz or .npy")
    try:
        with path.open("rb") as stream:
            if stream.read(2) != b"PK":
                return np.load(path, mmap_mode="r", allow_pickle=False), None
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as members:
                arrays = {name: members[name] for name in ("x", "y") if name in members.files}
                names = ", ".join(members.files) or "nothing"
    except _BROKEN_FILE as err:
        reason = " ".join(str(err).split()) or type(err).__name__
        raise DataError(f"{path}: not a readable array file ({reason})") from err
    if "x" not in arrays:
        raise DataError(f"{path}: holds {names}; expected an array named x of shape (N, C, H, W)")
    labels = _checked_labels(path, arrays["y"], len(arrays["x"])) if "y" in arrays else None
    return arrays["x"], labels


def _checked_labels(path: Path, labels: AnyArray, num_images: int) -> IntArray:
    if labels.shape != (num_images,):
        raise DataError(
            f"{path}: y has shape {labels.shape}, expected ({num_images},): a class an image"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min(initial=0) < 0:
        raise DataError(f"{path}: y is {labels.dtype} or negative, expected class indices from 0")
    return labels.astype(np.int64)


def _check_images(path: Path, images: AnyArray, preprocess: Preprocess) -> None:
    wanted = (preprocess.channels, preprocess.height, preprocess.width)
    expected = f"expected (N, {', '.join(map(str, wanted))})"
    if images.ndim != 4:
        raise DataError(f"{path}: images have shape {images.shape}, {expected}")
    if len(images) == 0:
        raise DataError(f"{path}: got 0 images, expected at least 1")
    if images.shape[1] != preprocess.channels:
        hint = "; transpose it to (N, C, H, W)" if images.shape[3] == preprocess.channels else ""
        raise DataError(
            f"{path}: {images.shape[1]} channels in an array {images.shape}, {expected}{hint}"
        )
    if images.shape[1:] != wanted:
        raise DataError(
            f"{path}: images have shape {images.shape}, {expected}; arrays are not resized"
        )
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise DataError(
            f"{path}: images are {images.dtype}, expected uint8 pixels or network-ready floats"
        )
