from dataclasses import replace

import numpy as np
import pytest

from reptrt.core.errors import ArtifactError, ConfigError
from reptrt.graph.preprocess import Preprocess
from reptrt.judge.detect.reader import reader_of
from reptrt.judge.options import EvaluateOptions

RNG = np.random.default_rng(4)
HEIGHT, WIDTH, CLASSES, COUNT = 64, 96, 3, 50
PREPROCESS = Preprocess.plain(3, HEIGHT, WIDTH)
CORNER = RNG.uniform(0, 40, (2, COUNT, 2)).astype(np.float32)
EXTENT = RNG.uniform(4, 30, (2, COUNT, 2)).astype(np.float32)
XYXY = np.concatenate([CORNER, CORNER + EXTENT], axis=2)
XYWH = np.concatenate([CORNER + EXTENT / 2, EXTENT], axis=2)
SCORES = RNG.uniform(0, 1, (2, COUNT, CLASSES)).astype(np.float32)
OBJECT = RNG.uniform(0, 1, (2, COUNT, 1)).astype(np.float32)
PART = np.array([WIDTH, HEIGHT] * 2, np.float32)

LAYOUTS = {
    "xywh-obj-cls": ({"y": np.concatenate([XYWH, OBJECT, SCORES], 2)}, OBJECT * SCORES),
    "ultralytics": ({"y": np.concatenate([XYWH, SCORES], 2).transpose(0, 2, 1)}, SCORES),
    "corners": ({"boxes": XYXY, "scores": SCORES}, SCORES),
    "centres": ({"boxes": XYWH, "scores": SCORES}, SCORES),
    "scores first": ({"scores": SCORES, "boxes": XYXY}, SCORES),
    "parts of the input": ({"boxes": XYXY / PART, "scores": SCORES}, SCORES),
}


@pytest.mark.parametrize("known", [1, None])
def test_one_class_may_have_no_axis(known: int | None) -> None:
    outputs = {"boxes": XYXY, "scores": SCORES[..., 0]}
    reader = reader_of("net", outputs, PREPROCESS, EvaluateOptions(task="detect"), known)
    boxes, scores = reader.candidates(outputs)
    np.testing.assert_array_equal(boxes, XYXY)
    np.testing.assert_array_equal(scores, SCORES[..., :1])


@pytest.mark.parametrize("known", [CLASSES, None], ids=["classes known", "not known"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_boxes_and_scores_of_a_layout(name: str, known: int | None) -> None:
    outputs, expected = LAYOUTS[name]
    reader = reader_of("net", outputs, PREPROCESS, EvaluateOptions(task="detect"), known)
    boxes, scores = reader.candidates(outputs)
    np.testing.assert_allclose(boxes, XYXY, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_the_first_score_may_be_that_of_no_object() -> None:
    """SSD: one score more than classes, which add up to 1."""
    scores = np.concatenate([OBJECT, SCORES], axis=2)
    outputs = {"boxes": XYXY, "scores": scores / scores.sum(axis=2, keepdims=True)}
    reader = reader_of("net", outputs, PREPROCESS, EvaluateOptions(task="detect"), CLASSES)
    boxes, found = reader.candidates(outputs)
    np.testing.assert_array_equal(boxes, XYXY)
    np.testing.assert_array_equal(found, outputs["scores"][..., 1:])
    message = refused({"boxes": XYXY, "scores": scores}, CLASSES)
    assert "4 classes), expected 3 classes" in message


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


@pytest.mark.parametrize("bins", [1, 16, 17], ids=["distances", "DFL 16", "DFL 17"])
@pytest.mark.parametrize("logits", [True, False])
def test_raw_heads_cell_by_cell(bins: int, logits: bool) -> None:
    outputs, boxes, scores = {}, [], []
    for rows, columns in ((4, 6), (8, 12)):  # the coarse level first
        stride = HEIGHT // rows
        values = RNG.normal(-1, 2, (2, CLASSES, rows, columns)).astype(np.float32)
        probabilities = 1 / (1 + np.exp(-values.astype(np.float64)))
        sides = RNG.uniform(0, 4, (2, 4 * bins, rows, columns)).astype(np.float32)
        outputs[f"cls{rows}"] = values if logits else probabilities.astype(np.float32)
        outputs[f"reg{rows}"] = sides
        level_boxes, level_scores = [], []
        for i in range(rows):
            for j in range(columns):
                numbers = sides[:, :, i, j].reshape(2, 4, bins)
                d = numbers[:, :, 0]
                if bins > 1:
                    d = np.array([[softmax(of) @ np.arange(bins) for of in n] for n in numbers])
                x, y = j + 0.5, i + 0.5
                box = np.stack([x - d[:, 0], y - d[:, 1], x + d[:, 2], y + d[:, 3]], 1) * stride
                level_boxes.append(box)
                level_scores.append(probabilities[:, :, i, j])
        boxes[:0], scores[:0] = level_boxes, level_scores  # the reader has the fine level first
    reader = reader_of("net", outputs, PREPROCESS, EvaluateOptions(task="detect"), CLASSES)
    got_boxes, got_scores = reader.candidates(outputs)
    np.testing.assert_allclose(got_boxes, np.stack(boxes, 1), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(got_scores, np.stack(scores, 1), rtol=1e-4, atol=1e-6)


def test_boxes_that_the_net_has_suppressed_itself() -> None:
    options = EvaluateOptions(task="detect", confidence=0.3, max_boxes=2)
    boxes = XYXY[:, :8]
    scores, classes = np.full((2, 8), 0.1, np.float32), np.zeros((2, 8), np.int32)
    scores[:, :4] = [[0.5, 0.9, 0.2, 0.8], [0.7, 0.9, 0.1, 0.1]]
    classes[0, :4] = [0, 1, 2, 2]
    four = {"num": np.array([[4], [1]], np.int32), "b": boxes, "s": scores, "c": classes}
    rows = np.concatenate([boxes, scores[..., None], classes[..., None].astype(np.float32)], 2)
    for outputs, second in ((four, [0.7]), ({"y": rows}, [0.9, 0.7])):
        asked = replace(options, layout="auto" if len(outputs) == 4 else "xyxy-score-class")
        reader = reader_of("net", outputs, PREPROCESS, asked, CLASSES)
        first, other = reader.detections(outputs, asked)
        np.testing.assert_allclose(first.scores, [0.9, 0.8])
        assert first.classes.tolist() == [1, 2]
        np.testing.assert_allclose(first.boxes, boxes[0, [1, 3]])
        np.testing.assert_allclose(other.scores, second)


# --- what cannot be read -------------------------------------------------------------------------


def refused(outputs: dict[str, np.ndarray], known: int | None, **options: object) -> str:
    asked = EvaluateOptions(task="detect", **options)  # type: ignore[arg-type]
    with pytest.raises((ConfigError, ArtifactError)) as caught:
        reader_of("net.onnx", outputs, PREPROCESS, asked, known)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_classifier_is_no_detector() -> None:
    message = refused({"logits": np.zeros((2, 10), np.float32)}, 10)
    assert "output [N, 10] has no boxes" in message
    assert "task='classify'" in message


def test_another_number_of_classes() -> None:
    message = refused({"y": np.zeros((2, 400, 8), np.float32)}, 4)
    assert "look like xywh-obj-cls (xywh, 3 classes)" in message
    assert "4 categories; expected as many" in message
    message = refused({"y": np.zeros((2, 400, 8), np.float32)}, 9)
    assert "expected 9 classes" in message


def test_ambiguous_shapes() -> None:
    outputs = {"y": np.zeros((2, 7, 8), np.float32)}
    message = refused(outputs, 3)
    assert "may be" in message
    assert "state one with layout" in message
    assert reader_of("n", outputs, PREPROCESS, EvaluateOptions(layout="ultralytics"), 3) is not None


def test_boxes_that_may_be_both() -> None:
    mixed = np.concatenate([XYXY[:, :47], XYXY[:, 47:, [2, 3, 0, 1]]], axis=1)
    message = refused({"boxes": mixed, "scores": SCORES}, CLASSES)
    assert "94 % of its boxes may be two corners" in message
    assert "boxes='xyxy'" in message
    asked = EvaluateOptions(boxes="xywh")
    assert reader_of("n", {"b": mixed, "s": SCORES}, PREPROCESS, asked, CLASSES).boxes == "xywh"


def test_scores_before_the_sigmoid() -> None:
    message = refused({"boxes": XYXY, "scores": 10 * SCORES - 5}, CLASSES)
    assert "expected 0 to 1" in message
