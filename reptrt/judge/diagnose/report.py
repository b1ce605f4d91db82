"""The report of a diagnosis: as values, as JSON, as tables and as sentences.

The JSON form:

    {"images": 512, "layer_images": 128, "weight_bits": 8, "activation_bits": 8, "equalized": 22,
     "corners": [{"name": "W8A32", "prepared": false, "sqnr_db": 17.7, "agreement": 0.97}, ...],
     "layers": [{"layer": "stage1.0", "form": "coarse-fine", "source": "branches",
                 "parts": [{"kind": "identity", "share": 1.0}, ...],
                 "before": {"bits_left": 5.6, "weight_sqnr_db": 25.1, "activation_sqnr_db": 34.9},
                 "after": {...}}, ...],
     "reading": ["..."], "seconds": 4.2, "noise_db": 46.2}

JSON has no infinity: if nothing was lost, ``sqnr_db`` is null. ``noise_db`` tells how much the net
amplifies noise (`reptrt.judge.conditioning`).
"""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from reptrt.core.result import Result
from reptrt.judge.conditioning import conditioning_line
from reptrt.judge.diagnose.parts import Part, Source

_ENOUGH_DB = 30.0  # the noise power is a thousandth of the signal: top-1 hardly changes
_EQUAL_DB = 1.0  # smaller differences are not reported
_NAMES = {"diagonal": "the diagonal of the centre tap", "centre": "the centre tap"}


@dataclass(frozen=True, slots=True)
class Noise:
    """The noise of one layer in one form of the net."""

    bits_left: float | None  # for the values beside those that set the range; None: not known
    weight_sqnr_db: float  # of the layer's output, with quantized weights and float input
    activation_sqnr_db: float  # of the layer's output, with quantized input and float weights


@dataclass(frozen=True, slots=True)
class LayerDiagnosis:
    """One weighted layer of the fused float net."""

    layer: str
    form: str  # the chosen form: "none", "identity" or "coarse-fine"
    source: Source | None  # where the parts are known from; None: the weight has no parts
    parts: tuple[Part, ...]  # what sets the weight range, the largest share first
    before: Noise  # before preparation
    after: Noise  # after equalization and splits, in the units of the net before preparation


@dataclass(frozen=True, slots=True)
class Corner:
    """The whole net with some of it quantized, compared with the float net."""

    name: str  # "W8A32": 8-bit weights, float activations
    prepared: bool  # True: calibrated with the given options; False: plain INT8
    sqnr_db: float  # over all outputs, each in its own unit
    agreement: float | None  # fraction of images with the same arg max; None: not a classifier


@dataclass(frozen=True, slots=True, repr=False)
class Diagnosis(Result):
    """Why a net loses accuracy when it is quantized, measured on calibration images."""

    images: int  # number of images on which the corners were measured
    layer_images: int  # number of images on which the layers were measured
    weight_bits: int
    activation_bits: int
    equalized: int  # number of tensors
    corners: tuple[Corner, Corner, Corner, Corner]  # weights, activations, both, the method
    layers: tuple[LayerDiagnosis, ...]
    seconds: float
    noise_db: float | None = None  # SQNR of the float net under the noise of its images' rounding

    @property
    def reading(self) -> tuple[str, ...]:
        """The conclusions from the tables, as sentences."""
        ranges = _range_sentence(self.layers, self.weight_bits)
        sentences = (*ranges, _limit_sentence(*self.corners[:3]), self._method_sentence())
        line = conditioning_line(self.noise_db)
        return sentences if line is None else (*sentences, f"The net is {line}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as JSON values."""
        content = asdict(self) | {"reading": list(self.reading)}
        return dict(_finite(content))

    def to_tables(self) -> tuple[Table, Table]:
        """Return the layers and the corners as tables for people."""
        return self._layer_table(), self._corner_table()

    def to_lines(self) -> list[str]:
        """Return the meaning of the columns, then the conclusions from the tables."""
        lines = [
            f"Layers: before -> after preparation, on {self.layer_images} calibration images. Bits "
            "left: for the values beside those that",
            "set the range. Weights, activations: SQNR of the layer's output if only these are "
            "quantized.",
        ]
        if any(layer.source == "kernel" for layer in self.layers):
            lines.append("* read off the kernel; the file does not record what was fused.")
        return [*lines, "", *self.reading]

    def _layer_table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        table.add_column("layer", overflow="fold")
        table.add_column("range set by", overflow="fold")
        for title in (f"bits left of {self.weight_bits}", "weights dB", "activations dB"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("form", no_wrap=True)
        for layer in self.layers:
            before, after = layer.before, layer.after
            table.add_row(
                layer.layer,
                _range_text(layer),
                _change(before.bits_left, after.bits_left),
                _change(before.weight_sqnr_db, after.weight_sqnr_db),
                _change(before.activation_sqnr_db, after.activation_sqnr_db),
                layer.form,
            )
        return table

    def _corner_table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        table.add_column(f"net, on the {self.images} calibration images")
        for title in ("SQNR dB", "agreement"):
            table.add_column(title, justify="right", no_wrap=True)
        for corner in self.corners:
            table.add_row(
                f"{corner.name} {'with the options given' if corner.prepared else 'plain'}",
                _db(corner.sqnr_db),
                "-" if corner.agreement is None else f"{100 * corner.agreement:.2f} %",
            )
        return table

    def _method_sentence(self) -> str:
        plain, method = self.corners[2:]
        forms = Counter(layer.form for layer in self.layers if layer.form != "none")
        done = [f"{self.equalized} tensors equalized"] if self.equalized else []
        done += [f"{count} layers split by {form}" for form, count in forms.items()]
        text = f"{', '.join(done) or 'No preparation'}: {plain.name} goes from {_db(plain.sqnr_db)}"
        text += f" to {_db(method.sqnr_db)} dB"
        if plain.agreement is not None and method.agreement is not None:
            text += f", agreement from {100 * plain.agreement:.2f}"
            text += f" to {100 * method.agreement:.2f} %"
        if method.sqnr_db < plain.sqnr_db - _EQUAL_DB:
            text += "; that is worse: try equalize, full_range and correct_bias off, and no split"
        return f"{text}."


def _range_sentence(layers: Sequence[LayerDiagnosis], bits: int) -> tuple[str, ...]:
    """Return a sentence on what sets the range of most layers, or none if no part stands out."""
    recorded = [layer for layer in layers if layer.source == "branches"]
    if recorded:
        kind, most = _most_frequent(recorded)
        text = f"{len(most)} of {len(recorded)} rep layers: the {kind} branch sets the weight range"
        return (f"{text}{_left_for_the_rest(most, bits)}.",)
    read = [layer for layer in layers if layer.source == "kernel"]
    uneven = [layer for layer in read if _stands_out(layer, bits)]
    if not uneven:
        return ("No part of the kernels stands out, as it would in a rep-net.",) if read else ()
    kind, most = _most_frequent(uneven)
    text = f"{len(most)} of {len(read)} convolutions: {_NAMES[kind]} sets the weight range"
    return (f"{text}{_left_for_the_rest(most, bits)} (read off the kernels).",)


def _most_frequent(layers: Sequence[LayerDiagnosis]) -> tuple[str, list[LayerDiagnosis]]:
    """Return the part that sets the range most often, and the layers in which it does."""
    kind = Counter(layer.parts[0].kind for layer in layers).most_common(1)[0][0]
    return kind, [layer for layer in layers if layer.parts[0].kind == kind]


def _left_for_the_rest(layers: Sequence[LayerDiagnosis], bits: int) -> str:
    bits_left = [layer.before.bits_left for layer in layers if layer.before.bits_left is not None]
    if not bits_left:
        return ""
    return f" and leaves {statistics.median(bits_left):.1f} of {bits} bits to the rest"


def _stands_out(layer: LayerDiagnosis, bits: int) -> bool:
    """Return whether a kernel's centre is so large that the taps around it lose a bit or more."""
    left = layer.before.bits_left
    return layer.parts[0].kind in _NAMES and left is not None and left <= bits - 1


def _limit_sentence(weights: Corner, activations: Corner, both: Corner) -> str:
    if both.sqnr_db >= _ENOUGH_DB:
        return f"Plain {both.name} is enough for this net: {_db(both.sqnr_db)} dB."
    if abs(weights.sqnr_db - activations.sqnr_db) < _EQUAL_DB:
        limit = "Weights and activations cost about the same"
    else:
        worse = "Weights" if weights.sqnr_db < activations.sqnr_db else "Activations"
        limit = f"{worse} are the limit"
    return (
        f"{limit}: {weights.name} {_db(weights.sqnr_db)} dB, "
        f"{activations.name} {_db(activations.sqnr_db)} dB."
    )


def _range_text(layer: LayerDiagnosis) -> str:
    if not layer.parts:
        return "-"
    mark = "*" if layer.source == "kernel" else ""
    return f"{layer.parts[0].kind}{mark} {100 * layer.parts[0].share:.0f} %"


def _change(before: float | None, after: float | None) -> str:
    return f"{_db(before):>5} -> {_db(after):>5}"


def _db(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if math.isfinite(value) else "exact" if value > 0 else "lost"


def _finite(value: Any) -> Any:
    """Return JSON values with null in place of infinities."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
