"""Detectors of a few nodes, their detections by brute force, and images with boxes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from reptrt.core.choices import DetectorForm
from reptrt.graph.net import Net, net_from_model

Array = np.ndarray


@dataclass(frozen=True)
class Kept:
    """What is left of the boxes of one image, from the highest score to the lowest."""

    boxes: Array  # (n, 4) xyxy
    scores: Array  # (n,)
    classes: Array  # (n,)


def overlap(first: Array, second: Array) -> float:
    """Intersection over union of two boxes x1, y1, x2, y2."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    both = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return both / (sum(areas) - both) if both else 0.0


def suppress(
    boxes: Array, scores: Array, confidence: float, iou: float, most: int, agnostic: bool = False
) -> Kept:
    """NMS by its definition: one candidate after the other, each against all that were kept.

    Args:
        boxes: (A, 4) xyxy.
        scores: (A, C).
        confidence: a score must be above it.
        iou: an overlap must not be above it.
        most: boxes to keep.
        agnostic: whether boxes suppress those of other classes.
    """
    candidates = [
        (scores[row, kind], row, kind)
        for row in range(scores.shape[0])
        for kind in range(scores.shape[1])
        if scores[row, kind] > confidence
    ]
    kept: list[tuple[float, int, int]] = []
    for score, row, kind in sorted(candidates, key=lambda item: -item[0]):
        rivals = [other for _, other, its in kept if agnostic or its == kind]
        if all(overlap(boxes[row], boxes[other]) <= iou for other in rivals):
            kept.append((score, row, kind))
    kept = kept[:most]
    rows = [row for _, row, _ in kept]
    return Kept(
        boxes[rows].reshape(-1, 4),
        np.array([score for score, _, _ in kept]),
        np.array([kind for _, _, kind in kept], dtype=int),
    )


def random_boxes(
    rng: np.random.Generator, batch: int, rows: int, classes: int
) -> tuple[Array, ...]:
    """Return boxes (N, A, 4) xyxy that overlap in clusters, and scores (N, A, C), all different."""
    centres = rng.uniform(20, 80, (batch, 5, 2))[:, rng.integers(0, 5, rows)]
    centres = centres + rng.normal(0, 3, (batch, rows, 2))
    sizes = rng.uniform(10, 20, (batch, rows, 2))
    boxes = np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=2)
    return boxes.astype(np.float32), rng.uniform(0, 1, (batch, rows, classes)).astype(np.float32)


def as_outputs(form: DetectorForm, boxes: Array, scores: Array) -> list[Array]:
    """Return boxes (xyxy) and scores as the outputs of a detector of one of three forms."""
    if form == "boxes-scores":
        return [boxes, scores]
    low, high = boxes[..., :2], boxes[..., 2:]
    parts = [(low + high) / 2, high - low, scores]
    if form == "ultralytics":
        return [np.ascontiguousarray(np.concatenate(parts, axis=2).transpose(0, 2, 1))]
    objectness = np.full_like(scores[..., :1], 0.9)
    return [np.concatenate([*parts[:2], objectness, scores / 0.9], axis=2)]


def passing(
    shapes: Sequence[Sequence[int]], opset: int = 17, dtype: int = TensorProto.FLOAT
) -> Net:
    """A graph that returns its inputs out0, out1...: given as in0, in1..., batch free."""
    dims: list[list[Any]] = [["N", *shape] for shape in shapes]
    inputs = [helper.make_tensor_value_info(f"in{i}", dtype, dim) for i, dim in enumerate(dims)]
    outputs = [helper.make_tensor_value_info(f"out{i}", dtype, dim) for i, dim in enumerate(dims)]
    nodes = [helper.make_node("Identity", [f"in{i}"], [f"out{i}"]) for i in range(len(dims))]
    graph = helper.make_graph(nodes, "passing", inputs, outputs)
    return net_from_model(_model(graph, opset))


def tiny_detector(
    form: DetectorForm = "xywh-obj-cls",
    classes: int = 3,
    size: int = 32,
    seed: int = 0,
    bins: int = 1,
) -> onnx.ModelProto:
    """A detector of three convolutions on images (N, 3, size, size), with one or two levels."""
    rng = np.random.default_rng(seed)
    nodes, constants = [], []

    def conv(source: str, name: str, inputs: int, outputs: int, kernel: int, stride: int) -> str:
        weight = rng.normal(0, 1 / np.sqrt(inputs * kernel**2), (outputs, inputs, kernel, kernel))
        constants.append(numpy_helper.from_array(weight.astype(np.float32), f"{name}.weight"))
        attrs: dict[str, Any] = {
            "kernel_shape": [kernel] * 2,
            "strides": [stride] * 2,
            "pads": [kernel // 2] * 4,
        }
        nodes.append(helper.make_node("Conv", [source, f"{name}.weight"], [name], name, **attrs))
        return name

    def add(op: str, inputs: list[str], name: str, **attrs: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [name], name, **attrs))
        return name

    def constant(name: str, values: list[int]) -> str:
        constants.append(numpy_helper.from_array(np.array(values, dtype=np.int64), name))
        return name

    image = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, size, size])
    stem = add("Relu", [conv("images", "stem", 3, 16, 3, 4)], "stem.relu")
    deep = add("Relu", [conv(stem, "deep", 16, 16, 3, 2)], "deep.relu")
    outputs: list[tuple[str, list[Any]]] = []
    if form == "raw":
        for level, source, stride in (("a", stem, 4), ("b", deep, 8)):
            grid = [size // stride] * 2
            for name, channels in ((f"cls.{level}", classes), (f"reg.{level}", 4 * bins)):
                last = conv(source, name, 16, channels, 1, 1)
                outputs.append((add("Abs", [last], f"{name}.abs") if "reg" in name else last, []))
                outputs[-1] = (outputs[-1][0], ["N", channels, *grid])
    else:
        columns = 4 + classes + (form == "xywh-obj-cls")
        flat = add(
            "Reshape", [conv(deep, "head", 16, columns, 1, 1), constant("flat", [0, 0, -1])], "rows"
        )
        rows = (size // 8) ** 2
        last, shape = add("Sigmoid", [flat], "sigmoid"), ["N", columns, rows]
        if form != "ultralytics":
            last, shape = add("Transpose", [last], "last", perm=[0, 2, 1]), ["N", rows, columns]
        outputs = [(last, list(shape))]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, dims) for n, dims in outputs]
    return _model(helper.make_graph(nodes, "tiny", [image], infos, constants), 17)


def colour_detector() -> onnx.ModelProto:
    """Raw heads that find 8 x 8 pixels in red (class 0) or green (1) on images (N, 3, 64, 64).

    Every cell of its one level says that it is a box; the score is about 1 or 0.
    """
    weight = np.zeros((2, 3, 1, 1), np.float32)
    weight[0, :2, 0, 0] = weight[1, 1::-1, 0, 0] = 40, -40
    arrays = {
        "weight": weight,
        "bias": np.full(2, -20, np.float32),
        "flat": np.zeros((4, 3, 1, 1), np.float32),
        "half": np.full(4, 0.5, np.float32),
    }
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    pool: dict[str, Any] = {"kernel_shape": [8, 8], "strides": [8, 8]}
    nodes = [
        helper.make_node("AveragePool", ["images"], ["cells"], "pool", **pool),
        helper.make_node("Conv", ["cells", "weight", "bias"], ["cls"], "cls"),
        helper.make_node("Conv", ["cells", "flat", "half"], ["reg"], "reg"),
    ]
    image, cls, reg = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", channels, size, size])
        for name, channels, size in (("images", 3, 64), ("cls", 2, 8), ("reg", 4, 8))
    )
    return _model(helper.make_graph(nodes, "colours", [image], [cls, reg], constants), 17)


def _model(graph: onnx.GraphProto, opset: int) -> onnx.ModelProto:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    return model
