"""Nodes behind the last layer that torch cannot run, or whose results cannot be compared."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from reptrt.core.errors import RewriteError
from reptrt.execute.torchgraph import TorchGraph
from reptrt.pipeline import CalibrateOptions, calibrate
from tests.support.onnx_nets import Builder

INT64, FLOAT = TensorProto.INT64, TensorProto.FLOAT
IMAGES = np.random.default_rng(0).integers(0, 256, (24, 3, 8, 8), dtype=np.uint8)


def branch(op: str) -> onnx.GraphProto:
    """A branch of an If, which reads a tensor around it."""
    output = helper.make_tensor_value_info(f"taken.{op}", FLOAT, [None] * 3)
    node = helper.make_node(op, ["scores"], [output.name], op)
    return helper.make_graph([node], op, [], [output])


TAILS = {
    "nms": (helper.make_node("NonMaxSuppression", ["boxes", "scores"], ["y"], "tail"), INT64),
    "plugin": (helper.make_node("Decode", ["boxes", "scores"], ["y"], "tail", domain="TRT"), FLOAT),
    "classes": (helper.make_node("ArgMax", ["scores"], ["y"], "tail", axis=1), INT64),
    "unknown": (helper.make_node("LpPool", ["p3"], ["y"], "tail", kernel_shape=[2, 2]), FLOAT),
    "branches": (
        helper.make_node(
            "If", ["flag"], ["y"], "tail", then_branch=branch("Neg"), else_branch=branch("Abs")
        ),
        FLOAT,
    ),
}


def detector(tail: str) -> onnx.ModelProto:
    """Two layers, boxes and scores of the second, and a node behind them."""
    b = Builder()
    y = b.conv(b.relu(b.conv("x", 16, "body")), 8, "p3")
    b.node("Reshape", [y, b.constant("shape", np.array([0, 8, -1]))], "flat")
    b.constant("sizes", np.array([4, 4]))
    b.nodes.append(helper.make_node("Split", ["flat", "sizes"], ["corner", "logit"], axis=1))
    b.nodes.append(helper.make_node("Transpose", ["corner"], ["boxes"], perm=[0, 2, 1]))
    b.nodes.append(helper.make_node("Sigmoid", ["logit"], ["scores"]))
    b.nodes.append(helper.make_node("ReduceMax", ["scores"], ["best"], keepdims=0))
    b.nodes.append(helper.make_node("Greater", ["best", b.constant("no", np.float32(0))], ["flag"]))
    node, kind = TAILS[tail]
    b.nodes.append(node)
    inputs = [helper.make_tensor_value_info("x", FLOAT, ["N", 3, 8, 8])]
    rank = {"nms": 2, "classes": 3, "unknown": 4}.get(tail, 3)
    outputs = [helper.make_tensor_value_info("y", kind, [None] * rank)]
    graph = helper.make_graph(b.nodes, "detector", inputs, outputs, b.constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("TRT", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fast", "balanced"])
@pytest.mark.parametrize("tail", TAILS)
def test_the_body_is_calibrated_by_what_the_tail_reads(
    tmp_path: Path, tail: str, recipe: str
) -> None:
    onnx.save(detector(tail), tmp_path / "m.onnx")
    np.savez(tmp_path / "images.npz", x=IMAGES)
    options = CalibrateOptions(images=24, recipe=recipe, iterations=4 if recipe != "fast" else None)
    report = calibrate(tmp_path / "m.onnx", tmp_path / "images.npz", tmp_path / "o.onnx", options)
    assert report.layers == 2
    exact, int8 = (TorchGraph(onnx.load(tmp_path / name)) for name in ("m.onnx", "o.onnx"))
    assert {"p3", "boxes", "scores", "best"}.issuperset(exact.comparable_names)
    x = {"x": torch.from_numpy(IMAGES / np.float32(255))}
    with torch.inference_mode():
        values, rounded = (g.run(x, exact.comparable_names) for g in (exact, int8))
    for name, value in values.items():
        noise = (rounded[name] - value).square().sum()
        assert 10 * torch.log10(value.square().sum() / noise) > 25
    last = [n for n in onnx.load(tmp_path / "o.onnx").graph.node if n.output[0] == "y"]
    assert [n.op_type for n in last] == [TAILS[tail][0].op_type]


def test_an_unknown_node_between_layers_is_refused(tmp_path: Path) -> None:
    b = Builder()
    y = b.node("LpPool", [b.relu(b.conv("x", 8, "a"))], "odd", kernel_shape=[1, 1])
    onnx.save(b.model(b.conv(y, 8, "b")), tmp_path / "m.onnx")
    np.savez(tmp_path / "images.npz", x=IMAGES)
    files = [tmp_path / name for name in ("m.onnx", "images.npz", "o.onnx")]
    with pytest.raises(RewriteError, match=r"1 nodes cannot be run: LpPool \(odd\)"):
        calibrate(*files, CalibrateOptions(images=24))
