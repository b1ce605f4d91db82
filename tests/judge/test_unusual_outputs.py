"""Outputs that are no real values of one image: integers, or what torch cannot run."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import reptrt
from reptrt.judge.outputs import paired
from tests.pipeline.test_tails import IMAGES, detector
from tests.support.onnx_nets import Builder


def test_integers_are_left_out_beside_real_values() -> None:
    real, classes = np.zeros((2, 3), np.float32), np.zeros(2, np.int64)
    both = {"classes": classes, "scores": real}
    assert list(paired(both, both)) == ["scores"]
    assert list(paired(both, {"scores": real})) == ["scores"]  # torch computes no ArgMax here
    assert list(paired({"classes": classes}, {"classes": classes})) == ["classes"]
    renamed = {"pixels": real, "scores": real}
    assert list(paired({"boxes": real, "scores": real}, renamed)) == ["boxes", "scores"]


def segmentation() -> onnx.ModelProto:
    """Classes of pixels come first, then the scores."""
    b = Builder()
    scores = b.conv(b.relu(b.conv("x", 16, "body")), 5, "scores", 1, pads=[0] * 4)
    model = b.model(scores)
    node = helper.make_node("ArgMax", [scores], ["classes"], "argmax", axis=1, keepdims=0)
    model.graph.node.append(node)
    classes = helper.make_tensor_value_info("classes", TensorProto.INT64, ["N", 8, 8])
    model.graph.output.insert(0, classes)
    return model


def by_the_batch() -> onnx.ModelProto:
    """An If that looks at the largest value of the whole batch."""
    b = Builder()
    logits = b.head(b.relu(b.conv(b.relu(b.conv("x", 16, "body")), 16, "c2")))
    model = b.model(logits)
    del model.graph.output[:]
    branches = {}
    for role, op in (("then_branch", "Neg"), ("else_branch", "Abs")):
        made = helper.make_tensor_value_info(op, TensorProto.FLOAT, ["N", 5])
        node = helper.make_node(op, [logits], [op], op)
        branches[role] = helper.make_graph([node], op, [], [made])
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0), "zero"))
    model.graph.node.extend(
        [
            helper.make_node("ReduceMax", [logits], ["most"], "most", keepdims=0),
            helper.make_node("Greater", ["most", "zero"], ["flag"], "flag"),
            helper.make_node("If", ["flag"], ["y"], "tail", **branches),
        ]
    )
    model.graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5]))
    return model


@pytest.mark.slow
def test_a_ladder_compares_what_every_rung_has(tmp_path: Path) -> None:
    onnx.save(segmentation(), tmp_path / "m.onnx")
    ladder = reptrt.ladder(tmp_path / "m.onnx", IMAGES, calib_data=IMAGES, images=24)
    ratios = [r.from_first.sqnr_db for r in ladder.rungs if r.from_first is not None]
    exact = [ratio for ratio in ratios if ratio is None or ratio > 100]
    assert len(ratios) == 6
    assert len(exact) == 3  # the float rungs
    assert all(ratio is None or ratio > 30 for ratio in ratios)


@pytest.mark.slow
def test_a_rung_that_has_no_output_of_the_net_is_not_run(tmp_path: Path) -> None:
    onnx.save(by_the_batch(), tmp_path / "m.onnx")
    ladder = reptrt.ladder(tmp_path / "m.onnx", IMAGES, calib_data=IMAGES, images=24)
    for rung in ladder.rungs:
        if rung.runs_in == "torch graph":
            assert rung.not_run == "torch cannot compute y, which the net returns"
        elif rung.from_first is not None and rung.from_first.sqnr_db is not None:
            assert rung.from_first.sqnr_db > 25


@pytest.mark.slow
@pytest.mark.parametrize("make", [segmentation, by_the_batch, lambda: detector("nms")])
def test_they_are_diagnosed(tmp_path: Path, make: Callable[[], onnx.ModelProto]) -> None:
    onnx.save(make(), tmp_path / "m.onnx")
    diagnosis = reptrt.diagnose(tmp_path / "m.onnx", IMAGES, images=24)
    assert all(corner.sqnr_db > 25 for corner in diagnosis.corners)
