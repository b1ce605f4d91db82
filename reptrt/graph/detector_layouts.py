"""What the outputs of a detector mean, found by their shapes or stated.

N is the batch, A the number of boxes before suppression, C that of classes, K that of boxes behind
it, H x W the grid of a level. Boxes are in pixels of the network's input.

    xywh-obj-cls      (N, A, 5 + C)            box, objectness, a score for each class
    ultralytics       (N, 4 + C, A)            box, a score for each class
    boxes-scores      (N, A, 4), (N, A, C)     two tensors; (N, A) for one class
    raw               (N, C, H, W), (N, 4, H, W) for each level: scores before the sigmoid, and the
                      distances left, top, right, bottom of a cell's centre in cells (YOLOv6);
                      or their distributions over 0 to R - 1, (N, 4 R, H, W) (DFL)
    xyxy-score-class  (N, K, 6)                nets that need no suppression
    nms               (N, 1), (N, K, 4), (N, K), (N, K): number, boxes, scores, classes

A score is objectness times that of the class where there is an objectness. All but `raw` may have
the axis of the boxes last; a known number of classes says so. Where scores have the shape of boxes
(four classes), the names of the outputs tell which is which: ``cls0`` and ``reg0``.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from reptrt.core.choices import BoxForm, DetectorForm
from reptrt.core.errors import option

Shape = tuple[int | None, ...]  # None: not known

_BOX, _ROW = 4, 6  # numbers of a box; of a box with its score and class
_DISTRIBUTIONS = (64, 68)  # channels: 16 or 17 values for each side, as YOLO nets have them
_MOST_ROWS = 1000  # nets without suppression return fewer boxes, grids have more
_BOXES = re.compile(r"box|reg|dist|loc|coord|delta|offset", re.IGNORECASE)
_SCORES = re.compile(r"cls|class|score|conf|logit|prob", re.IGNORECASE)
_USUAL_BOXES: dict[DetectorForm, BoxForm] = {"xywh-obj-cls": "xywh", "ultralytics": "xywh"}


@dataclass(frozen=True, slots=True)
class DetectorLayout:
    """Which output of a network holds what."""

    form: DetectorForm
    outputs: tuple[int, ...]  # indices: boxes, scores; of raw: scores, distances of each level
    boxes: BoxForm  # xyxy: two corners; xywh: centre and size
    num_classes: int | None  # None: the shapes do not tell (xyxy-score-class, nms)
    boxes_last: tuple[bool, ...]  # of each of the outputs: A is its last axis, not the middle one

    def __str__(self) -> str:
        classes = "" if self.num_classes is None else f", {self.num_classes} classes"
        return f"{self.form} ({self.boxes}{classes})"


def layout_of_outputs(
    shapes: Sequence[Sequence[object]],
    num_classes: int | None = None,
    *,
    names: Sequence[str] = (),
    form: DetectorForm = "auto",
    boxes: BoxForm = "auto",
) -> DetectorLayout | str:
    """Return what the outputs of a detector mean, or one line that says why it is not known.

    Args:
        shapes: of all outputs, in their order; a dimension that is no positive int is not known.
        num_classes: how many classes the labels have, if known: it decides between forms.
        names: of all outputs, if known: they decide which one holds boxes if shapes do not.
        form: stated by the user; ``auto`` tries all of them.
        boxes: stated by the user; ``auto`` is what is usual for the form.

    >>> print(layout_of_outputs([("N", 2100, 8)]))
    xywh-obj-cls (xywh, 3 classes)
    >>> print(layout_of_outputs([(1, 84, 8400)]))
    ultralytics (xywh, 80 classes)
    >>> print(layout_of_outputs([(1, 1000)]))
    outputs [1, 1000]: of no detector known here
    """
    known = [_known(shape) for shape in shapes]
    found = list(dict.fromkeys(_readings(known, num_classes)))
    if form != "auto":
        found = [layout for layout in found if layout.form == form][:1] or _stated(known, form)
    fitting = [item for item in found if num_classes in (None, item.num_classes)]
    fitting += [item for item in found if num_classes is not None and item.num_classes is None]
    fitting = [item for item in fitting if _is_named(item, names)] or fitting
    if len(fitting) == 1:
        return fitting[0] if boxes == "auto" else replace(fitting[0], boxes=boxes)
    where = "outputs " + ", ".join(_text(shape) for shape in known)
    if not found and form == "auto" and any(None in shape[1:] for shape in known):
        return f"{where}: sizes are not known; state what they mean with {option('layout')}"
    if not found:
        kind = "detector known here" if form == "auto" else f"detector of form {form}"
        return f"{where}: of no {kind}"
    names = " or ".join(dict.fromkeys(map(str, found)))
    if not fitting:
        return f"{where}: look like {names}, expected {num_classes} classes"
    if len({layout.form for layout in fitting}) == 1:
        names += " in more than one order"
    return f"{where}: may be {names}; state one with {option('layout')}"


def _is_named(layout: DetectorLayout, names: Sequence[str]) -> bool:
    """Return whether the names of all outputs say what the layout says."""
    if not names or layout.form not in ("raw", "boxes-scores"):
        return False
    roles = (_SCORES, _BOXES) if layout.form == "raw" else (_BOXES, _SCORES)
    return all(
        roles[place % 2].search(names[index]) and not roles[1 - place % 2].search(names[index])
        for place, index in enumerate(layout.outputs)
    )


def _known(shape: Sequence[object]) -> Shape:
    return tuple(size if isinstance(size, int) and size > 0 else None for size in shape)


def _text(shape: Shape) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def _readings(shapes: Sequence[Shape], num_classes: int | None) -> Iterator[DetectorLayout]:
    """Yield everything that outputs of these shapes may be."""
    ranks = [len(shape) for shape in shapes]
    if ranks.count(3) == 1 and set(ranks) <= {3, 5}:  # YOLOv5 returns its heads too, of rank 5
        index = ranks.index(3)
        yield from _one_tensor(shapes[index], index, num_classes)
    elif ranks == [3, 3]:
        yield from _two_tensors(shapes)
    elif sorted(ranks) == [2, 3]:
        yield from _one_class(shapes, ranks.index(3))
    elif ranks and set(ranks) == {4} and len(ranks) % 2 == 0:
        yield from _levels(shapes, num_classes)
    elif sorted(ranks) in ([2, 2, 2, 3], [1, 2, 2, 3]):
        yield from _suppressed(shapes)


def _one_tensor(shape: Shape, index: int, num_classes: int | None) -> Iterator[DetectorLayout]:
    forms: dict[DetectorForm, int] = {"xywh-obj-cls": _BOX + 1, "ultralytics": _BOX}
    for boxes_last in (False, True):
        rows, columns = _axes(shape, boxes_last)
        if columns is None:
            continue
        is_usual = rows is None or rows > columns
        for form, first in forms.items():
            usual_axis = boxes_last == (form == "ultralytics")
            count = columns - first
            if count >= 1 and (count == num_classes or (is_usual and usual_axis)):
                yield _layout(form, (index,), count, (boxes_last,))
        if columns == _ROW and (rows is None or rows <= _MOST_ROWS) and is_usual:
            yield _layout("xyxy-score-class", (index,), None, (boxes_last,))


def _two_tensors(shapes: Sequence[Shape]) -> Iterator[DetectorLayout]:
    for first, second in ((0, 1), (1, 0)):
        for boxes_last in (False, True):
            rows, columns = _axes(shapes[first], boxes_last)
            if columns != _BOX:
                continue
            for scores_last in (False, True):
                others, classes = _axes(shapes[second], scores_last)
                if classes is not None and (others == rows or None in (others, rows)):
                    last = (boxes_last, scores_last)
                    yield _layout("boxes-scores", (first, second), classes, last)


def _one_class(shapes: Sequence[Shape], boxes: int) -> Iterator[DetectorLayout]:
    """Yield boxes with one score each, (N, A)."""
    count = shapes[1 - boxes][1]
    for boxes_last in (False, True):
        rows, columns = _axes(shapes[boxes], boxes_last)
        if columns == _BOX and (count == rows or None in (count, rows)):
            yield _layout("boxes-scores", (boxes, 1 - boxes), 1, (boxes_last, False))


def _levels(shapes: Sequence[Shape], num_classes: int | None) -> Iterator[DetectorLayout]:
    """Yield pairs of scores and distances with one grid each, the finest grid first."""
    grids: dict[Shape, list[int]] = {}
    for index, shape in enumerate(shapes):
        if None in shape[1:]:
            return
        grids.setdefault(shape[2:], []).append(index)
    pairs = [grids[key] for key in sorted(grids, key=lambda grid: -(grid[0] or 0))]
    if any(len(pair) != 2 for pair in pairs):
        return
    channels = [{shapes[pair[role]][1] or 0 for pair in pairs} for role in (0, 1)]
    if any(len(counts) != 1 for counts in channels):
        return
    orders = [(0, 1), (1, 0)]
    if {_BOX} in channels:  # what is not distributed is taken for the distances
        orders = [order for order in orders if channels[order[1]] == {_BOX}]
    for scores, distances in orders:
        count, sides = *channels[scores], *channels[distances]
        is_known = num_classes == count and sides % _BOX == 0
        if sides == _BOX or is_known or sides in _DISTRIBUTIONS:
            outputs = tuple(i for pair in pairs for i in (pair[scores], pair[distances]))
            yield _layout("raw", outputs, count, (True,) * len(outputs))


def _suppressed(shapes: Sequence[Shape]) -> Iterator[DetectorLayout]:
    boxes = next(i for i, shape in enumerate(shapes) if len(shape) == 3)
    numbers = [i for i, shape in enumerate(shapes) if len(shape) == 1 or shape[1:] == (1,)]
    if shapes[boxes][2] == _BOX and len(numbers) == 1:
        scores, classes = (i for i in range(4) if i not in (boxes, numbers[0]))
        outputs = (numbers[0], boxes, scores, classes)
        yield _layout("nms", outputs, None, (False,) * 4)


def _stated(shapes: Sequence[Shape], form: DetectorForm) -> list[DetectorLayout]:
    """Return the usual layout of a stated form, whose tensors have sizes that are not known."""
    unknown = [len(shape) == 3 and None in shape[1:] for shape in shapes]
    last = {"xywh-obj-cls": (False,), "ultralytics": (True,), "boxes-scores": (False, False)}
    if not all(unknown) or form not in last or len(shapes) != len(last[form]):
        return []
    return [_layout(form, tuple(range(len(shapes))), None, last[form])]


def _axes(shape: Shape, boxes_last: bool) -> tuple[int | None, int | None]:
    """Return the number of boxes and of columns of a tensor of rank 3."""
    return (shape[2], shape[1]) if boxes_last else (shape[1], shape[2])


def _layout(
    form: DetectorForm,
    outputs: tuple[int, ...],
    num_classes: int | None,
    boxes_last: tuple[bool, ...],
) -> DetectorLayout:
    boxes = _USUAL_BOXES.get(form, "xyxy")
    return DetectorLayout(form, outputs, boxes, num_classes, boxes_last)
