"""The section about detectors: precision of each class, over recall, and boxes on pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

from reptrt.runs.report.charts import curves, picture
from reptrt.runs.report.content import JsonObject, RunContent
from reptrt.runs.report.page import Block, Column, Figure, Figures, Legend, Section, Table, Text

_TITLE = "Detections"
_MOST_CURVES = 12  # classes with a figure: those whose precision changes most
_LEGEND = Legend((("before", "float"), ("after", "INT8")))


def is_detector(run: RunContent) -> bool:
    """Return whether a run judged a detector."""
    return run.manifest.options.get("task") == "detect"


def detections(run: RunContent) -> Section:
    """Return what the float net and the INT8 net find, side by side."""
    found, judged = run.detections.value, run.eval.value
    if found is None or judged is None:
        reason = run.detections.reason or run.eval.reason
        return Section("detections", _TITLE, absent=reason)
    classes = found["classes"]
    means = [row["classes"] for row in judged["results"]]
    blocks: list[Block] = [_by_class(classes, means), *_curves(found, means)]
    if found["pictures"]:
        blocks += [*_pictures(found)]
    return Section("detections", _TITLE, tuple(blocks))


def _by_class(classes: Sequence[str], means: Sequence[Mapping[str, float | None]]) -> Table:
    """Return the average precision of each class in both files."""
    columns = (
        *(Column("class", "name"), Column("float AP"), Column("INT8 AP")),
        Column("change"),
    )
    rows = []
    for name in classes:
        before, after = means[0].get(name), means[-1].get(name)
        change = _change(before, after)
        text = "-" if change is None else f"{100 * change:+.2f}"
        rows.append((name, _hundredths(before), _hundredths(after), text))
    caption = "Average precision of each class, mean over IoU 0.50 to 0.95"
    return Table(caption, columns, tuple(rows))


def _curves(found: JsonObject, means: Sequence[Mapping[str, float | None]]) -> list[Block]:
    classes, results = found["classes"], (found["results"][0], found["results"][-1])
    known = [index for index in range(len(classes)) if all(of["curves"][index] for of in results)]

    def changed(index: int) -> float:
        change = _change(*(of.get(classes[index]) for of in (means[0], means[-1])))
        return -abs(change or 0.0)

    shown = sorted(sorted(known, key=changed)[:_MOST_CURVES])
    if not shown:
        return []
    figures = []
    for index in shown:
        before, after = (of["curves"][index] for of in results)
        areas = [sum(curve) / len(curve) for curve in (before, after)]
        line = f"AP50 {100 * areas[0]:.1f} float, {100 * areas[1]:.1f} INT8"
        label = f"{classes[index]}: precision over recall, {line}"
        chart = curves([("before", before), ("after", after)], label)
        figures.append(Figure(classes[index], chart, (line,)))
    text = "Precision (up) over recall (right) at IoU 0.50, both from 0 to 1."
    if len(shown) < len(known):
        text += f" Shown are the {len(shown)} of {len(known)} classes whose AP changes most."
    return [Text(text), _LEGEND, Figures(tuple(figures))]


def _pictures(found: JsonObject) -> tuple[Block, ...]:
    results = (found["results"][0], found["results"][-1])
    figures = []
    for index, image in enumerate(found["pictures"]):
        both = [_boxes(of["boxes"][index], found["classes"], image) for of in results]
        counts = [len(boxes) for boxes in both]
        chart = picture(
            image["jpeg"],
            (image["width"], image["height"]),
            list(zip(("before", "after"), both, strict=True)),
            image["name"],
        )
        line = f"{counts[0]} boxes float (left), {counts[1]} INT8 (right)"
        figures.append(Figure(image["name"], chart, (line, f"{len(image['objects'])} annotated")))
    text = (
        f"What both nets find in {len(figures)} of the judged images, spread evenly: boxes with a "
        "score of 0.25 or more. The text is the class and the score in percent."
    )
    return Text(text), Figures(tuple(figures), wide=True)


def _boxes(
    boxes: Sequence[Sequence[float]], classes: Sequence[str], image: Mapping[str, Any]
) -> list[tuple[tuple[float, float, float, float], str]]:
    """Return boxes inside the image, with their texts; the most certain last, on top."""
    wide, high = image["width"], image["height"]
    shown = []
    for x1, y1, x2, y2, kind, score in reversed(boxes):
        left, right = (min(max(x, 0.0), wide) for x in (x1, x2))
        top, bottom = (min(max(y, 0.0), high) for y in (y1, y2))
        text = f"{classes[int(kind)]} {100 * score:.0f}"
        shown.append(((left, top, right, bottom), text))
    return shown


def _change(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _hundredths(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
