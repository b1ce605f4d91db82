"""Append non-maximum suppression to a detector, so that it returns finished detections.

    num_detections     (N, 1)     int32    how many of the K places of an image are used
    detection_boxes    (N, K, 4)  float32  xyxy in pixels of the input
    detection_scores   (N, K)     float32  from high to low
    detection_classes  (N, K)     int32

A place that is not used holds zeros. K is ``max_boxes``. A box is kept if its score is above
``confidence`` and if it overlaps no kept box of the same class (of any class if
``class_agnostic``) by more than ``iou``. One box may be kept for several classes.

Two forms give the same detections:

- `plugin`: one node EfficientNMS_TRT, version 1, of TensorRT's own plugins; it looks at the 4,096
  best scores of an image. Only tensorrt has it; tensorrt-rtx and onnxruntime do not.
- `onnx`: ONNX NonMaxSuppression, and TopK over its result. onnxruntime runs it.

Requires: a graph that is quantized already or stays float, since calibration must see the boxes
before suppression; outputs whose meaning is known (`reptrt.graph.detector_layouts`). Ensures: the
layers are unchanged; the former outputs are outputs no longer; the batch stays free.
"""

from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from reptrt.core.errors import RewriteError, option
from reptrt.core.nms_options import PLUGIN, NmsOptions
from reptrt.core.options_json import json_from_options
from reptrt.graph.net import Net, get_json, set_json
from reptrt.rewrite.contract import RewriteReport
from reptrt.rewrite.find_boxes import Nodes, detector_layout, find_boxes

NmsForm = Literal["plugin", "onnx"]

OUTPUTS = ("num_detections", "detection_boxes", "detection_scores", "detection_classes")
PLUGIN_DOMAIN = "trt.plugins"  # TensorRT's parser asks for the name alone, onnxruntime for both

_KEY = "nms"
_OPSET = 13  # the first whose ReduceSum takes its axes as an input
_BOX_CODING = {"xyxy": 0, "xywh": 1}  # the same numbers in both operators


def append_nms(net: Net, form: NmsForm, options: NmsOptions) -> RewriteReport:
    """Append NMS in one of its forms, in place; the options are recorded in the metadata.

    Raises:
        RewriteError: what the outputs mean is not known, they need no NMS, or the opset is too old.
    """
    graph = net.graph
    if form == "onnx" and graph.opset < _OPSET:
        raise RewriteError(
            f"graph {graph.name}: opset {graph.opset}, NMS needs {_OPSET} or later; pass the file "
            f"through reptrt export with {option('opset', _OPSET)}"
        )
    layout = detector_layout(net, options)
    batch = (graph.inputs[0].shape or ["N"])[0]
    boxes, scores, found = find_boxes(net, layout)
    results = _results(net, batch, options.max_boxes)
    nodes = Nodes(net)
    if form == "plugin":
        _append_plugin(nodes, boxes, scores, results, _BOX_CODING[layout.boxes], options)
    else:
        tensors = _suppressed(nodes, boxes, scores, _BOX_CODING[layout.boxes], options)
        for tensor, result in zip(tensors, results, strict=True):
            _rename(graph, tensor, result)
    graph.outputs = results
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    told = {"form": form, "layout": layout.form, "num_classes": layout.num_classes}
    set_json(net, _KEY, json_from_options(options) | told)
    return RewriteReport("append_nms", (*found.changed, *nodes.added))


def nms_classes(net: Net) -> int | None:
    """Return the number of classes of a detector with NMS; None: no NMS, or not known.

    Raises:
        ArtifactError: what is stored is not what `append_nms` wrote.
    """

    def parse(stored: dict[str, Any]) -> int | None:
        return None if stored["num_classes"] is None else int(stored["num_classes"])

    return get_json(net, _KEY, parse)


def _results(net: Net, batch: object, most: int) -> list[gs.Variable]:
    """Return the four outputs; a tensor that has one of their names gets another one."""
    tensors = net.graph.tensors()
    for name in OUTPUTS:
        if name in tensors:
            tensors[name].name = net.fresh_name(f"{name}.inner")
    shapes = ([batch, 1], [batch, most, 4], [batch, most], [batch, most])
    dtypes = (np.int32, np.float32, np.float32, np.int32)
    return [
        gs.Variable(name, np.dtype(dtype), shape)
        for name, dtype, shape in zip(OUTPUTS, dtypes, shapes, strict=True)
    ]


def _rename(graph: gs.Graph, tensor: gs.Variable, result: gs.Variable) -> None:
    """Let the node that computes one tensor compute another one instead."""
    maker = tensor.inputs[0]
    index = next(i for i, output in enumerate(maker.outputs) if output is tensor)
    maker.outputs[index] = result
    for reader in list(tensor.outputs):
        reader.inputs = [result if item is tensor else item for item in reader.inputs]


def _append_plugin(
    nodes: Nodes,
    boxes: gs.Tensor,
    scores: gs.Tensor,
    results: list[gs.Variable],
    box_coding: int,
    options: NmsOptions,
) -> None:
    attributes = {
        "plugin_version": "1",
        "score_threshold": float(options.confidence),
        "iou_threshold": float(options.iou),
        "max_output_boxes": options.max_boxes,
        "background_class": -1,  # none of the classes is the background
        "score_activation": 0,  # the scores are after the sigmoid
        "class_agnostic": int(options.class_agnostic),
        "box_coding": box_coding,
    }
    name = nodes.net.fresh_name("nms")
    node = gs.Node(PLUGIN, name, attributes, [boxes, scores], results, domain=PLUGIN_DOMAIN)
    nodes.net.graph.nodes.append(node)
    nodes.added.append(name)


def _suppressed(
    nodes: Nodes, boxes: gs.Tensor, scores: gs.Tensor, box_coding: int, options: NmsOptions
) -> tuple[gs.Variable, ...]:
    """Return number, boxes, scores and classes, computed by operators of ONNX."""
    best: gs.Tensor | None = None
    if options.class_agnostic:
        best = nodes.add("ArgMax", [scores], "class", np.int64, axis=2, keepdims=1)
        scores = nodes.add("GatherElements", [scores, best], "best", axis=2)
    by_class = nodes.add("Transpose", [scores], "by_class", perm=[0, 2, 1])  # (N, C, A)
    top, place = _best(nodes, boxes, by_class, box_coding, options)
    zero = nodes.constant("zero", [0.0], np.float32)
    valid = nodes.add("Greater", [top, zero], "valid", bool)
    ones = nodes.add("Cast", [valid], "valid.int", np.int32, to=int(onnx.TensorProto.INT32))
    number = nodes.add("ReduceSum", [ones, nodes.integers("axis", 1)], "number", np.int32)
    kind, row = _class_and_row(nodes, boxes, best, place, valid)
    index = nodes.add("Unsqueeze", [row, nodes.integers("index.axis", 2)], "index", np.int64)
    kept = nodes.add("GatherND", [boxes, index], "kept", batch_dims=1)
    if box_coding == _BOX_CODING["xywh"]:
        kept = _corners(nodes, kept)
    mask = nodes.add("Unsqueeze", [valid, nodes.integers("mask.axis", 2)], "mask", bool)
    return number, nodes.add("Where", [mask, kept, zero], "kept.used"), top, kind


def _best(
    nodes: Nodes,
    boxes: gs.Tensor,
    by_class: gs.Tensor,
    box_coding: int,
    options: NmsOptions,
) -> tuple[gs.Variable, gs.Variable]:
    """Return the best scores that stay and their places in C * A, both (N, K), padded with 0."""
    limits = [
        nodes.integers("most", options.max_boxes),
        nodes.constant("iou", [options.iou], np.float32),
        nodes.constant("confidence", [options.confidence], np.float32),
    ]
    inputs = [boxes, by_class, *limits]
    stay = nodes.add("NonMaxSuppression", inputs, "nms", np.int64, center_point_box=box_coding)
    values = nodes.add("GatherND", [by_class, stay], "stay")
    shape = nodes.add("Shape", [by_class], "all.shape", np.int64)
    none = nodes.add("ConstantOfShape", [shape], "none")
    all_scores = nodes.add("ScatterND", [none, stay, values], "all")
    flat = nodes.add("Reshape", [all_scores, nodes.integers("all.flat", 0, -1)], "all.row")
    padding = nodes.integers("padding", 0, 0, 0, options.max_boxes)
    padded = nodes.add("Pad", [flat, padding], "all.padded")  # so that there are K of them
    return _top(nodes, padded, options.max_boxes)


def _top(nodes: Nodes, scores: gs.Tensor, most: int) -> tuple[gs.Variable, gs.Variable]:
    top = nodes.add("TopK", [scores, nodes.integers("top.most", most)], "top", axis=1)
    place = gs.Variable(nodes.net.fresh_name("nms.top.place"), np.dtype(np.int64))
    top.inputs[0].outputs.append(place)
    return top, place


def _class_and_row(
    nodes: Nodes,
    boxes: gs.Tensor,
    best: gs.Tensor | None,
    place: gs.Tensor,
    valid: gs.Tensor,
) -> tuple[gs.Variable, gs.Variable]:
    """Return the classes, int32, and the rows of A, both (N, K), of places in C * A.

    Args:
        nodes: adds to the net.
        boxes: (N, A, 4).
        best: the class of each row (N, A, 1), if C is 1 because no other class counts.
        place: (N, K).
        valid: whether a place is used (N, K).
    """
    zero = nodes.integers("first", 0)
    place = nodes.add("Where", [valid, place, zero], "place", np.int64)
    shape = nodes.add("Shape", [boxes], "shape", np.int64)
    rows = nodes.add("Gather", [shape, nodes.integers("rows.axis", 1)], "rows", np.int64)
    row = nodes.add("Mod", [place, rows], "row", np.int64)
    if best is None:
        kind = nodes.add("Div", [place, rows], "kind", np.int64)
    else:
        of_row = nodes.add("Squeeze", [best, nodes.integers("kinds.axis", 2)], "kinds", np.int64)
        kind = nodes.add("GatherElements", [of_row, row], "kind", np.int64, axis=1)
        kind = nodes.add("Where", [valid, kind, zero], "kind.used", np.int64)
    return nodes.add("Cast", [kind], "kind.int", np.int32, to=int(onnx.TensorProto.INT32)), row


def _corners(nodes: Nodes, boxes: gs.Tensor) -> gs.Variable:
    """Return (N, K, 4) as x1, y1, x2, y2, given centres and sizes."""
    centre, size = nodes.columns(boxes, "centre", 0, 2), nodes.columns(boxes, "size", 2, 4)
    half = nodes.add("Mul", [size, nodes.constant("half.factor", [0.5], np.float32)], "half")
    low = nodes.add("Sub", [centre, half], "low")
    high = nodes.add("Add", [centre, half], "high")
    return nodes.add("Concat", [low, high], "corners", axis=2)
