"""The picture of accuracy over latency: one dot for each file that tools/compare_rivals.py judged.

It is drawn from the results that the tool wrote, so that it can be made without measuring again. A
label stands beside its dot, or is moved up or down, with a line to it, where others are in its way.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 860, 540  # px
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 844, 64, 484  # of the axes
_LETTER, _LINE, _DOT, _GAP = 6.2, 15, 5, 12  # px: a letter, a line, a dot's radius, dot to label
_SLOWEST, _WORST = 1.6, -4.0  # ratio and points beyond which a file is named below the picture
_STYLE = """\
  <style>
    text { font: 12px sans-serif; fill: #57606a }
    .title { font-weight: bold; font-size: 13px }
    .axis { stroke: #8c959f } .grid { stroke: #8c959f; stroke-opacity: 0.25 }
    .float { stroke: #57606a; stroke-dasharray: 5 4 } .leader { stroke: #8c959f }
    .ours { fill: #1f6feb; stroke: #1f6feb } .rival { fill: #bf8700; stroke: #bf8700 }
    .other { fill: none; stroke: #bf8700; stroke-width: 1.6 }
    text.of-ours { fill: #1f6feb; font-weight: bold }
    @media (prefers-color-scheme: dark) {
      text { fill: #adbac7 } .float { stroke: #adbac7 }
      .ours { fill: #58a6ff; stroke: #58a6ff } .rival { fill: #d29922; stroke: #d29922 }
      .other { stroke: #d29922 }
      text.of-ours { fill: #58a6ff }
    }
  </style>"""


@dataclass(frozen=True, slots=True)
class Dot:
    """One file: its time over that of the float net, and its top-1 less that of the float net."""

    title: str
    ratio: float
    points: float
    kind: str  # ours, rival, or other: TensorRT's INT8 engines do not take the file


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in px."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "Box") -> bool:
        """Return whether two rectangles overlap."""
        beside = self.right <= other.left or other.right <= self.left
        return not (beside or self.bottom <= other.top or other.bottom <= self.top)


@dataclass(frozen=True, slots=True)
class Axes:
    """Ratios from 0 at the left, points upwards."""

    ratio: float  # at the right end
    lowest: float  # points at the bottom
    highest: float

    def at(self, ratio: float, points: float) -> tuple[float, float]:
        """Return the place of a ratio and points in px."""
        up = (points - self.lowest) / (self.highest - self.lowest)
        return _LEFT + (_RIGHT - _LEFT) * ratio / self.ratio, _BOTTOM - (_BOTTOM - _TOP) * up


def dots_of(results: Mapping[str, Any], batch: int) -> list[Dot]:
    """Return the dots of one net of rivals.json; rows that failed or were not timed have none."""
    dots = []
    for row in results["rows"]:
        if row["why"] is None and row["ratios"] is not None:
            kind = "ours" if not row["is_rival"] else "other" if row["mark"] else "rival"
            points = 100 * (row["top1"] - results["float"]["accuracy"])
            dots.append(Dot(row["title"], row["ratios"][str(batch)][0], points, kind))
    return dots


def tradeoff_picture(path: Path, net: str, batch: int = 32) -> str:
    """Return the picture of the first net of a rivals.json as SVG.

    Args:
        path: what compare_rivals.py wrote.
        net: what the title calls it.
        batch: of the latencies.
    """
    results = json.loads(path.read_text())["nets"][0]
    found = dots_of(results, batch)
    dots = [dot for dot in found if dot.ratio <= _SLOWEST and dot.points >= _WORST]
    outside = [dot for dot in found if dot not in dots]
    lowest = min(dot.points for dot in dots)
    highest = max(dot.points for dot in dots)
    axes = Axes(
        1.12 * max(max(dot.ratio for dot in dots), 1.0),
        0.5 * math.floor(2 * lowest),
        max(0.4, highest + 0.2),
    )
    title = f"{net}: change of top-1 over time in onnxruntime on a CPU, batch {batch}, one thread"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img">',
        f"  <title>{escape(title)}</title>",
        _STYLE,
        f'  <text class="title" x="12" y="22">{escape(title)}</text>',
        *_legend(),
        *_grid(axes, 100 * results["float"]["accuracy"]),
        *_labelled(dots, axes),
        *_beyond(outside),
        "</svg>",
    ]
    return "\n".join([*lines, ""])


def _legend() -> Iterator[str]:
    x = 18.0
    for kind, text in (
        ("ours", "reptrt"),
        ("rival", "other tools"),
        ("other", "other tools, files that INT8 engines of TensorRT do not take"),
    ):
        yield f'  <circle class="{kind}" cx="{x}" cy="42" r="{_DOT}"/>'
        yield f'  <text x="{x + _GAP}" y="46">{text}</text>'
        x += 40 + _LETTER * len(text)


def _grid(axes: Axes, accuracy: float) -> Iterator[str]:
    points = axes.lowest
    while points <= 0:
        _, y = axes.at(0, points)
        kind = "grid" if points else "float"
        yield f'  <line class="{kind}" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'  <text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{points:+.1f}</text>'
        points += 0.5
    x, y = axes.at(1, 0)
    yield f'  <text x="{_RIGHT}" y="{y - 6:.1f}" text-anchor="end">float: {accuracy:.2f} %</text>'
    yield f'  <line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_BOTTOM}"/>'
    step = 0.25 if axes.ratio < 2 else 0.5
    for number in range(int(axes.ratio / step) + 1):
        x, _ = axes.at(number * step, 0)
        yield f'  <line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{_BOTTOM}" y2="{_BOTTOM + 5}"/>'
        yield (
            f'  <text x="{x:.1f}" y="{_BOTTOM + 20}" text-anchor="middle">{number * step:g}</text>'
        )
    yield f'  <line class="axis" x1="{_LEFT}" x2="{_RIGHT}" y1="{_BOTTOM}" y2="{_BOTTOM}"/>'
    yield f'  <text x="{_LEFT}" y="{_BOTTOM + 42}">time relative to the float net</text>'
    yield f'  <text x="12" y="{_TOP - 4}">points</text>'


def _beyond(dots: Sequence[Dot]) -> Iterator[str]:
    """Yield the line that names the files for which the picture has no room."""
    if dots:
        named = ", ".join(f"{d.title} ({d.points:+.1f} at {d.ratio:.2f})" for d in dots)
        text = escape(f"outside: {named}")
        yield f'  <text x="{_RIGHT}" y="{_BOTTOM + 42}" text-anchor="end">{text}</text>'


def _labelled(dots: Sequence[Dot], axes: Axes) -> Iterator[str]:
    """Yield every dot with its label; the first ones get the nearest places."""
    places = [axes.at(dot.ratio, dot.points) for dot in dots]
    taken = [Box(x - _DOT, y - _DOT, x + _DOT, y + _DOT) for x, y in places]
    _, level = axes.at(0, 0)
    taken.append(Box(_RIGHT - 100, level - 20, _RIGHT, level))  # the label of the float net
    order = sorted(range(len(dots)), key=lambda index: -dots[index].points)
    labels: dict[int, tuple[Box, bool]] = {}
    for index in order:
        box, on_left = _place(places[index], _LETTER * len(dots[index].title), taken)
        taken.append(box)
        labels[index] = box, on_left
    for index, (box, on_left) in labels.items():
        dot, (x, y) = dots[index], places[index]
        middle, edge = (box.top + box.bottom) / 2, box.right if on_left else box.left
        if abs(middle - y) > _DOT:
            yield (
                f'  <line class="leader" x1="{x:.1f}" y1="{y:.1f}" '
                f'x2="{edge + (3 if on_left else -3):.1f}" y2="{middle:.1f}"/>'
            )
        anchor = ' text-anchor="end"' if on_left else ""
        of = ' class="of-ours"' if dot.kind == "ours" else ""
        yield f'  <text{of} x="{edge:.1f}" y="{middle + 4:.1f}"{anchor}>{escape(dot.title)}</text>'
    for dot, (x, y) in zip(dots, places, strict=True):
        yield f'  <circle class="{dot.kind}" cx="{x:.1f}" cy="{y:.1f}" r="{_DOT}"/>'


def _place(place: tuple[float, float], width: float, taken: Sequence[Box]) -> tuple[Box, bool]:
    """Return the nearest free box for a label, and whether it is left of its dot."""
    x, y = place
    for shift in range(0, HEIGHT, 3):
        for up in dict.fromkeys((-shift, shift)):
            for on_left in (False, True):
                gap = _GAP + (_GAP if shift > _DOT else 0)
                left = x - gap - width if on_left else x + gap
                box = Box(left, y + up - _LINE / 2, left + width, y + up + _LINE / 2)
                is_inside = box.left > _LEFT and box.right < WIDTH and box.top > _TOP
                if is_inside and box.bottom < _BOTTOM and not any(map(box.meets, taken)):
                    return box, on_left
    return Box(x, y, x + width, y + _LINE), False
