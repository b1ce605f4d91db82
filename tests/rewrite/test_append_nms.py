"""NMS behind a detector: the detections of NMS by definition, and the plugin's form."""

import numpy as np
import onnx
import pytest

from reptrt.core.choices import DetectorForm
from reptrt.core.errors import RewriteError
from reptrt.core.nms_options import PLUGIN, NmsOptions
from reptrt.graph.net import model_from_net, net_from_model
from reptrt.linter.linter import lint_net
from reptrt.rewrite.append_nms import OUTPUTS, append_nms
from tests.support.detectors import (
    Kept,
    as_outputs,
    passing,
    random_boxes,
    suppress,
    tiny_detector,
)
from tests.support.helpers import ort_run

_ONE_TENSOR: tuple[DetectorForm, ...] = ("xywh-obj-cls", "ultralytics", "boxes-scores")


def _run(
    form: DetectorForm, boxes: np.ndarray, scores: np.ndarray, options: NmsOptions
) -> list[Kept]:
    outputs = as_outputs(form, boxes, scores)
    net = passing([output.shape[1:] for output in outputs])
    append_nms(net, "onnx", options)
    results = ort_run(model_from_net(net), {f"in{i}": item for i, item in enumerate(outputs)})
    assert tuple(results) == OUTPUTS
    return _kept(results, options.max_boxes)


def _kept(results: dict[str, np.ndarray], most: int) -> list[Kept]:
    """Return what each image keeps; places that are not used hold zeros."""
    number, boxes, scores, classes = results.values()
    batch = len(number)
    shapes = [array.shape for array in results.values()]
    assert shapes == [(batch, 1), (batch, most, 4), (batch, most), (batch, most)]
    assert [array.dtype.name for array in results.values()] == [
        "int32",
        "float32",
        "float32",
        "int32",
    ]
    kept = []
    for index, (count,) in enumerate(number):
        for array in (boxes, scores, classes):
            assert not array[index, count:].any()
        parts = (array[index, :count] for array in (boxes, scores, classes))
        kept.append(Kept(*parts))
    return kept


def _assert_equal(kept: Kept, expected: Kept) -> None:
    np.testing.assert_array_equal(kept.classes, expected.classes)
    np.testing.assert_allclose(kept.scores, expected.scores, rtol=1e-6)  # objectness * class
    np.testing.assert_allclose(kept.boxes, expected.boxes, atol=1e-4)  # of 100 pixels, float32


@pytest.mark.parametrize("form", _ONE_TENSOR)
@pytest.mark.parametrize("agnostic", [False, True], ids=["by-class", "agnostic"])
def test_the_detections_are_those_of_the_definition(form: DetectorForm, agnostic: bool) -> None:
    rng = np.random.default_rng(3)
    boxes, scores = random_boxes(rng, batch=3, rows=40, classes=3)
    options = NmsOptions(confidence=0.4, iou=0.5, max_boxes=50, class_agnostic=agnostic)
    found = _run(form, boxes, scores, options)
    expected = [suppress(b, s, 0.4, 0.5, 50, agnostic) for b, s in zip(boxes, scores, strict=True)]
    assert all(5 < len(item.scores) < 50 for item in expected)
    for kept, item in zip(found, expected, strict=True):
        _assert_equal(kept, item)


def test_more_boxes_than_places() -> None:
    boxes, scores = random_boxes(np.random.default_rng(4), batch=2, rows=60, classes=5)
    found = _run("boxes-scores", boxes, scores, NmsOptions(confidence=0.1, iou=0.9, max_boxes=7))
    for kept, b, s in zip(found, boxes, scores, strict=True):
        assert len(kept.scores) == 7
        _assert_equal(kept, suppress(b, s, 0.1, 0.9, 7))


@pytest.mark.parametrize("agnostic", [False, True], ids=["by-class", "agnostic"])
def test_images_without_boxes_and_fewer_rows_than_places(agnostic: bool) -> None:
    boxes, scores = random_boxes(np.random.default_rng(5), batch=3, rows=6, classes=2)
    scores[0] *= 0.5  # nothing above the confidence
    scores[2] = 0
    options = NmsOptions(confidence=0.5, max_boxes=100, class_agnostic=agnostic)
    found = _run("boxes-scores", boxes, scores, options)
    assert [len(kept.scores) for kept in found][::2] == [0, 0]
    _assert_equal(found[1], suppress(boxes[1], scores[1], 0.5, 0.65, 100, agnostic))
    nothing = _run("boxes-scores", boxes, 0 * scores, options)
    assert all(len(kept.scores) == 0 for kept in nothing)


def test_scores_of_classes_first_and_boxes_as_centre_and_size() -> None:
    boxes, scores = random_boxes(np.random.default_rng(6), batch=2, rows=30, classes=3)
    centres = np.concatenate(
        [(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], axis=2
    )
    by_class = np.ascontiguousarray(scores.transpose(0, 2, 1))
    net = passing([by_class.shape[1:], centres.shape[1:]])
    append_nms(net, "onnx", NmsOptions(boxes="xywh"))
    results = ort_run(model_from_net(net), {"in0": by_class, "in1": centres})
    for kept, b, s in zip(_kept(results, 100), boxes, scores, strict=True):
        _assert_equal(kept, suppress(b, s, 0.25, 0.65, 100))


@pytest.mark.parametrize("boxes_last", [False, True])
def test_scores_of_one_class_without_an_axis(boxes_last: bool) -> None:
    boxes, scores = random_boxes(np.random.default_rng(8), batch=2, rows=30, classes=1)
    given = np.ascontiguousarray(boxes.transpose(0, 2, 1)) if boxes_last else boxes
    net = passing([scores.shape[1:2], given.shape[1:]])
    append_nms(net, "onnx", NmsOptions(confidence=0.4, iou=0.5))
    results = ort_run(model_from_net(net), {"in0": scores[..., 0], "in1": given})
    for kept, b, s in zip(_kept(results, 100), boxes, scores, strict=True):
        assert len(kept.scores) > 3
        _assert_equal(kept, suppress(b, s, 0.4, 0.5, 100))


@pytest.mark.parametrize(
    ("bins", "classes"),
    [(1, 3), (17, 3), (1, 4)],
    ids=["distances", "distributions", "as many classes as distances"],
)
def test_raw_heads_are_decoded(bins: int, classes: int) -> None:
    model = tiny_detector("raw", classes=classes, size=32, bins=bins)
    images = np.random.default_rng(7).normal(0, 2, (2, 3, 32, 32)).astype(np.float32)
    heads = ort_run(model, {"images": images})
    boxes: list[list[list[float]]] = [[], []]
    scores: list[list[np.ndarray]] = [[], []]
    for level, stride in (("a", 4), ("b", 8)):
        cls, reg = heads[f"cls.{level}"], heads[f"reg.{level}.abs"]
        for image, y, x in np.ndindex(2, *cls.shape[2:]):
            sides = reg[image, :, y, x].astype(np.float64)
            if bins > 1:
                parts = np.exp(sides.reshape(4, bins))
                sides = (parts / parts.sum(axis=1, keepdims=True)) @ np.arange(bins)
            left, top, right, bottom = stride * sides
            cx, cy = (x + 0.5) * stride, (y + 0.5) * stride
            boxes[image].append([cx - left, cy - top, cx + right, cy + bottom])
            scores[image].append(1 / (1 + np.exp(-cls[image, :, y, x].astype(np.float64))))
    net = net_from_model(model)
    append_nms(net, "onnx", NmsOptions(confidence=0.6, iou=0.3, max_boxes=30))
    found = _kept(ort_run(model_from_net(net), {"images": images}), 30)
    for kept, b, s in zip(found, boxes, scores, strict=True):
        assert len(kept.scores) > 3
        _assert_equal(kept, suppress(np.array(b), np.array(s), 0.6, 0.3, 30))


def test_raw_scores_behind_a_sigmoid_get_no_second_one() -> None:
    net = net_from_model(tiny_detector("raw"))
    for index in (0, 2):
        logits = net.graph.outputs[index]
        scores = net.graph.layer(op="Sigmoid", inputs=[logits], outputs=[f"{logits.name}.scores"])
        scores[0].dtype, scores[0].shape = logits.dtype, logits.shape
        net.graph.outputs[index] = scores[0]
    append_nms(net, "onnx", NmsOptions())
    assert [node.op for node in net.graph.nodes].count("Sigmoid") == 2


@pytest.mark.parametrize(
    ("form", "coding"),
    [("xywh-obj-cls", 1), ("ultralytics", 1), ("raw", 0)],
    ids=["one-tensor", "ultralytics", "raw"],
)
def test_the_plugin_node(form: DetectorForm, coding: int) -> None:
    net = net_from_model(tiny_detector(form))
    append_nms(net, "plugin", NmsOptions(confidence=0.3, max_boxes=20))
    model = model_from_net(net)  # the checker of onnx takes it
    node = model.graph.node[-1]
    assert (node.op_type, node.domain, list(node.output)) == (PLUGIN, "trt.plugins", list(OUTPUTS))
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    thresholds = [attributes.pop(name) for name in ("score_threshold", "iou_threshold")]
    assert thresholds == pytest.approx([0.3, 0.65])
    assert attributes == {
        "plugin_version": b"1",
        "max_output_boxes": 20,
        "background_class": -1,
        "score_activation": 0,
        "class_agnostic": 0,
        "box_coding": coding,
    }
    assert {item.domain: item.version for item in model.opset_import}["trt.plugins"] == 1
    dims = [
        [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim]
        for o in model.graph.output
    ]
    assert dims == [["N", 1], ["N", 20, 4], ["N", 20], ["N", 20]]


def test_what_the_plugin_is_given_is_what_the_outputs_were() -> None:
    """Its inputs, made outputs again, are the boxes and scores of the detector."""
    model = tiny_detector("ultralytics")
    images = np.random.default_rng(8).normal(0, 2, (2, 3, 32, 32)).astype(np.float32)
    (rows,) = ort_run(model, {"images": images}).values()
    net = net_from_model(model)
    append_nms(net, "plugin", NmsOptions())
    plugin = net.graph.nodes[-1]
    inputs = list(plugin.inputs)
    plugin.inputs.clear()
    net.graph.outputs = inputs
    boxes, scores = ort_run(model_from_net(net), {"images": images}).values()
    np.testing.assert_array_equal(boxes, rows[:, :4].transpose(0, 2, 1))
    np.testing.assert_array_equal(scores, rows[:, 4:].transpose(0, 2, 1))


@pytest.mark.parametrize("form", ["plugin", "onnx"])
def test_the_linter_takes_both_forms(form: str) -> None:
    plain = net_from_model(tiny_detector())
    before = lint_net(plain).findings
    append_nms(plain, form, NmsOptions())  # type: ignore[arg-type]
    assert lint_net(net_from_model(model_from_net(plain))).findings == before


def test_half_precision_outputs_and_names_that_are_taken() -> None:
    boxes, scores = random_boxes(np.random.default_rng(9), batch=1, rows=10, classes=2)
    net = passing([(10, 4), (10, 2)], dtype=onnx.TensorProto.FLOAT16)
    net.graph.outputs[0].name = "detection_scores"
    append_nms(net, "onnx", NmsOptions())
    halves = {"in0": boxes.astype(np.float16), "in1": scores.astype(np.float16)}
    (kept,) = _kept(ort_run(model_from_net(net), halves), 100)
    rounded, exact = (halves[name][0].astype(np.float32) for name in ("in0", "in1"))
    _assert_equal(kept, suppress(rounded, exact, 0.25, 0.65, 100))


@pytest.mark.parametrize(
    ("shapes", "options", "reason"),
    [
        ([(10,)], NmsOptions(), "NMS cannot be appended: outputs .* of no detector known here"),
        ([(300, 6)], NmsOptions(), "state one with layout"),
        ([(300, 6)], NmsOptions(layout="xyxy-score-class"), "which needs no NMS"),
        ([(1,), (9, 4), (9,), (9,)], NmsOptions(), "which has NMS already"),
    ],
    ids=["classifier", "ambiguous", "no-need", "twice"],
)
def test_what_is_refused(shapes: list[tuple[int, ...]], options: NmsOptions, reason: str) -> None:
    with pytest.raises(RewriteError, match=reason):
        append_nms(passing(shapes), "onnx", options)


def test_an_old_opset_is_refused() -> None:
    with pytest.raises(RewriteError, match="opset 11, NMS needs 13 or later"):
        append_nms(passing([(10, 8)], opset=11), "onnx", NmsOptions())


def test_sizes_that_only_a_statement_tells() -> None:
    net = passing([(10, 8)])
    net.graph.outputs[0].shape = ["N", "a", "b"]
    net.graph.inputs[0].shape = ["N", "a", "b"]
    with pytest.raises(RewriteError, match=r"outputs \[1, \?, \?\]: sizes are not known"):
        append_nms(net.copy(), "onnx", NmsOptions())
    append_nms(net, "onnx", NmsOptions(layout="xywh-obj-cls"))
    boxes, scores = random_boxes(np.random.default_rng(10), batch=2, rows=10, classes=3)
    (rows,) = as_outputs("xywh-obj-cls", boxes, scores)
    found = _kept(ort_run(model_from_net(net), {"in0": rows}), 100)
    for kept, b, s in zip(found, boxes, scores, strict=True):
        _assert_equal(kept, suppress(b, s, 0.25, 0.65, 100))
