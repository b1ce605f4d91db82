"""What the outputs of a detector mean: by shape, by the number of classes, or stated."""

import re

import pytest

from reptrt.core.choices import DetectorForm
from reptrt.core.errors import ConfigError
from reptrt.graph.detector_layouts import DetectorLayout, layout_of_outputs


def _found(
    shapes: list[tuple[object, ...]], num_classes: int | None = None, form: DetectorForm = "auto"
) -> DetectorLayout:
    layout = layout_of_outputs(shapes, num_classes, form=form)
    assert isinstance(layout, DetectorLayout), layout
    return layout


@pytest.mark.parametrize(
    ("shapes", "num_classes", "form", "classes"),
    [
        ([(1, 2100, 8)], None, "xywh-obj-cls", 3),
        ([("batch", "boxes", 8)], 3, "xywh-obj-cls", 3),
        ([(1, 8, 2100)], 3, "xywh-obj-cls", 3),
        ([(2, 25200, 85), (2, 3, 80, 80, 85), (2, 3, 40, 40, 85)], 80, "xywh-obj-cls", 80),
        ([(1, 84, 8400)], None, "ultralytics", 80),
        ([(1, 8400, 84)], 80, "ultralytics", 80),
        ([(1, 84, 60)], 80, "ultralytics", 80),
        ([(1, 2100, 4), (1, 2100, 3)], None, "boxes-scores", 3),
        ([(1, 80, 8400), (1, 8400, 4)], 80, "boxes-scores", 80),
        ([(1, 2100, 4), (1, 2100)], None, "boxes-scores", 1),
        ([("n", "a"), ("n", 4, "a")], 1, "boxes-scores", 1),
        ([(1, 300, 6)], 80, "xyxy-score-class", None),
        ([(1, 1), (1, 100, 4), (1, 100), (1, 100)], 80, "nms", None),
        ([("n", 80, 40, 40), ("n", 68, 40, 40)], None, "raw", 80),
        ([("n", 32, 40, 40), ("n", 80, 40, 40)], 80, "raw", 80),
        ([("n", 3, 40, 40), ("n", 4, 40, 40), ("n", 3, 20, 20), ("n", 4, 20, 20)], 3, "raw", 3),
    ],
    ids=str,
)
def test_shapes_tell_the_layout(
    shapes: list[tuple[object, ...]], num_classes: int | None, form: str, classes: int | None
) -> None:
    layout = _found(shapes, num_classes)
    assert (layout.form, layout.num_classes) == (form, classes)


def test_which_output_holds_what_and_where_its_boxes_are() -> None:
    paddle = _found([(1, 80, 8400), (1, 8400, 4)])
    assert (paddle.outputs, paddle.boxes_last, paddle.boxes) == ((1, 0), (False, True), "xyxy")
    heads = _found([(1, 4, 20, 20), (1, 3, 20, 20), (1, 4, 40, 40), (1, 3, 40, 40)])
    assert heads.outputs == (3, 2, 1, 0)  # the finest grid first, scores before distances
    suppressed = _found([(1, 100, 4), (1, 100), (1,), (1, 100)])
    assert suppressed.outputs == (2, 0, 1, 3)
    transposed = _found([(1, 8, 2100)], 3)
    assert transposed.boxes_last == (True,)


def test_a_stated_form_and_stated_boxes_decide() -> None:
    assert _found([(1, 300, 6)], form="xywh-obj-cls").num_classes == 1
    assert _found([(1, 50, 4), (1, 50, 4)], form="boxes-scores").outputs == (0, 1)
    unknown = [("n", "a", 4), ("n", "a", "c")]
    assert _found(unknown, form="boxes-scores").num_classes is None
    layout = layout_of_outputs([(1, 50, 4), (1, 50, 2)], boxes="xywh")
    assert isinstance(layout, DetectorLayout)
    assert layout.boxes == "xywh"


FOUR_RAW = [(1, 4, 40, 40), (1, 4, 40, 40), (1, 4, 20, 20), (1, 4, 20, 20)]


@pytest.mark.parametrize(
    ("shapes", "names", "outputs"),
    [
        (FOUR_RAW, ("cls0", "reg0", "cls1", "reg1"), (0, 1, 2, 3)),
        (FOUR_RAW, ("bbox_pred_0", "scores_0", "bbox_pred_1", "scores_1"), (1, 0, 3, 2)),
        ([(1, 50, 4), (1, 50, 4)], ("pred_logits", "pred_boxes"), (1, 0)),
        ([(1, 50, 4), (1, 50, 4)], ("boxes", "confidence"), (0, 1)),
    ],
    ids=str,
)
def test_names_tell_boxes_from_four_classes(
    shapes: list[tuple[int, ...]], names: tuple[str, ...], outputs: tuple[int, ...]
) -> None:
    layout = layout_of_outputs(shapes, 4, names=names)
    assert isinstance(layout, DetectorLayout), layout
    assert (layout.num_classes, layout.outputs) == (4, outputs)


@pytest.mark.parametrize("names", [("cls_reg", "y"), ("boxes", "y"), ("boxes0", "boxes1")])
def test_names_that_do_not_tell(names: tuple[str, str]) -> None:
    layout = layout_of_outputs(FOUR_RAW[:2], 4, names=names)
    assert isinstance(layout, str)
    assert "in more than one order" in layout


def test_shapes_go_before_names() -> None:
    layout = layout_of_outputs([(1, 50, 4), (1, 50, 3)], names=("scores", "boxes"))
    assert isinstance(layout, DetectorLayout)
    assert layout.outputs == (0, 1)


@pytest.mark.parametrize(
    ("shapes", "num_classes", "form", "reason"),
    [
        ([(1, 1000)], None, "auto", r"outputs \[1, 1000\]: of no detector known here"),
        ([(1, 64, 20, 20), (1, 68, 20, 20)], None, "auto", "may be raw .* or raw .*"),
        ([(1, 32, 20, 20), (1, 80, 20, 20)], None, "auto", "of no detector known here"),
        ([(1, 2100, 8)], 80, "auto", "look like xywh-obj-cls .*3 classes.*, expected 80 classes"),
        ([(1, 300, 6)], 1, "auto", "may be xywh-obj-cls .* or xyxy-score-class .*--layout"),
        ([(1, 50, 4), (1, 50, 4)], None, "auto", "may be boxes-scores .* in more than one order"),
        ([("n", "a", "b")], None, "auto", r"outputs \[\?, \?, \?\]: sizes are .* --layout"),
        ([(1, 2100, 8)], None, "raw", "of no detector of form raw"),
        ([], None, "auto", "of no detector"),
    ],
    ids=str,
)
def test_why_a_layout_is_not_known(
    shapes: list[tuple[object, ...]], num_classes: int | None, form: DetectorForm, reason: str
) -> None:
    layout = layout_of_outputs(shapes, num_classes, form=form)
    assert isinstance(layout, str)
    assert re.search(reason, ConfigError(layout).on_cli())
