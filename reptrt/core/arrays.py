"""Types of numpy arrays by what they hold, and arrays as text."""

import base64
from typing import Any

import numpy as np
import numpy.typing as npt

AnyArray = npt.NDArray[Any]
FloatArray = npt.NDArray[np.floating]  # of any width
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def text_of(values: FloatArray) -> str:
    """Return the values as text: base64 of little-endian float32, without their shape."""
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()


def floats_of(text: str) -> Float32Array:
    """Return the values (N,) that `text_of` wrote.

    Raises:
        ValueError: it is other text.
    """
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32)
