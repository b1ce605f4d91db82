"""Images as a network's input: a folder, arrays in an .npz or .npy file, or arrays in memory.

A uint8 pixel p of channel c becomes (p / 255 - mean[c]) / std[c], computed in float32 in this order
(bit for bit what torchvision's ToTensor and Normalize give). Float arrays are the network's input
already and stay as they are, so nothing is ever normalized twice. Pixels stay 0..255 for a network
that scales them itself, and a network that takes (N, H, W, C) gets images in that layout.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from reptrt.core.arrays import AnyArray, Float32Array, IntArray
from reptrt.core.errors import ConfigError, DataError, option
from reptrt.data.arrays import BLOCK, ArrayImages, Arrays, load_arrays
from reptrt.data.images import ImageFiles, list_images
from reptrt.data.objects import Objects
from reptrt.graph.preprocess import Fit, Preprocess

Images = Path | Arrays  # a folder or an array file; or images in memory


class PixelSource(Protocol):
    """Where the images of a data set come from."""

    def read(self, start: int, stop: int) -> AnyArray:
        """Return images ``start`` to ``stop`` (n, C, H, W): uint8 pixels, or ready floats."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Images in a fixed order, prepared for one network; may be passed over many times."""

    name: str  # what messages call the images: a path, or a parameter's name
    length: int
    labels: IntArray | None  # (length,), read-only; None: the data has no labels
    preprocess: Preprocess
    source: PixelSource
    num_classes: int | None = None  # number of class folders; None: labels came otherwise
    names: tuple[str, ...] | None = None  # files below the folder, with slashes; None: arrays
    fits: tuple[Fit, ...] | None = None  # where each image lies in the input; None: arrays
    objects: tuple[Objects, ...] | None = None  # in each image; None: not given with the images

    def batches(self, size: int) -> Iterator[Float32Array]:
        """Yield the images in order, float32, ``size`` at a time, the last fewer.

        A batch is (n, C, H, W), or (n, H, W, C) for a network of that layout.

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

    def spread(self, count: int) -> "Dataset":
        """Return ``count`` of the images, evenly spread over the order."""
        return self._selected(np.arange(count) * self.length // count)

    def _selected(self, taken: IntArray) -> "Dataset":
        return replace(
            self,
            length=len(taken),
            labels=None if self.labels is None else self.labels[taken],
            source=SelectedImages(self.source, taken),
            names=None if self.names is None else tuple(self.names[i] for i in taken),
            fits=None if self.fits is None else tuple(self.fits[i] for i in taken),
            objects=None if self.objects is None else tuple(self.objects[i] for i in taken),
        )

    def digest(self) -> str:
        """Return the sha256 of all pixels in order, in hex: what the data set is, not its name."""
        digest = hashlib.sha256()
        for start in range(0, self.length, BLOCK):
            pixels = self.source.read(start, min(start + BLOCK, self.length))
            digest.update(np.ascontiguousarray(pixels).data)
        return digest.hexdigest()


def open_dataset(
    images: Images,
    preprocess: Preprocess,
    *,
    limit: int | None = None,
    seed: int = 0,
    labels: bool = False,
    parameter: str = "limit",
    taken: Sequence[int] | None = None,
) -> Dataset:
    """Prepare images for a network.

    Args:
        images: a folder of images, an .npz (``x``, optional ``y``) or .npy of arrays (N, C, H, W),
            or arrays in memory. In a folder with class sub-folders the label of an image is the
            index of its sub-folder, sorted by name.
        preprocess: what the network takes.
        limit: how many images to take: a uniform random sample without replacement over all
            images, which depends on ``seed`` and the names alone; kept in order. None takes all.
        seed: for the sample.
        labels: whether labels are required.
        parameter: the name of the option that sets ``limit``, for messages.
        taken: the indices of the images to take, in place of a sample; in any order, kept sorted.

    Raises:
        ConfigError: ``limit`` is not positive.
        DataError: the images cannot be used; the message says which and what to do.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"{option(parameter)}: got {limit}, expected at least 1")
    if isinstance(images, Path) and images.is_dir():
        name, listed = str(images), list_images(images)
        kept = _kept(taken, _sample(name, len(listed.paths), limit, seed, parameter))
        files = ImageFiles(images, [listed.paths[i] for i in kept], preprocess)
        source: PixelSource = files
        names: tuple[str, ...] | None = files.names
        fits: tuple[Fit, ...] | None = files.fits
        all_labels, num_classes, objects = listed.labels, listed.num_classes, None
    else:
        arrays = images if isinstance(images, Arrays) else load_arrays(images)
        arrays, name, all_labels = arrays.checked(preprocess), arrays.name, arrays.labels
        names = fits = num_classes = None
        kept = _kept(taken, _sample(name, len(arrays.images), limit, seed, parameter))
        source = ArrayImages(arrays, kept, preprocess)
        objects = None if arrays.objects is None else tuple(arrays.objects[i] for i in kept)
    if labels and all_labels is None:
        raise DataError(
            f"{name}: no labels; expected one sub-folder for each class, or an .npz with an array y"
        )
    known = None if all_labels is None else all_labels[kept]
    if known is not None:
        known.flags.writeable = False
    return Dataset(name, len(kept), known, preprocess, source, num_classes, names, fits, objects)


def sampled(images: Path, limit: int | None, seed: int) -> list[int]:
    """Return the indices of the images that `open_dataset` takes, ascending."""
    return [int(i) for i in _sample(str(images), count_images(images), limit, seed, "limit")]


def count_images(images: Images) -> int:
    """Return how many images there are.

    Raises:
        DataError: the folder or file cannot be read.
    """
    if isinstance(images, Path) and images.is_dir():
        return len(list_images(images).paths)
    return len((images if isinstance(images, Arrays) else load_arrays(images)).images)


def network_input(pixels: AnyArray, preprocess: Preprocess) -> Float32Array:
    """Return (p / 255 - mean) / std of uint8 pixels (n, C, H, W) in float32; floats are kept.

    A network that scales pixels itself gets them as they are, one of layout NHWC gets (n, H, W, C).
    """
    values: Float32Array = pixels.astype(np.float32, order="C")
    if pixels.dtype == np.uint8 and preprocess.values == "normalized":
        values /= np.float32(255.0)
        values -= np.asarray(preprocess.mean, np.float32)[:, None, None]
        values /= np.asarray(preprocess.std, np.float32)[:, None, None]
    if preprocess.layout == "NHWC":
        return np.ascontiguousarray(values.transpose(0, 2, 3, 1))
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


def _kept(taken: Sequence[int] | None, sample: IntArray) -> IntArray:
    return sample if taken is None else np.sort(np.asarray(taken, np.int64))


def _sample(name: str, total: int, limit: int | None, seed: int, parameter: str) -> IntArray:
    """Return the sorted indices of the images to take."""
    if limit is None:
        return np.arange(total, dtype=np.int64)
    if limit > total:
        raise DataError(
            f"{name}: got {total} images, expected {limit}; add images or lower {option(parameter)}"
        )
    return np.sort(np.random.default_rng(seed).permutation(total)[:limit]).astype(np.int64)
