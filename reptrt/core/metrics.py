"""Measures of accuracy, and of how close two outputs are."""

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]


def sqnr_db(reference: FloatArray, output: FloatArray) -> float:
    """Return the signal to quantization noise ratio in dB.

        SQNR = 10 log10( sum reference^2 / sum (reference - output)^2 )

    Both arrays have the same shape; sums are over all elements, in float64. At 20 dB the error is a
    tenth of the signal, and each further 6 dB halves it. Equal arrays give +inf; a reference of
    zeros gives -inf.
    """
    signal = np.asarray(reference, dtype=np.float64)
    noise = np.sum(np.square(signal - np.asarray(output, dtype=np.float64)))
    return db_from_powers(float(np.sum(np.square(signal))), float(noise))


def db_from_powers(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise): +inf if noise is 0, -inf if only the signal is 0."""
    if noise == 0.0:
        return float("inf")
    return float(10.0 * np.log10(signal / noise)) if signal > 0 else float("-inf")


def top_k_accuracy(logits: FloatArray, labels: npt.NDArray[np.integer], k: int) -> float:
    """Return the fraction of rows whose label is among the ``k`` largest logits; (N, C), (N,)."""
    k = min(k, logits.shape[1])
    best = np.argpartition(-logits, k - 1, axis=1)[:, :k]
    return float((best == labels[:, None]).any(axis=1).mean())


def agreement(reference: FloatArray, output: FloatArray) -> float:
    """Return the fraction of rows with the same arg max in both arrays, of shape (N, C)."""
    return float((reference.argmax(axis=1) == output.argmax(axis=1)).mean())
