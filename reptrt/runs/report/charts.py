"""Small charts as inline SVG.

Marks are placed at percentages of the width: a chart fills the width of its cell, while text and
lines keep their size on a phone and on paper. The style sheet sets the colours by class.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_HEIGHT = 18
_PLOT = 260  # of a scatter plot
_STRIP = 7  # height of one bar among several
_DOT = 4.5
_WITH_GAP = 2.5  # percent of the width; a gap would hide a narrower bar


@dataclass(frozen=True, slots=True)
class Scale:
    """The ends of a chart's axis, linear or logarithmic."""

    low: float
    high: float
    is_log: bool = False

    def percent(self, value: float) -> float:
        """Return the position of a value, 0 to 100; values beyond an end are placed at it."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.is_log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return 100.0 * (at - low) / (high - low) if high > low else 0.0


def scale_of(values: Iterable[float | None], *, is_log: bool = False) -> Scale:
    """Return a scale that contains all values: from 0, or logarithmic between powers of ten."""
    shown = [v for v in values if v is not None and math.isfinite(v) and (v > 0 or not is_log)]
    if not shown:
        return Scale(1.0 if is_log else 0.0, 10.0, is_log)
    if not is_log:
        return Scale(min(0.0, *shown), max(*shown, 0.0) * 1.05 or 1.0)
    ends = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
    return Scale(10.0 ** ends[0], 10.0 ** max(ends[1], ends[0] + 1), is_log=True)


def axis(scale: Scale, ticks: Sequence[float]) -> Markup:
    """Return the ticks of a scale, for the heading of a column."""
    marks = []
    for tick in ticks:
        at = scale.percent(tick)
        anchor = "start" if at < 10 else "end" if at > 90 else "middle"
        text = f'<text class="tick" x="{at:.2f}%" y="10" text-anchor="{anchor}">{tick:g}</text>'
        marks.append(text + _line(at, at, 13, _HEIGHT, "axis"))
    return _svg(marks, _HEIGHT, "scale of the column: " + ", ".join(f"{tick:g}" for tick in ticks))


def bar(scale: Scale, value: float, kind: str, label: str) -> Markup:
    """Return one bar from the low end of a scale."""
    at = scale.percent(value)
    return _svg([f'<rect class="{kind}" x="0" y="4" width="{at:.2f}%" height="10"/>'], 18, label)


def change(scale: Scale, before: float | None, after: float | None, label: str) -> Markup:
    """Return a ring at the value before, a dot at the value after, and a line between them."""
    marks, middle = [], _HEIGHT / 2
    if before is not None and after is not None:
        first, last = sorted((scale.percent(before), scale.percent(after)))
        marks.append(_line(first, last, middle, middle, "link"))
    for value, kind in ((before, "before"), (after, "after")):
        if value is not None:
            marks.append(_dot(scale.percent(value), middle, kind))
    return _svg(marks, _HEIGHT, label)


def interval(scale: Scale, low: float, value: float, high: float, kind: str, label: str) -> Markup:
    """Return a dot at a value, with its confidence interval as a whisker."""
    middle = _HEIGHT / 2
    ends = scale.percent(low), scale.percent(high)
    whisker = _line(*ends, middle, middle, f"whisker {kind}-line")
    sides = [_line(end, end, middle - 4, middle + 4, f"whisker {kind}-line") for end in ends]
    return _svg([whisker, *sides, _dot(scale.percent(value), middle, kind)], _HEIGHT, label)


def strips(
    scale: Scale, rows: Sequence[tuple[str, tuple[float, float, float] | None]], label: str
) -> Markup:
    """Return one thin bar for each row, from its low to its high end, with a gap at the median."""
    marks = []
    for index, (kind, values) in enumerate(rows):
        if values is None:
            continue
        low, middle, high = (scale.percent(value) for value in values)
        top = 2 + index * (_STRIP + 2)
        width = max(high - low, 1.2)
        place = f'x="{min(low, 100 - width):.2f}%" y="{top}" width="{width:.2f}%"'
        marks.append(f'<rect class="{kind}" {place} height="{_STRIP}"/>')
        if width > _WITH_GAP:
            marks.append(_line(middle, middle, top, top + _STRIP, "gap"))
    return _svg(marks, 2 + len(rows) * (_STRIP + 2), label)


@dataclass(frozen=True, slots=True)
class HistogramView:
    """The data of a histogram: counts of |x| and the threshold."""

    bins: Sequence[int]
    bin_width: float
    amax: float
    end: float  # right end of the x axis


def histogram(view: HistogramView, label: str) -> Markup:
    """Return a histogram with log(1 + count) as height and a line at amax."""
    top = math.log1p(max(view.bins, default=0)) or 1.0
    steps = []
    for index, count in enumerate(view.bins):
        left = 100.0 * min(index * view.bin_width / view.end, 1.0)
        right = 100.0 * min((index + 1) * view.bin_width / view.end, 1.0)
        height = 64.0 * math.log1p(count) / top
        if count and right > left:
            kind = "clipped" if index * view.bin_width >= view.amax else "after"
            steps.append(
                f'<rect class="{kind}" x="{left:.2f}%" y="{70 - height:.1f}" '
                f'width="{right - left:.2f}%" height="{height:.1f}"/>'
            )
    at = 100.0 * min(view.amax / view.end, 1.0)
    line = _line(at, at, 2, 70, "threshold")
    base = _line(0, 100, 70, 70, "axis")
    ends = (
        '<text class="tick" x="0" y="83">0</text>'
        f'<text class="tick" x="100%" y="83" text-anchor="end">{view.end:.4g}</text>'
    )
    return _svg([*steps, base, line, ends], 86, label)


def curves(lines: Sequence[tuple[str, Sequence[float]]], label: str) -> Markup:
    """Return lines of values 0..1 over equal steps from 0 to 1, on a square with a frame.

    Args:
        lines: style sheet class and values of each line, the first below the others.
        label: what it shows.
    """
    frame = '<rect class="frame" x="0" y="0" width="100" height="100"/>'
    grid = "".join(f'<path class="grid" d="M0 {at}H100M{at} 0V100"/>' for at in (25, 50, 75))
    marks = []
    for kind, values in lines:
        step = 100.0 / max(len(values) - 1, 1)
        points = " ".join(f"{i * step:.1f},{100 - 100 * v:.1f}" for i, v in enumerate(values))
        marks.append(f'<polyline class="{kind}-line curve" points="{points}"/>')
    return Markup(
        f'<svg class="chart" viewBox="-1 -1 102 102" width="100%" role="img" '
        f'aria-label="{escape(label)}">{frame}{grid}{"".join(marks)}</svg>'
    )


@dataclass(frozen=True, slots=True)
class Mark:
    """One point of a scatter plot."""

    x: float
    y: float
    kind: str  # style sheet class
    label: str
    title: str  # shown where the pointer is


def scatter(marks: Sequence[Mark], bound: float, label: str) -> Markup:
    """Return points with labels, and a level line; y grows upwards.

    Args:
        marks: the points.
        bound: height of the line.
        label: what it shows.
    """
    across = _padded([mark.x for mark in marks])
    upward = _padded([*(mark.y for mark in marks), bound])
    parts = []
    for tick in (0.0, 0.5, 1.0):
        x = across.low + tick * (across.high - across.low)
        y = upward.low + tick * (upward.high - upward.low)
        anchor = ("start", "middle", "end")[round(2 * tick)]
        at = _PLOT * (1 - tick)
        parts.append(
            f'<text class="tick" x="{100 * tick:g}%" y="{_PLOT + 14}" text-anchor="{anchor}">'
            f'{x:.3g}</text><text class="tick" x="0" y="{at + (10 if tick else -3):g}">{y:.3g}'
            "</text>"
        )
    level = _PLOT * (1 - upward.percent(bound) / 100)
    parts += [_line(0, 100, _PLOT, _PLOT, "axis"), _line(0, 100, level, level, "threshold")]
    for mark in marks:
        x, y = across.percent(mark.x), _PLOT * (1 - upward.percent(mark.y) / 100)
        parts.append(
            f"<g><title>{escape(mark.title)}</title>{_dot(x, y, mark.kind)}"
            f'<text class="tick" x="{x:.2f}%" y="{y - 8:.1f}" text-anchor="middle">'
            f"{escape(mark.label)}</text></g>"
        )
    return _svg(parts, _PLOT + 18, label)


def _padded(values: Sequence[float]) -> Scale:
    """Return a scale that leaves a tenth of the range free on both sides."""
    low, high = min(values), max(values)
    pad = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(low - pad, high + pad)


Marked = Sequence[tuple[tuple[float, float, float, float], str]]  # boxes x1 y1 x2 y2 with texts


def picture(
    jpeg: str, size: tuple[int, int], forms: Sequence[tuple[str, Marked]], label: str
) -> Markup:
    """Return one picture several times, side by side, each with boxes on it.

    Args:
        jpeg: base64.
        size: width and height of the image, in whose pixels boxes are given.
        forms: style sheet class and boxes of each copy, the last box on top.
        label: what it shows.
    """
    width, height = size
    text = max(width, height) / 28
    copies = []
    for kind, boxes in forms:
        marks = []
        for (left, top, right, bottom), words in boxes:
            place = (
                f'x="{left:g}" y="{top:g}" width="{right - left:.1f}" height="{bottom - top:.1f}"'
            )
            at = top - text / 4 if top > 1.2 * text else top + text
            marks.append(
                f'<rect class="edge" {place}/><rect class="box {kind}-line" {place}/>'
                f'<text class="box" x="{left:g}" y="{at:.1f}" font-size="{text:.1f}">'
                f"{escape(words)}</text>"
            )
        copies.append(
            f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{escape(label)}, {kind}"><image width="{width}" height="{height}" '
            f'preserveAspectRatio="none" href="data:image/jpeg;base64,{escape(jpeg)}"/>'
            f"{''.join(marks)}</svg>"
        )
    return Markup(f'<div class="pair">{"".join(copies)}</div>')


def _line(left: float, right: float, top: float, bottom: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{left:.2f}%" x2="{right:.2f}%" y1="{top:g}" y2="{bottom:g}"/>'


def _dot(at: float, middle: float, kind: str) -> str:
    return f'<circle class="{kind}" cx="{at:.2f}%" cy="{middle:g}" r="{_DOT}"/>'


def _svg(marks: Iterable[str], height: int, label: str) -> Markup:
    """Return the SVG element; a mark at an end of the scale may overlap the cell's padding."""
    return Markup(
        f'<svg class="chart" width="100%" height="{height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(marks)}</svg>'
    )
