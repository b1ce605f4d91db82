"""The boxes and scores in the outputs of a detector, as its layout says where they are.

`reptrt.graph.detector_layouts` finds the layout by shapes. Here the values of the first images add
what shapes do not tell: whether boxes are corners or centres (boxes-scores), whether they are in
pixels or in parts of the input, and whether raw scores are before the sigmoid.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from reptrt.core.arrays import FloatArray
from reptrt.core.choices import BoxForm
from reptrt.core.errors import ArtifactError, ConfigError, option
from reptrt.graph.detector_layouts import DetectorLayout, layout_of_outputs
from reptrt.graph.preprocess import Preprocess
from reptrt.judge.detect.boxes import Detections, suppress
from reptrt.judge.options import TaskOptions
from reptrt.judge.outputs import Outputs

_PART_OF_INPUT = 2.0  # boxes whose every number is below this are parts of the input, not pixels
_CORNERS, _CENTRES = 0.99, 0.9  # parts of boxes with x1 < x2 and y1 < y2
_SLACK = 0.05  # that scores of a quantized net may lie outside 0..1
_SUPPRESSED = ("nms", "xyxy-score-class")  # forms of nets that have suppressed boxes themselves


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads the outputs of one network."""

    layout: DetectorLayout
    boxes: BoxForm
    is_part: bool  # boxes are parts of the input, 0..1
    has_logits: bool  # scores are before the sigmoid
    has_background: bool  # the first score is that of no object
    height: int  # of the input
    width: int

    def detections(self, outputs: Outputs, options: TaskOptions) -> Iterator[Detections]:
        """Yield what was found in each image, in pixels of the input."""
        if self.layout.form in _SUPPRESSED:
            yield from self._suppressed(outputs, options)
            return
        for boxes, scores in zip(*self.candidates(outputs), strict=True):
            yield suppress(
                boxes,
                scores,
                confidence=options.confidence,
                iou=options.iou,
                max_boxes=options.max_boxes,
            )

    def candidates(self, outputs: Outputs) -> tuple[FloatArray, FloatArray]:
        """Return boxes (n, A, 4), x1 y1 x2 y2 in pixels, and scores (n, A, C), 0 to 1.

        For layouts before non-maximum suppression.
        """
        if self.layout.form == "raw":
            return self._of_levels(_taken(outputs, self.layout))
        boxes, scores = _boxes_and_scores(outputs, self.layout)
        return self._in_pixels(boxes), scores[..., 1:] if self.has_background else scores

    def _in_pixels(self, boxes: FloatArray) -> FloatArray:
        if self.boxes == "xywh":
            centre, half = boxes[..., :2], boxes[..., 2:] / 2
            boxes = np.concatenate([centre - half, centre + half], axis=-1)
        sides = np.array([self.width, self.height] * 2, np.float32)
        return boxes * sides if self.is_part else boxes

    def _of_levels(self, maps: list[FloatArray]) -> tuple[FloatArray, FloatArray]:
        """Return the boxes and scores of all levels.

        Cell (i, j) of a level with stride s stands at ((j + 1/2) s, (i + 1/2) s); its distances d
        to the left, top, right and bottom side of the box are in strides:

            x1 = (j + 1/2 - d[0]) s    y1 = (i + 1/2 - d[1]) s    x2 = (j + 1/2 + d[2]) s    ...
        """
        boxes, scores = [], []
        for values, sides in zip(maps[::2], maps[1::2], strict=True):
            n, count, rows, columns = values.shape
            strides = np.array([self.width / columns, self.height / rows] * 2, np.float32)
            y, x = np.mgrid[:rows, :columns].astype(np.float32) + np.float32(0.5)
            centres = np.stack([x, y, x, y], axis=-1).reshape(-1, 4)
            distances = _distances(sides).reshape(n, 4, -1).transpose(0, 2, 1)
            signs = np.array([-1, -1, 1, 1], np.float32)
            boxes.append((centres + signs * distances) * strides)
            rows_of_scores = values.reshape(n, count, -1).transpose(0, 2, 1)
            scores.append(_sigmoid(rows_of_scores) if self.has_logits else rows_of_scores)
        return np.concatenate(boxes, axis=1), np.concatenate(scores, axis=1)

    def _suppressed(self, outputs: Outputs, options: TaskOptions) -> Iterator[Detections]:
        """Yield the boxes that a network has chosen itself."""
        taken = _taken(outputs, self.layout)
        if self.layout.form == "nms":
            numbers, boxes, scores, classes = taken
            counts = numbers.reshape(-1).astype(np.int64)
        else:
            rows = _boxes_first(taken[0], *self.layout.boxes_last)
            boxes, scores, classes = rows[..., :4], rows[..., 4], rows[..., 5]
            counts = np.full(len(rows), rows.shape[1])
        boxes = self._in_pixels(boxes)
        for index, count in enumerate(counts):
            kept = np.flatnonzero(scores[index, :count] > options.confidence)
            kept = kept[np.argsort(-scores[index, kept], kind="stable")][: options.max_boxes]
            yield Detections(
                boxes[index, kept].astype(np.float64),
                scores[index, kept].astype(np.float64),
                classes[index, kept].astype(np.int64),
            )


def reader_of(
    name: str,
    outputs: Outputs,
    preprocess: Preprocess,
    options: TaskOptions,
    num_classes: int | None = None,
) -> Reader:
    """Return what reads the outputs of a network, from its outputs for some images.

    Args:
        name: of the network, for messages.
        outputs: (n, ...), in the order of the network.
        preprocess: of the network; says the size of its input.
        options: may state the layout.
        num_classes: that are expected; None: as many as the outputs have.

    Raises:
        ConfigError: the outputs have no known layout, or more than one.
        ArtifactError: scores that are none.
    """
    values = list(outputs.values())
    if len(values) == 1 and values[0].ndim == 2:
        raise ConfigError(
            f"{name}: its output [N, {values[0].shape[1]}] has no boxes; expected a detector: "
            f"judge scores of classes with {option('task', 'classify')}"
        )
    shapes = [("N", *value.shape[1:]) for value in values]
    layout_for = partial(
        layout_of_outputs, shapes, names=list(outputs), form=options.layout, boxes=options.boxes
    )
    layout = layout_for(num_classes)
    with_background = _with_background(outputs, options, num_classes)
    has_background = isinstance(layout, str) and with_background is not None
    layout = with_background if has_background and with_background is not None else layout
    if isinstance(layout, str):
        raise ConfigError(f"{name}: {layout}")
    usual = layout_for()
    known = (None, layout.num_classes)
    if isinstance(usual, DetectorLayout) and usual.num_classes not in known:
        raise ConfigError(
            f"{name}: outputs look like {usual}, the annotations have {num_classes} categories; "
            f"expected as many, or state {option('layout')} if it is {layout}"
        )
    boxes = layout.boxes
    is_part = has_logits = False
    if layout.form == "raw":
        maps = _taken(outputs, layout)[::2]
        has_logits = any(of.min(initial=0) < 0 or of.max(initial=0) > 1 for of in maps)
    elif layout.form in _SUPPRESSED:
        taken = _taken(outputs, layout)
        found = taken[1] if layout.form == "nms" else _boxes_first(taken[0], *layout.boxes_last)
        is_part = _is_part(found[..., :4])
    else:
        found, scores = _boxes_and_scores(outputs, layout)
        is_part = _is_part(found)
        _check_scores(name, scores, layout)
        if layout.form == "boxes-scores" and options.boxes == "auto":
            boxes = _form_of_boxes(name, found)
    size = (preprocess.height, preprocess.width)
    return Reader(layout, boxes, is_part, has_logits, has_background, *size)


def _with_background(
    outputs: Outputs, options: TaskOptions, num_classes: int | None
) -> DetectorLayout | None:
    """Return boxes and scores whose first one is that of no object, as SSD has them, if they are.

    There is one score more than classes, and the scores of a box add up to 1.
    """
    if num_classes is None or options.layout not in ("auto", "boxes-scores"):
        return None
    shapes = [("N", *value.shape[1:]) for value in outputs.values()]
    layout = layout_of_outputs(shapes, num_classes + 1, form="boxes-scores", boxes=options.boxes)
    if isinstance(layout, str):
        return None
    _, scores = _boxes_and_scores(outputs, layout)
    return layout if bool((np.abs(scores.sum(axis=-1) - 1) < _SLACK).all()) else None


def _taken(outputs: Outputs, layout: DetectorLayout) -> list[FloatArray]:
    values: list[FloatArray] = list(outputs.values())
    return [values[index] for index in layout.outputs]


def _boxes_first(values: FloatArray, boxes_last: bool) -> FloatArray:
    """Return (n, A, columns), one column if there are none."""
    if values.ndim == 2:
        return values[..., None]
    return values.transpose(0, 2, 1) if boxes_last else values


def _boxes_and_scores(outputs: Outputs, layout: DetectorLayout) -> tuple[FloatArray, FloatArray]:
    """Return boxes (n, A, 4) as they are, and scores (n, A, C)."""
    pairs = zip(_taken(outputs, layout), layout.boxes_last, strict=True)
    values = [_boxes_first(value, last) for value, last in pairs]
    if layout.form == "boxes-scores":
        return values[0], values[1]
    (rows,) = values
    if layout.form == "xywh-obj-cls":
        return rows[..., :4], rows[..., 4:5] * rows[..., 5:]
    return rows[..., :4], rows[..., 4:]


def _is_part(boxes: FloatArray) -> bool:
    return bool(boxes.size and np.abs(boxes).max() < _PART_OF_INPUT)


def _form_of_boxes(name: str, boxes: FloatArray) -> BoxForm:
    """Return whether boxes are two corners, or centre and size, by their values."""
    ordered = float((boxes[..., 2:] >= boxes[..., :2]).all(axis=-1).mean())
    if _CENTRES < ordered < _CORNERS:
        raise ConfigError(
            f"{name}: {100 * ordered:.0f} % of its boxes may be two corners, expected all or few; "
            f"give {option('boxes', 'xyxy')} for corners or {option('boxes', 'xywh')} for centre "
            "and size"
        )
    return "xyxy" if ordered >= _CORNERS else "xywh"


def _check_scores(name: str, scores: FloatArray, layout: DetectorLayout) -> None:
    low, high = float(scores.min(initial=0)), float(scores.max(initial=0))
    if low < -_SLACK or high > 1 + _SLACK:
        raise ArtifactError(
            f"{name}: scores between {low:.3g} and {high:.3g} ({layout.form}), expected 0 to 1; "
            f"export the net with its sigmoid or softmax, or state {option('layout')}"
        )


def _distances(sides: FloatArray) -> FloatArray:
    """Return distances (n, 4, H, W); the expected values of distributions (n, 4 R, H, W) (DFL)."""
    n, channels, rows, columns = sides.shape
    if channels == 4:
        return sides
    numbers = sides.reshape(n, 4, channels // 4, rows, columns)
    powers = np.exp(numbers - numbers.max(axis=2, keepdims=True))
    steps = np.arange(channels // 4, dtype=np.float32)[:, None, None]
    expected: FloatArray = (powers * steps).sum(axis=2) / powers.sum(axis=2)
    return expected


def _sigmoid(values: FloatArray) -> FloatArray:
    sigmoid: FloatArray = 0.5 * (1 + np.tanh(0.5 * values))
    return sigmoid
