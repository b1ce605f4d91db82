"""What files lose on some of the images, against the float net, with a 95 % interval.

The loss is in points (percent) for the fractions, so that smaller is better:

    top1, map, miou   100 (value of the float net - value of the file)
    agreement         100 (1 - share of images with the float net's class)
    sqnr              - dB

The intervals of top-1 and mAP are those that `evaluate` gives: of the paired differences of images,
and of the paired bootstrap. That of agreement is Wilson's. Others have none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reptrt.core.choices import Metric
from reptrt.core.errors import DataError, option
from reptrt.core.intervals import Z
from reptrt.judge.evaluate import EvalReport, FileResult, evaluate
from reptrt.judge.options import EvaluateOptions
from reptrt.search.options import TuneOptions

_LOSSLESS_DB = 200.0  # where all outputs are equal


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one file loses on one part of the images."""

    images: int
    value: float  # a fraction, or dB
    reference: float | None  # of the float net; None for agreement and SQNR
    loss: float  # in points, or -dB
    low: float | None  # 95 % interval of the loss
    high: float | None


def judge(
    files: Sequence[Path],
    reference: Path,
    images: Path,
    taken: Sequence[int],
    options: TuneOptions,
) -> list[Judgement]:
    """Judge files on the same images, in one pass.

    Args:
        files: .onnx files.
        reference: the float net.
        images: to judge on.
        taken: indices of the images to use.
        options: the task and the metric.

    Raises:
        DataError: the metric needs labels that the images do not have.
    """
    judging = EvaluateOptions(**vars(options.of_task), threads=options.threads)
    report = evaluate([reference, *files], images, judging, reference=reference, taken=taken)
    return [_judgement(result, report, images, options.measure) for result in _files(report)]


def _files(report: EvalReport) -> tuple[FileResult, ...]:
    return report.results[1:]


def _judgement(result: FileResult, report: EvalReport, images: Path, metric: Metric) -> Judgement:
    if metric == "sqnr":
        decibels = _LOSSLESS_DB if result.identical else float(result.sqnr_db or 0.0)
        return Judgement(result.images, decibels, None, -decibels, None, None)
    value, of_float = result.measures.get(metric), report.results[0].measures.get(metric)
    if value is None:
        raise DataError(
            f"{images}: {option('metric', metric)} cannot be measured on these images, which have "
            f"no labels for it, or the net is of another kind; give labels, or "
            f"{option('metric', 'agreement')} or {option('metric', 'sqnr')}"
        )
    if metric == "agreement":
        low, high = wilson(result.images - round(value * result.images), result.images)
        return Judgement(result.images, value, None, 100 * (1 - value), 100 * low, 100 * high)
    loss = 100 * (float(of_float or 0.0) - value)
    change: dict[str, float] | None = result.measures.get(f"{metric}_change")
    if change is None:
        return Judgement(result.images, value, of_float, loss, None, None)
    return Judgement(
        result.images, value, of_float, loss, -100 * change["high"], -100 * change["low"]
    )


def wilson(count: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share (Wilson, 1927, doi 10.2307/2276774).

    >>> [round(end, 4) for end in wilson(0, 100)], [round(end, 4) for end in wilson(10, 100)]
    ([0.0, 0.037], [0.0552, 0.1744])
    """
    share, square = count / total, Z**2 / total
    middle = share + square / 2
    half = Z * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return max((middle - half) / (1 + square), 0.0), min((middle + half) / (1 + square), 1.0)


def parts(total: int, limit: int | None, seed: int) -> tuple[list[int], list[int]]:
    """Return the indices of the images to tune on, and of those to confirm on.

    Both are halves of one random order; the first n of a part are a random sample of it.

    Raises:
        DataError: there are fewer than two images, or fewer than were asked for.
    """
    wanted = total if limit is None else limit
    if total < 2 or wanted > total:
        raise DataError(
            f"{option('eval_data')}: got {total} images, expected "
            f"{max(2, wanted)} or more: one part to tune on and one to confirm on; add images"
            f"{'' if limit is None else ' or lower ' + option('eval_limit')}"
        )
    order = np.random.default_rng([seed, 1]).permutation(total)[:wanted].tolist()
    return order[: wanted // 2], order[wanted // 2 :]
