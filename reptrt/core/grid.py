"""The arithmetic of quantization, as TensorRT computes it: symmetric INT8.

    scale = amax / qmax
    q     = clip(round_half_even(x / scale), qmin, qmax)      divided, not multiplied by 1 / scale
    x_dq  = q * scale                                         all zero points are 0

Activations have one scale per tensor and codes in [-128, 127], or in [0, 255] (UINT8) with full
range. A runtime that has zero points takes any 256 codes around 0, stored as UINT8. Weights have
one scale per output channel and codes in [-127, 127]. Fewer bits are simulated with 8-bit codes:
weights of 6 bits use the codes in [-31, 31] and scale = amax / 31.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reptrt.core.arrays import FloatArray

Codes = npt.NDArray[np.integer]  # INT8 or UINT8


@dataclass(frozen=True, slots=True)
class Grid:
    """The integer codes of one quantized tensor.

    >>> Grid.activation(8), Grid.weight(6)
    (Grid(qmin=-128, qmax=127), Grid(qmin=-31, qmax=31))
    """

    qmin: int
    qmax: int

    @staticmethod
    def activation(num_bits: int) -> "Grid":
        """Codes of an activation: [-2^(b-1), 2^(b-1) - 1]."""
        return Grid(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1)

    @property
    def dtype(self) -> type[np.int8] | type[np.uint8]:
        """The type of the codes: INT8 if it holds them and they begin below 0, else UINT8.

        Raises:
            ValueError: 8 bits cannot represent all codes.
        """
        if -128 <= self.qmin < 0 <= self.qmax <= 127:
            return np.int8
        if not (
            self.qmin <= 0 <= self.qmax and (self.is_whole or -1 < self.qmin <= self.qmax < 256)
        ):
            raise ValueError(f"{self}: 8 bits cannot represent these codes")
        return np.uint8

    @property
    def is_whole(self) -> bool:
        """Whether the grid has all 256 codes, so that saturation alone keeps values in it."""
        return self.qmax - self.qmin == np.iinfo(np.uint8).max

    @property
    def zero_point(self) -> int:
        """The stored code of 0: codes are stored with it added, in the type `dtype`."""
        return 0 if self.dtype is np.int8 else -self.qmin

    @property
    def mirrored(self) -> "Grid":
        """The grid that reaches as far on both sides as this one on its longer side."""
        return Grid(self.qmin, max(self.qmax, -self.qmin - 1)) if self.zero_point else self

    @staticmethod
    def between(low: float, high: float) -> "Grid":
        """Return all 256 codes, of which as large a part is negative as of the values low..high.

        >>> Grid.between(-1.0, 3.0)
        Grid(qmin=-64, qmax=191)
        """
        negative = round(255 * -low / (high - low))
        return Grid(-negative, 255 - negative)

    @property
    def full_range(self) -> "Grid":
        """The grid with the same number of codes that begins at 0, for non-negative values.

        >>> Grid.activation(8).full_range
        Grid(qmin=0, qmax=255)
        """
        return Grid(0, self.qmax - self.qmin)

    @staticmethod
    def weight(num_bits: int) -> "Grid":
        """Codes of a weight: [-(2^(b-1) - 1), 2^(b-1) - 1]."""
        return Grid(-(2 ** (num_bits - 1)) + 1, 2 ** (num_bits - 1) - 1)


def scale_from_amax(amax: FloatArray | float, grid: Grid) -> npt.NDArray[np.float32]:
    """Return amax / qmax in float32; a zero amax (an all-zero weight channel) gives 1.0."""
    amax = np.asarray(amax, dtype=np.float64)
    scale = np.where(amax > 0, amax / grid.qmax, 1.0).astype(np.float32)
    tiny = np.float32(np.finfo(np.float32).tiny)
    return np.asarray(np.maximum(scale, tiny), dtype=np.float32)


def quantize(
    x: FloatArray, scale: FloatArray | float, grid: Grid, axis: int | None = None
) -> Codes:
    """Return the codes of ``x``, in the same shape and of type ``grid.dtype``.

    Args:
        x: values, any shape.
        scale: a scalar (per tensor, ``axis`` None), or one scale per index of ``axis``.
        grid: the allowed codes.
        axis: the channel axis of a per-channel scale.
    """
    codes = np.rint(x / along_axis(scale, np.ndim(x), axis))
    return np.asarray(np.clip(codes, grid.qmin, grid.qmax), dtype=grid.dtype)


def dequantize(
    q: Codes, scale: FloatArray | float, axis: int | None = None
) -> npt.NDArray[np.float32]:
    """Return q * scale in float32, same shape as ``q``."""
    return (q.astype(np.float32) * along_axis(scale, q.ndim, axis)).astype(np.float32)


def along_axis(values: FloatArray | float, ndim: int, axis: int | None) -> npt.NDArray[np.float32]:
    """Reshape a vector so that it broadcasts along ``axis`` of an ``ndim``-dimensional array."""
    array = np.asarray(values, dtype=np.float32)
    if axis is None:
        return array
    shape = [1] * ndim
    shape[axis] = -1
    return array.reshape(shape)


def channel_amax(weight: FloatArray, axis: int) -> npt.NDArray[np.float64]:
    """Return max |w| per index of ``axis``, shape ``(weight.shape[axis],)``."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    return np.asarray(np.abs(weight).max(axis=others), dtype=np.float64)
