"""tools/tradeoff.py: the dots stand where the numbers say, and every label can be read."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.helpers import load_tool

tradeoff = load_tool("tradeoff")


def row(title: str, top1: float, ratio: float, **values: Any) -> dict[str, Any]:
    of_rival = {"title": title, "is_rival": True, "mark": "", "why": None, "top1": top1}
    return of_rival | {"ratios": {"32": [ratio, ratio, ratio]}} | values


@pytest.fixture
def results(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)  # a crowd of files that are about as fast and as good
    crowd = [row(f"tool {i}", 0.58 - 0.002 * rng.random(), 0.6, mark="") for i in range(16)]
    rows = [
        row("ours & theirs", 0.59, 0.5, is_rival=False),
        row("worst", 0.55, 1.5, mark="for CPUs"),
        row("too bad", 0.3, 0.7),
        row("too slow", 0.58, 3.0),
        row("failed", 0.1, 0.1, why="no such file"),
        row("not timed", 0.1, 0.1, ratios=None),
        *crowd,
    ]
    path = tmp_path / "rivals.json"
    path.write_text(json.dumps({"nets": [{"float": {"accuracy": 0.58}, "rows": rows}]}))
    return path


def numbers(line: str, *names: str) -> list[float]:
    return [float(re.search(rf' {name}="([^"]*)"', line)[1]) for name in names]  # type: ignore[index]


def test_dots_stand_where_the_numbers_say(results: Path) -> None:
    picture = tradeoff.tradeoff_picture(results, "A net").splitlines()
    dots = [line for line in picture if "<circle" in line and 'cy="42"' not in line]
    assert len(dots) == 18
    best, worst = (numbers(line, "cx", "cy") for line in dots[:2])
    assert 'class="ours"' in dots[0]
    assert 'class="other"' in dots[1]
    ticks = re.findall(r'y="([\d.]+)"[^>]*>([+-]\d\.\d)<', "\n".join(picture))
    scale = {float(points): float(y) for y, points in ticks}
    per_point = (scale[-2.0] - scale[0.0]) / 2  # px
    assert worst[1] - best[1] == pytest.approx(4 * per_point, abs=0.2)
    assert worst[0] - 64 == pytest.approx(3 * (best[0] - 64), abs=0.3)  # from the left end
    (line,) = (line for line in picture if "outside: " in line)
    assert "outside: too bad (-28.0 at 0.70), too slow (+0.0 at 3.00)<" in line


def test_no_label_covers_a_dot_or_another_label(results: Path) -> None:
    picture = tradeoff.tradeoff_picture(results, "A net").splitlines()
    found = json.loads(results.read_text())["nets"][0]
    boxes = []
    for dot in tradeoff.dots_of(found, 32):
        if dot.title in ("too bad", "too slow"):
            continue
        title = dot.title.replace("&", "&amp;")
        (line,) = (line for line in picture if f">{title}</text>" in line)
        x, y = numbers(line, "x", "y")
        width = tradeoff._LETTER * len(dot.title)
        left = x - width if "anchor" in line else x
        boxes.append(tradeoff.Box(left, y - 11, left + width, y + 3))
    dots = [numbers(line, "cx", "cy") for line in picture if "<circle" in line][3:]
    boxes += [tradeoff.Box(x - 4, y - 4, x + 4, y + 4) for x, y in dots]
    labels = boxes[: len(dots)]
    assert not [pair for pair in combinations(labels, 2) if pair[0].meets(pair[1])]
    assert not [1 for label in labels for dot in boxes[len(dots) :] if label.meets(dot)]
