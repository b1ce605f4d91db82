"""``any``: outputs that mean nothing to us; only their distance to the reference's is measured.

Over all images, for each output with values x of the reference and y of a network:

    cosine   sum x y / sqrt(sum x^2 sum y^2)
    PSNR     10 log10(peak^2 / mean (x - y)^2), of pictures alone

An output is a picture if it is (N, 1 or 3, H, W) with sides of `_SMALLEST` or more, and all values
of the reference lie, up to 5 % of the peak, in 0..1 (peak 1) or 0..255 with some above 127 (255).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields

import numpy as np

from reptrt.core.arrays import AnyArray, FloatArray
from reptrt.data.dataset import Dataset, Images
from reptrt.judge.options import TaskOptions
from reptrt.judge.outputs import Outputs, paired
from reptrt.judge.tasks.protocol import Column, Measures

_SMALLEST = 8  # pixels
_SLACK = 0.05  # of the peak: what a network may leave of its range
_BRIGHT = 127  # some values of a picture of 0..255 are above this

ByOutput = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Closeness:
    """How close outputs are to the reference's; the fields of `classify` stay, as null."""

    cosine: ByOutput | None  # by output; None: no reference
    psnr_db: ByOutput | None  # by output that is a picture; its value is None if both are equal

    @property
    def measures(self) -> Measures:
        """The JSON fields of the task."""
        of_classes = {"top1": None, "top5": None, "agreement": None}
        return {**of_classes, "cosine": self.cosine, "psnr_db": self.psnr_db}

    @property
    def rows(self) -> Mapping[str, Measures]:
        """A row for each of several outputs."""
        if self.cosine is None or self.psnr_db is None or len(self.cosine) == 1:
            return {}
        return {
            name: {
                "cosine": {name: cosine},
                "psnr_db": {name: self.psnr_db[name]} if name in self.psnr_db else {},
            }
            for name, cosine in self.cosine.items()
        }


@dataclass(slots=True)
class _Sums:
    """Sums over the values of one output."""

    product: float = 0.0
    reference: float = 0.0  # squares
    output: float = 0.0  # squares
    noise: float = 0.0  # squares of differences
    count: int = 0
    lowest: float = math.inf  # of the reference
    highest: float = -math.inf
    is_picture: bool = True

    def add(self, reference: FloatArray, output: FloatArray) -> None:
        x, y = (values.astype(np.float64) for values in (reference, output))
        self.product += float((x * y).sum())
        self.reference += float((x * x).sum())
        self.output += float((y * y).sum())
        self.noise += float(np.square(x - y).sum())
        self.count += x.size
        self.lowest = min(self.lowest, float(x.min(initial=math.inf)))
        self.highest = max(self.highest, float(x.max(initial=-math.inf)))
        self.is_picture &= x.ndim == 4 and x.shape[1] in (1, 3) and min(x.shape[2:]) >= _SMALLEST

    def add_sums(self, other: "_Sums") -> None:
        self.product += other.product
        self.reference += other.reference
        self.output += other.output
        self.noise += other.noise
        self.count += other.count
        self.lowest = min(self.lowest, other.lowest)
        self.highest = max(self.highest, other.highest)
        self.is_picture &= other.is_picture

    @property
    def cosine(self) -> float | None:
        """None where one of the two is 0 everywhere."""
        power = self.reference * self.output
        return self.product / math.sqrt(power) if power > 0 else None

    @property
    def peak(self) -> float | None:
        """The largest value of a picture; None if this is none."""
        for peak, least in ((1.0, -math.inf), (255.0, _BRIGHT)):
            is_below = -_SLACK * peak <= self.lowest and self.highest <= (1 + _SLACK) * peak
            if self.is_picture and is_below and self.highest > least:
                return peak
        return None

    def psnr_db(self, peak: float) -> float | None:
        if self.noise == 0:
            return None
        return 10 * math.log10(peak**2 * self.count / self.noise)


_FIELDS = tuple(item.name for item in fields(_Sums))


def _total(parts: Sequence[_Sums]) -> _Sums:
    total = _Sums()
    for sums in parts:
        total.add_sums(sums)
    return total


@dataclass(slots=True)
class _Tally:
    # of each batch: added up in the order of the images, whoever ran them
    batches: dict[str, list[_Sums]] = field(default_factory=dict)

    def add(self, outputs: Outputs, reference: Outputs | None = None) -> None:
        for name, pair in paired(reference or {}, outputs).items() if reference else ():
            sums = _Sums()
            sums.add(*pair)
            self.batches.setdefault(name, []).append(sums)

    def findings(self) -> Closeness:
        if not self.batches:
            return Closeness(None, None)
        total = {name: _total(parts) for name, parts in self.batches.items()}
        peaks = {name: sums.peak for name, sums in total.items()}
        return Closeness(
            {name: sums.cosine for name, sums in total.items()},
            {n: total[n].psnr_db(peak) for n, peak in peaks.items() if peak is not None},
        )

    def kept(self) -> dict[str, AnyArray]:
        return {
            name: np.array([astuple(sums) for sums in parts], np.float64)
            for name, parts in self.batches.items()
        }

    def add_kept(self, kept: Mapping[str, AnyArray]) -> None:
        for name, parts in kept.items():
            rows = (dict(zip(_FIELDS, row.tolist(), strict=True)) for row in parts)
            known = self.batches.setdefault(name, [])
            known += [
                _Sums(**{**row, "count": int(row["count"]), "is_picture": bool(row["is_picture"])})
                for row in rows
            ]


class Anything:
    """Outputs of any kind; see `reptrt.judge.tasks.protocol`."""

    columns = (
        Column("cosine", "cosine", lambda values: _only(values, "{:.5f}", "-")),
        Column("psnr_db", "PSNR dB", lambda values: _only(values, "{:.2f}", "inf")),
    )
    ranked_by: tuple[str, ...] = ()

    def __init__(self, options: TaskOptions, images: Images) -> None:
        pass

    def tally(self, name: str, dataset: Dataset) -> _Tally:
        """Return an empty tally for a network."""
        return _Tally()

    def compare(self, reference: Closeness | None, findings: Closeness) -> Measures:
        """Return nothing: all was compared batch by batch."""
        return {}


def _only(by_output: ByOutput, text: str, unknown: str) -> str:
    """Return the value of a single output as text; nothing if there is none, or several."""
    if len(by_output) != 1:
        return ""
    (value,) = by_output.values()
    return unknown if value is None else text.format(value)
