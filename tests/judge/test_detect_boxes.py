import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from reptrt.graph.preprocess import Fit
from reptrt.judge.detect.boxes import Detections, suppress
from tests.support.helpers import ort_run


def random_boxes(count: int, rng: np.random.Generator) -> np.ndarray:
    corner, size = rng.uniform(0, 80, (count, 2)), rng.uniform(5, 40, (count, 2))
    return np.concatenate([corner, corner + size], axis=1).astype(np.float32)


def onnx_nms(iou: float, confidence: float) -> onnx.ModelProto:
    names = {
        "most": (np.int64, 10_000),
        "iou": (np.float32, iou),
        "least": (np.float32, confidence),
    }
    constants = [
        onnx.numpy_helper.from_array(np.array([value], kind), name)
        for name, (kind, value) in names.items()
    ]
    node = helper.make_node("NonMaxSuppression", ["boxes", "scores", *names], ["indices"])
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 3)
        for name in ("boxes", "scores")
    ]
    output = helper.make_tensor_value_info("indices", TensorProto.INT64, [None, 3])
    graph = helper.make_graph([node], "nms", inputs, [output], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(("count", "classes", "iou"), [(40, 1, 0.3), (300, 3, 0.5), (700, 5, 0.65)])
def test_suppression_is_that_of_onnxruntime(count: int, classes: int, iou: float) -> None:
    """More candidates than a block, so that blocks are compared with what earlier ones kept."""
    rng = np.random.default_rng(count)
    boxes = random_boxes(count, rng)
    scores = rng.uniform(0, 1, (count, classes)).astype(np.float32)
    model = onnx_nms(iou, 0.2)
    feeds = {"boxes": boxes[None], "scores": np.ascontiguousarray(scores.T)[None]}
    chosen = ort_run(model, feeds)["indices"]
    expected = sorted(((float(scores[b, k]), int(k), int(b)) for _, k, b in chosen), reverse=True)
    assert 20 < len(expected) < count * classes

    for most in (10_000, 20):
        found = suppress(boxes, scores, confidence=0.2, iou=iou, max_boxes=most)
        kept = expected[:most]
        np.testing.assert_allclose(found.scores, [score for score, _, _ in kept])
        assert found.classes.tolist() == [k for _, k, _ in kept]
        np.testing.assert_array_equal(found.boxes, boxes[[b for _, _, b in kept]])


def test_nothing_above_the_confidence() -> None:
    boxes, scores = random_boxes(9, np.random.default_rng(0)), np.full((9, 2), 0.5)
    found = suppress(boxes, scores, confidence=0.5, iou=0.5, max_boxes=10)
    assert found.boxes.shape == (0, 4)
    assert len(found.scores) == len(found.classes) == 0


def test_boxes_that_touch_or_have_no_area_stay() -> None:
    boxes = np.array([[0, 0, 10, 10], [10, 0, 20, 10], [3, 3, 3, 3], [3, 3, 3, 3]], np.float32)
    found = suppress(boxes, np.full((4, 1), 0.5), confidence=0.1, iou=0.0, max_boxes=10)
    assert len(found.boxes) == 4


def test_detections_return_to_the_image() -> None:
    fit = Fit(40, 80, 32, 64, 16, 0)  # scaled by 0.8, 16 pixels of grey above
    boxes = np.array([[8.0, 24.0, 16.0, 32.0], [-8.0, 0.0, 64.0, 64.0]])
    found = Detections(boxes, np.array([0.9, 0.8]), np.array([1, 0]))
    whole = found.in_image(fit, clip=False)
    np.testing.assert_allclose(whole.boxes, [[10, 10, 20, 20], [-10, -20, 80, 60]])
    np.testing.assert_allclose(found.in_image(fit, clip=True).boxes[1], [0, 0, 80, 40])
    assert whole.classes.tolist() == [1, 0]
