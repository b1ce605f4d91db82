"""How close two outputs are."""

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]


def sqnr_db(reference: FloatArray, output: FloatArray) -> float:
    """Return the signal to quantization noise ratio in dB.

        SQNR = 10 log10( sum reference^2 / sum (reference - output)^2 )

    Arrays of one shape, any shape; sums run in float64 over all elements. 20 dB is an error of a
    tenth of the signal, 6 dB more is half of that. Equal arrays give +inf, a reference of zeros
    gives -inf.
    """
    signal = np.asarray(reference, dtype=np.float64)
    noise = np.sum(np.square(signal - np.asarray(output, dtype=np.float64)))
    return db_from_powers(float(np.sum(np.square(signal))), float(noise))


def db_from_powers(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise): +inf without noise, -inf with noise alone."""
    if noise == 0.0:
        return float("inf")
    return float(10.0 * np.log10(signal / noise)) if signal > 0 else float("-inf")


def top_k_accuracy(logits: FloatArray, labels: npt.NDArray[np.integer], k: int) -> float:
    """Return the fraction of rows whose label is among the ``k`` largest logits; (N, C), (N,)."""
    k = min(k, logits.shape[1])
    best = np.argpartition(-logits, k - 1, axis=1)[:, :k]
    return float((best == labels[:, None]).any(axis=1).mean())


def agreement(reference: FloatArray, output: FloatArray) -> float:
    """Return the fraction of rows with the same arg max in both, shapes (N, C)."""
    return float((reference.argmax(axis=1) == output.argmax(axis=1)).mean())
