"""Pairs that keep a layer from fusing with its neighbours, or are missing (QDQ101 to 105, 112).

Costs are those of the placement rules in TensorRT's documentation; all of these graphs parse.
"""

import math
from collections.abc import Iterator

import onnx_graphsurgeon as gs

from reptrt.graph.net import WEIGHTED_OPS, producer
from reptrt.graph.queries import (
    ACTIVATIONS,
    SUMS,
    base,
    before_epilogue,
    dequantize_before,
    is_dequantize,
    is_private_past_casts,
    is_quantize,
    label,
    pair_readers,
    producer_past_casts,
    quantize_before,
)
from reptrt.linter.rule import Defect
from reptrt.linter.view import View


def split_activation(view: View) -> Iterator[Defect]:
    """No Q/DQ between a layer (or a residual Add) and its activation function.

    Convolution and ReLU are one kernel that writes INT8 directly. A pair between them ends the
    kernel early, rounds twice and keeps the negative half of the codes that ReLU throws away.
    """
    for node in view.activation_quantizes:
        before = producer_past_casts(node.inputs[0])
        if before is None or before.op not in (*WEIGHTED_OPS, *SUMS, "BatchNormalization"):
            continue
        functions = dict.fromkeys(r.op for r, _ in pair_readers(node) if r.op in ACTIVATIONS)
        if functions:
            got = f"Q/DQ between {before.op} and {', '.join(functions)}"
            yield Defect(label(node), got, f"Q behind the {next(iter(functions))} only")


def split_batchnorm(view: View) -> Iterator[Defect]:
    """No Q/DQ between a layer and its BatchNormalization.

    TensorRT folds the normalization into the convolution before it; not across a pair.
    """
    for node in view.activation_quantizes:
        before = producer_past_casts(node.inputs[0])
        after = [r for r, _ in pair_readers(node) if r.op == "BatchNormalization"]
        if before is not None and before.op in WEIGHTED_OPS and after:
            got = f"Q/DQ between {before.op} and {label(after[0])}"
            yield Defect(label(node), got, "BatchNormalization folded into the layer")


def split_sum(view: View) -> Iterator[Defect]:
    """No Q/DQ between a layer and the residual Add that it can be fused with.

    Only the other input, the skip, gets a pair. With pairs on both, the convolution cannot add the
    skip in its own kernel: an extra pass over two tensors, and one more rounding.
    """
    for node in view.nodes:
        if node.op not in SUMS or any(_fuses(view, tensor) for tensor in node.inputs):
            continue
        if any(dequantize_before(tensor) is None for tensor in node.inputs):
            continue
        pairs = [quantize for tensor in node.inputs if (quantize := _splits(view, tensor))]
        if pairs:
            quantize = max(pairs, key=lambda pair: _num_weights(view, pair.inputs[0]))
            layer = producer(base(quantize.inputs[0]))
            got = f"Q/DQ between {label(layer)} and {label(node)}"
            yield Defect(label(quantize), got, "Q/DQ on the skip input only")


def float_skip(view: View) -> Iterator[Defect]:
    """Every input of a residual Add is quantized but the one whose layer fuses with the Add.

    The type of the skip input is the output type of the fused kernel: with a float skip the
    convolution writes float, and Q runs as a pass of its own. A sum that is read by something
    that runs in float anyway, such as a normalization, is not asked for this.
    """
    for node, tensor, is_split in _float_skips(view):
        if not is_split:
            yield Defect(label(node), f"{tensor.name} comes in as float", "Q/DQ on the skip input")


def float_split(view: View) -> Iterator[Defect]:
    """A layer split into parallel parts adds them in float.

    Two convolutions of one input, or a convolution and a scaled copy of its input: the parts of a
    weight split. A float sum is exact; the price is that its Q is a pass of its own.
    """
    for node, tensor, is_split in _float_skips(view):
        if is_split:
            got = f"{tensor.name}, from the same input, comes in as float"
            yield Defect(label(node), got, "Q/DQ on it, at one more rounding")


def split_pad(view: View) -> Iterator[Defect]:
    """No Q/DQ between Pad and the convolution behind it.

    A Pad becomes the convolution's own padding, but not across a pair.
    """
    for layer in view.layers:
        if layer.activation is None or layer.activation is not producer_past_casts(
            layer.node.inputs[0]
        ):
            continue
        quantize = quantize_before(layer.activation)
        before = None if quantize is None else producer_past_casts(quantize.inputs[0])
        if quantize is not None and before is not None and before.op == "Pad":
            got = f"Q/DQ between {label(before)} and {label(layer.node)}"
            yield Defect(label(quantize), got, f"Q/DQ before {label(before)}, or pads in the layer")


def _float_skips(view: View) -> Iterator[tuple[gs.Node, gs.Tensor, bool]]:
    """Yield sum, float input, and whether that input is part of a weight split."""
    for node in view.nodes:
        if not view.is_residual(node) or id(node) not in view.right_between:
            continue
        floats = [t for t in view.data_inputs(node) if dequantize_before(t) is None]
        fusing = [tensor for tensor in floats if _fuses(view, tensor)]
        main = max(fusing, key=lambda tensor: _num_weights(view, tensor), default=None)
        for tensor in floats:
            if tensor is not main:
                part = main is not None and _is_part(view, tensor)
                yield node, tensor, part and _root(view, tensor) is _root(view, main)


def _fuses(view: View, tensor: gs.Tensor) -> bool:
    """Whether a tensor is the output of an INT8 layer, or of a sum with one, for one reader."""
    node = before_epilogue(tensor, view.graph)
    if node is None or not is_private_past_casts(view.graph, tensor):
        return False
    if any(layer.node is node for layer in view.int8_layers):
        return True
    return node.op in SUMS and any(_fuses(view, part) for part in node.inputs)


def _splits(view: View, tensor: gs.Tensor) -> gs.Node | None:
    """Return the Q of a pair between a layer, or a sum with one, and the one sum that reads it."""
    quantize = quantize_before(producer_past_casts(tensor))
    layer = None if quantize is None else producer_past_casts(quantize.inputs[0])
    if quantize is None or layer is None:
        return None
    if layer.op not in WEIGHTED_OPS and not _fuses(view, quantize.inputs[0]):
        return None
    chain = (quantize.inputs[0], quantize.outputs[0], tensor)
    return quantize if all(is_private_past_casts(view.graph, part) for part in chain) else None


def _num_weights(view: View, tensor: gs.Tensor) -> int:
    """Return the number of weights of the layer that makes a tensor; 0 for a sum."""
    node = before_epilogue(tensor, view.graph)
    shapes = (layer.weight_shape or () for layer in view.layers if layer.node is node)
    return math.prod(next(shapes, (0,)))


def _root(view: View, tensor: gs.Tensor) -> gs.Tensor:
    """Return the tensor that a branch reads: through its layer, constant factors and Q/DQ."""
    node = before_epilogue(tensor, view.graph)
    if node is not None and node.op in SUMS:
        return _root(view, node.inputs[0])
    if node is not None and node.op in WEIGHTED_OPS:
        tensor = node.inputs[0]
        node = producer_past_casts(tensor)
    while node is not None and (is_quantize(node) or is_dequantize(node) or _scales(view, node)):
        tensor = next(t for t in node.inputs if not view.is_constant(t))
        node = producer_past_casts(tensor)
    return base(tensor)


def _is_part(view: View, tensor: gs.Tensor) -> bool:
    """Whether a tensor is made by a layer or a constant factor, not just passed on."""
    node = before_epilogue(tensor, view.graph)
    return node is not None and (node.op in WEIGHTED_OPS or _scales(view, node))


def _scales(view: View, node: gs.Node) -> bool:
    return node.op == "Mul" and sum(not view.is_constant(t) for t in node.inputs) == 1
