"""The handwritten digits of scikit-learn, and the small RepVGG that is part of reptrt.

There are 1797 images of 8 x 8 pixels with 16 grey levels. Every second image, starting with the
second, is held out from training and calibration. `tools/train_digits.py` trained the net.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from reptrt.core.errors import MissingDependencyError
from reptrt.sources.options import ArchitectureOptions

WEIGHTS = Path(__file__).with_name("digits_repvgg.pt")
ARCHITECTURE = ArchitectureOptions(
    widths=(48, 48, 96, 96),
    blocks=(6, 3, 1),
    strides=(1, 1, 2, 2),
    num_classes=10,
)
INPUT_SIZE = (1, 8, 8)
MEAN, STD = (0.306,), (0.376,)  # of pixels / 255 over the training images
_LEVELS = 16  # pixels are 0..16


class Digits(NamedTuple):
    """Images and their labels."""

    x: npt.NDArray[np.uint8]  # (N, 1, 8, 8)
    y: npt.NDArray[np.int64]  # (N,), 0..9


@dataclass(frozen=True, slots=True)
class Split:
    """The images for training and calibration, and those for evaluation."""

    train: Digits
    held_out: Digits


def load_digits() -> Split:
    """Return the digits as training and held-out images.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as err:
        raise MissingDependencyError(
            "the digits are part of scikit-learn, which is not installed: "
            "pip install 'reptrt[demo]'"
        ) from err
    bunch = datasets.load_digits()
    x = np.rint(bunch.images * (255 / _LEVELS)).astype(np.uint8)[:, None]
    y = bunch.target.astype(np.int64)
    return Split(Digits(x[::2], y[::2]), Digits(x[1::2], y[1::2]))


def write_arrays(folder: Path) -> Mapping[str, Path]:
    """Write ``train.npz`` and ``held_out.npz``, each with x and y; return their paths by name."""
    split = load_digits()
    paths = {"train": folder / "train.npz", "held_out": folder / "held_out.npz"}
    for name, path in paths.items():
        digits: Digits = getattr(split, name)
        np.savez_compressed(path, x=digits.x, y=digits.y)
    return paths
