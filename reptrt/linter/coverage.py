"""QDQ201 to QDQ249: what runs in float, and what INT8 cannot make faster."""

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from reptrt.graph.queries import float_type, fuses, is_integer_op, label
from reptrt.linter.rule import Defect
from reptrt.linter.view import Layer, View

_NARROW = 16  # channels that one INT8 instruction works on
_NAMED = 4


def float_layer(view: View) -> Iterator[Defect]:
    """Every layer in front of a quantized one is quantized.

    A convolution or matrix product left in float between INT8 layers costs its own speed and a
    change of type on both sides. It is right for the few layers whose quantization costs most
    accuracy; this warning says which they are.
    """
    for layer in _float_layers(view):
        if id(layer.node) in view.leading_to_int8:
            yield Defect(label(layer.node), f"{layer.node.op} in float", "Q/DQ on input and weight")


def float_head(view: View) -> Iterator[Defect]:
    """Layers behind the last Q/DQ are in float.

    Usual, and mostly right, for a detection head or a classifier.
    """
    for layer in _float_layers(view):
        if id(layer.node) not in view.leading_to_int8:
            yield Defect(label(layer.node), f"{layer.node.op} in float", "nothing, if meant so")


def half_quantized(view: View) -> Iterator[Defect]:
    """A layer has both input and weight quantized, or neither.

    With one of the two the product is computed in float: the accuracy is lost, nothing is won.
    """
    for layer in view.weighted:
        if (layer.activation is None) == (layer.weight is None):
            continue
        missing, present = ("input", "weight") if layer.activation is None else ("weight", "input")
        got = f"{missing} in float, {present} quantized"
        yield Defect(label(layer.node), got, "Q/DQ on both")


def float_island(view: View) -> Iterator[Defect]:
    """Between INT8 layers there are only nodes that fuse or move values.

    Activation functions and other pointwise nodes join the kernel before them, MaxPool, Reshape and
    the like commute with Q/DQ, and average pools run in INT8 if their input is quantized. Anything
    else (Softmax, normalizations, Resize by interpolation, a pool on a float tensor) runs on its
    own in float, with a change of type before and behind it. One finding per connected island.
    """
    seen: set[int] = set()
    for node in view.nodes:
        if id(node) in seen or not _is_island(view, node):
            continue
        island = [other for other in _connected(view, node, seen) if _is_island(view, other)]
        names = ", ".join(f"{label(n)} ({n.op})" for n in island[:_NAMED])
        more = f" and {len(island) - _NAMED} more" if len(island) > _NAMED else ""
        yield Defect(label(node), f"in float between INT8 layers: {names}{more}", "INT8 throughout")


def narrow_layer(view: View) -> Iterator[Defect]:
    """INT8 kernels work on 16 channels at a time.

    A layer with fewer input or output channels (a Gemm: K or N) is padded and can be slower than in
    FP16. The first convolution of an image net and small heads always are; elsewhere it is a
    property of the architecture.
    """
    for layer in view.int8_layers:
        channels = layer.channels
        if channels is not None and min(channels) < _NARROW:
            got = f"{layer.node.op} {channels[0]} -> {channels[1]}"
            yield Defect(label(layer.node), got, f"{_NARROW} channels or more on both sides")


def float32_rest(view: View) -> Iterator[Defect]:
    """What is not INT8 is FP16.

    A strongly typed network computes in the types of the graph: with FP32 scales, everything
    outside the INT8 layers runs in FP32, and INT8 may be no faster than a plain FP16 engine.
    """
    types = [float_type(layer.node.inputs[0]) for layer in view.int8_layers]
    if "float32" in types:
        got = f"FP32 around {types.count('float32')} of {len(types)} INT8 layers"
        yield Defect("graph", got, "FP16 scales and float nodes")


def runtime_weight(view: View) -> Iterator[Defect]:
    """The weight of a quantized convolution or Gemm is a constant.

    A weight that is computed at run time is quantized at run time too, and no kernel is chosen for
    it when the engine is built.
    """
    for layer in view.layers:
        if layer.weight is not None and not layer.has_constant_weight and layer.node.op != "MatMul":
            got = f"weight {layer.node.inputs[1].name} is computed at run time"
            yield Defect(label(layer.node), got, "INT8 codes as an initializer")


def nothing_quantized(view: View) -> Iterator[Defect]:
    """At least one layer runs in INT8."""
    if view.weighted and not view.int8_layers and not any(map(is_integer_op, view.nodes)):
        yield Defect("graph", f"0 of {len(view.weighted)} layers INT8", "a quantized graph")


def _float_layers(view: View) -> Iterator[Layer]:
    if not view.int8_layers:
        return
    for layer in view.weighted:
        if layer.activation is None and layer.weight is None:
            yield layer


def _is_island(view: View, node: gs.Node) -> bool:
    is_layer = any(layer.node is node for layer in view.weighted)
    return id(node) in view.between and not fuses(node) and not is_layer


def _connected(view: View, start: gs.Node, seen: set[int]) -> list[gs.Node]:
    """Return the float nodes between INT8 layers connected with ``start``; add them to ``seen``."""
    connected, pending = [], [start]
    while pending:
        node = pending.pop(0)
        if id(node) in seen or id(node) not in view.between:
            continue
        seen.add(id(node))
        connected.append(node)
        pending += [t.inputs[0] for t in view.data_inputs(node) if t.inputs]
        pending += view.data_readers(node)
    return connected
