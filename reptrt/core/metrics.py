"""Measures of accuracy, and of how close two outputs are."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from reptrt.core.arrays import FloatArray


def sqnr_db(reference: FloatArray, output: FloatArray) -> float:
    """Return the signal to quantization noise ratio in dB.

        SQNR = 10 log10( sum reference^2 / sum (reference - output)^2 )

    Both arrays have the same shape; sums are over all elements, in float64. At 20 dB the error is a
    tenth of the signal, and each further 6 dB halves it. Equal arrays give +inf; a reference of
    zeros gives -inf.
    """
    return db_from_powers(*powers(reference, output))


def powers(reference: FloatArray, output: FloatArray) -> tuple[float, float]:
    """Return the sums of reference^2 and of (reference - output)^2 over all elements."""
    signal = np.asarray(reference, dtype=np.float64)
    noise = np.sum(np.square(signal - np.asarray(output, dtype=np.float64)))
    return float(np.sum(np.square(signal))), float(noise)


def db_from_powers(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise): +inf if noise is 0, -inf if only the signal is 0."""
    if noise == 0.0:
        return float("inf")
    ratio = signal / noise
    return float(10.0 * np.log10(ratio)) if ratio > 0 else float("-inf")


def db_of_outputs(outputs: Sequence[tuple[float, float]]) -> float:
    """Return one SQNR in dB for several outputs, each in its own unit.

        -10 log10( mean over outputs of noise / signal )

    So boxes in pixels do not hide the error of scores. Of a single output it is its SQNR. Outputs
    that are equal count with no error; if one of zeros has noise, the result is -inf.

    Args:
        outputs: the sums of squares (signal, noise) of each, at least one; see `powers`.
    """
    if len(outputs) == 1:
        return db_from_powers(*outputs[0])
    relative = [
        0.0 if noise == 0.0 else noise / signal if signal > 0 else float("inf")
        for signal, noise in outputs
    ]
    return db_from_powers(1.0, sum(relative) / len(relative))


def class_scores(output: FloatArray) -> FloatArray | None:
    """Return the output of a classifier, (N, C) or (N, C, 1, ...), as (N, C); None for others."""
    rows = output.reshape(len(output), -1)
    return rows if output.ndim > 1 and rows.shape[1] == output.shape[1] else None


def top_k_hits(
    logits: FloatArray, labels: npt.NDArray[np.integer], k: int
) -> npt.NDArray[np.bool_]:
    """Return for each row whether its label is among the ``k`` largest logits; (N, C), (N,)."""
    k = min(k, logits.shape[1])
    best = np.argpartition(-logits, k - 1, axis=1)[:, :k]
    hits: npt.NDArray[np.bool_] = (best == labels[:, None]).any(axis=1)
    return hits


def top_k_accuracy(logits: FloatArray, labels: npt.NDArray[np.integer], k: int) -> float:
    """Return the fraction of rows whose label is among the ``k`` largest logits; (N, C), (N,)."""
    return float(top_k_hits(logits, labels, k).mean())


def agreement(reference: FloatArray, output: FloatArray) -> float:
    """Return the fraction of rows with the same arg max in both arrays, of shape (N, C)."""
    return float((reference.argmax(axis=1) == output.argmax(axis=1)).mean())
