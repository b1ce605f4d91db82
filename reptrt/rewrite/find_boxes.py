"""Make the tensors that NMS takes from the outputs of a detector: boxes and scores.

    boxes   (N, A, 4) float32, pixels of the input, in the layout's form (xyxy or xywh)
    scores  (N, A, C) float32, 0 to 1

With s the stride of a level and (x, y) the centre of a cell in pixels, raw heads are decoded as
YOLOv6 does:

    scores = sigmoid(cls)
    boxes = (x - s * left, y - s * top, x + s * right, y + s * bottom)

A side that has 4 R channels in place of 4 is the mean of the distribution that softmax makes of
its R numbers, over 0 to R - 1 (DFL, arXiv 2006.04388).

Requires: outputs of the given layout; for raw heads an input of known size. Ensures: the outputs
and all that computes them stay as they are; the batch stays free.

1. One tensor is sliced; the objectness is multiplied into the scores of the classes. Scores of one
   class (N, A) get an axis of classes.
2. A tensor whose boxes are on the last axis is transposed, one in FP16 is cast.
3. The levels of raw heads are joined, the finest first; scores that are a Sigmoid's result get no
   second one.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from reptrt.core.arrays import FloatArray
from reptrt.core.errors import RewriteError, option
from reptrt.core.nms_options import NmsOptions
from reptrt.graph.detector_layouts import DetectorLayout, layout_of_outputs
from reptrt.graph.input_form import layout_of
from reptrt.graph.net import Net, model_from_net, producer
from reptrt.rewrite.contract import RewriteReport

_SUPPRESSED = {"nms": "has NMS already", "xyxy-score-class": "needs no NMS"}


class Nodes:
    """Adds nodes to a net, with fresh names that begin with ``nms.``."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.added: list[str] = []

    def add(
        self,
        op: str,
        inputs: list[gs.Tensor],
        name: str,
        dtype: npt.DTypeLike = np.float32,
        **attrs: object,
    ) -> gs.Variable:
        """Append a node and return its output, of unknown shape."""
        name = self.net.fresh_name(f"nms.{name}")
        output = gs.Variable(self.net.fresh_name(f"{name}.output"), np.dtype(dtype))
        self.net.graph.nodes.append(gs.Node(op, name, attrs, inputs, [output]))
        self.added.append(name)
        return output

    def constant(self, name: str, values: npt.ArrayLike, dtype: npt.DTypeLike) -> gs.Constant:
        """Return a new constant."""
        return gs.Constant(self.net.fresh_name(f"nms.{name}"), np.asarray(values, dtype=dtype))

    def integers(self, name: str, *values: int) -> gs.Constant:
        """Return a new constant (n,), int64."""
        return self.constant(name, values, np.int64)

    def columns(
        self, tensor: gs.Tensor, name: str, first: int, end: int = np.iinfo(np.int64).max
    ) -> gs.Variable:
        """Return columns of a tensor (N, A, X), up to its last one if no end is given."""
        cut = {"first": first, "end": end, "axis": 2}
        values = [self.integers(f"{name}.{key}", value) for key, value in cut.items()]
        return self.add("Slice", [tensor, *values], name)


def detector_layout(net: Net, options: NmsOptions) -> DetectorLayout:
    """Return what the outputs of a detector mean.

    Raises:
        RewriteError: it is not known, or the outputs need no NMS.
    """
    shapes = output_shapes(net)
    names = [tensor.name for tensor in net.graph.outputs]
    layout = layout_of_outputs(shapes, names=names, form=options.layout, boxes=options.boxes)
    if isinstance(layout, str):
        raise RewriteError(f"graph {net.graph.name}: NMS cannot be appended: {layout}")
    if layout.form in _SUPPRESSED:
        raise RewriteError(
            f"graph {net.graph.name}: its outputs look like {layout}, which "
            f"{_SUPPRESSED[layout.form]}; use the file as it is"
        )
    return layout


def output_shapes(net: Net) -> list[list[Any]]:
    """Return the shapes of the outputs; a dimension that stays unknown for a batch of 1 is None."""
    model = model_from_net(net.copy())
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output
    declared = [list(tensor.shape or ()) for tensor in net.graph.outputs]
    found = [[d.dim_value for d in value.type.tensor_type.shape.dim] for value in inferred]
    return [
        [size or known for size, known in zip(sizes, dims, strict=True)]
        if len(sizes) == len(dims)
        else dims
        for sizes, dims in zip(found, declared, strict=True)
    ]


def find_boxes(net: Net, layout: DetectorLayout) -> tuple[gs.Tensor, gs.Tensor, RewriteReport]:
    """Add the nodes that make boxes (N, A, 4) and scores (N, A, C), and return both tensors.

    Raises:
        RewriteError: the heads are raw and the size of the input is not known.
    """
    nodes, shapes = Nodes(net), output_shapes(net)
    outputs = [_as_float(nodes, net.graph.outputs[index]) for index in layout.outputs]
    if layout.form == "raw":
        grids = [(int(h), int(w)) for _, _, h, w in (shapes[i] for i in layout.outputs[::2])]
        bins = int(shapes[layout.outputs[1]][1]) // 4
        boxes, scores = _decoded(nodes, outputs, grids, bins)
    else:
        rows = [
            _boxes_first(nodes, tensor) if last else tensor
            for tensor, last in zip(outputs, layout.boxes_last, strict=True)
        ]
        if len(rows) == 2 and len(shapes[layout.outputs[1]]) == 2:
            rows[1] = nodes.add("Unsqueeze", [rows[1], nodes.integers("one", 2)], "one_class")
        boxes, scores = rows if len(rows) == 2 else _sliced(nodes, rows[0], layout)
    return boxes, scores, RewriteReport("find_boxes", tuple(nodes.added))


def _as_float(nodes: Nodes, tensor: gs.Tensor) -> gs.Tensor:
    if tensor.dtype is None or tensor.dtype == np.float32:
        return tensor
    to = int(onnx.TensorProto.FLOAT)
    return nodes.add("Cast", [tensor], "float", to=to)


def _boxes_first(nodes: Nodes, tensor: gs.Tensor) -> gs.Tensor:
    return nodes.add("Transpose", [tensor], "boxes_first", perm=[0, 2, 1])


def _sliced(nodes: Nodes, rows: gs.Tensor, layout: DetectorLayout) -> tuple[gs.Tensor, gs.Tensor]:
    """Return the columns of one tensor (N, A, 4 + C) or (N, A, 5 + C)."""
    boxes = nodes.columns(rows, "boxes", 0, 4)
    if layout.form == "ultralytics":
        return boxes, nodes.columns(rows, "scores", 4)
    objectness, classes = nodes.columns(rows, "objectness", 4, 5), nodes.columns(rows, "classes", 5)
    return boxes, nodes.add("Mul", [objectness, classes], "scores")


def _decoded(
    nodes: Nodes, heads: list[gs.Tensor], grids: list[tuple[int, int]], bins: int
) -> tuple[gs.Tensor, gs.Tensor]:
    """Return boxes (xyxy) and scores of raw heads, given as scores, distances of each level."""
    centres, steps = _centres_and_steps(nodes.net, grids)
    logits = _joined(nodes, heads[::2], "logits")
    distances = _joined(nodes, heads[1::2], "distances")
    if bins > 1:
        distances = _means(nodes, distances, bins)
    offsets = nodes.add("Mul", [distances, nodes.constant("steps", steps, np.float32)], "offsets")
    centre = nodes.constant("centres", centres, np.float32)
    boxes = nodes.add("Add", [offsets, centre], "boxes")
    if all((maker := producer(head)) is not None and maker.op == "Sigmoid" for head in heads[::2]):
        return boxes, logits
    return boxes, nodes.add("Sigmoid", [logits], "scores")


def _means(nodes: Nodes, numbers: gs.Tensor, bins: int) -> gs.Tensor:
    """Return the means (N, A, 4) of distributions (N, A, 4 R)."""
    shape = nodes.integers("sides.shape", 0, -1, 4, bins)
    sides = nodes.add("Reshape", [numbers, shape], "sides")
    parts = nodes.add("Softmax", [sides], "parts", axis=3)
    values = nodes.constant("values", np.arange(bins), np.float32)
    weighted = nodes.add("Mul", [parts, values], "weighted")
    return nodes.add("ReduceSum", [weighted, nodes.integers("axis", 3)], "means", keepdims=0)


def _joined(nodes: Nodes, levels: list[gs.Tensor], name: str) -> gs.Tensor:
    """Return (N, A, X) for levels (N, X, H, W)."""
    shape = nodes.integers(f"{name}.shape", 0, 0, -1)
    flat: list[gs.Tensor] = [
        nodes.add("Reshape", [level, shape], f"{name}.flat") for level in levels
    ]
    return _boxes_first(nodes, nodes.add("Concat", flat, name, axis=2))


def _centres_and_steps(net: Net, grids: list[tuple[int, int]]) -> tuple[FloatArray, FloatArray]:
    """Return the centres (x, y, x, y) and signed strides of cells in pixels, both (1, A, 4)."""
    image = net.graph.inputs[0]
    sizes = (image.shape or [])[1:3] if layout_of(net) == "NHWC" else (image.shape or [])[2:4]
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise RewriteError(
            f"input {image.name}: its shape is {image.shape}, expected a known height and width, "
            f"which the boxes of raw heads are measured by; export it with {option('input_size')}"
        )
    centres, steps = [], []
    for height, width in grids:
        stride = np.array([sizes[1] / width, sizes[0] / height])
        rows, columns = np.mgrid[:height, :width]
        centre = (np.stack([columns, rows], axis=-1).reshape(-1, 2) + 0.5) * stride
        centres.append(np.tile(centre, 2))
        steps.append(np.tile(np.concatenate([-stride, stride]), (height * width, 1)))
    return np.concatenate(centres)[None], np.concatenate(steps)[None]
