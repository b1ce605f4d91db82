"""Q/DQ pairs that cost a pass or a rounding of their own (QDQ106 to 111, 113, 114).

Costs are those of the placement rules in TensorRT's documentation; all of these graphs parse.
"""

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from reptrt.graph.queries import (
    ACTIVATIONS,
    SUMS,
    dequantize_before,
    is_dequantize,
    is_quantize,
    label,
    moved_readers,
    moves,
    pair_readers,
    producer_past_casts,
    quantize_before,
    readers,
    same_scale,
    scale_text,
    value_past_casts,
)
from reptrt.linter.rule import Defect
from reptrt.linter.view import View

_GATES = ("Sigmoid", "HardSigmoid", "Softmax", "LogSoftmax", "Tanh")


def concat_scales(view: View) -> Iterator[Defect]:
    """All inputs of a Concat, and its output, have one scale.

    Then concatenating is copying codes, often nothing at all. With several scales each part is
    dequantized and quantized again.
    """
    for node in view.nodes:
        if node.op != "Concat" or id(node) not in view.between:
            continue
        sources = [dequantize_before(tensor) for tensor in node.inputs]
        scales = [value_past_casts(dq.inputs[1]) for dq in sources if dq is not None]
        after = [r for r, _ in moved_readers(node.outputs[0]) if is_quantize(r)]
        scales += [value_past_casts(quantize.inputs[1]) for quantize in after] if scales else []
        if any(not same_scale(scales[0], scale) for scale in scales[1:]):
            texts = dict.fromkeys(scale_text(scale) for scale in scales)
            yield Defect(label(node), f"scales {', '.join(texts)}", "one scale, inputs and output")


def requantized(view: View) -> Iterator[Defect]:
    """No tensor is quantized twice in a row.

    DQ followed by Q rounds a second time and, with another scale, is a pass of its own. The same
    scale on both sides of a MaxPool, Reshape or the like costs nothing and is not reported.
    """
    for node in view.activation_quantizes:
        direct = producer_past_casts(node.inputs[0])
        source = dequantize_before(node.inputs[0])
        if source is None or (direct is not None and direct.op == "Concat"):
            continue
        first, second = value_past_casts(source.inputs[1]), value_past_casts(node.inputs[1])
        if direct is source or not same_scale(first, second):
            got = f"scale {scale_text(second)} after scale {scale_text(first)}"
            yield Defect(label(node), got, "one Q/DQ pair per tensor")


def several_scales(view: View) -> Iterator[Defect]:
    """All readers of a tensor share one scale.

    Each further scale is another quantization pass over the tensor, and another copy of it.
    """
    for node in view.nodes:
        for tensor in node.outputs:
            yield from _several_scales(node, tensor)
    for tensor in view.graph.inputs:
        yield from _several_scales(None, tensor)


def quantized_output(view: View) -> Iterator[Defect]:
    """Outputs of the graph are not quantized.

    Logits, boxes and scores go to the caller in float anyway: a pair on them rounds the result,
    costs a pass and saves nothing. Detection heads stay in float from the last convolution on.
    """
    for tensor, last in _output_pairs(view):
        yield Defect(
            label(last), f"output {tensor.name} is rounded to 256 values", "a float output"
        )


def pair_to_no_layer(view: View) -> Iterator[Defect]:
    """What a pair rounds reaches a layer or a pool that runs in INT8.

    INT8 is faster in convolutions, matrix products and pools. A pair from which none of them is
    reached, past Concat, Reshape, Transpose and pointwise nodes, only rounds. Where a detector
    decodes its boxes, one scale for pixels and scores leaves nothing of the scores. A pair right at
    an output is QDQ109.
    """
    at_output = {id(last) for _, last in _output_pairs(view)}
    for node in view.activation_quantizes:
        codes = node.outputs[0]
        is_read = any(is_dequantize(reader) for reader, _ in moved_readers(codes))
        if is_read and id(codes) not in view.before_int8 and id(node) not in at_output:
            ends = dict.fromkeys(reader.op for reader, _ in pair_readers(node))
            got = f"only {', '.join(ends) or 'an output'} read {node.inputs[0].name}"
            yield Defect(label(node), got, "no Q/DQ behind the last layer")


def pair_of_two_scales(view: View) -> Iterator[Defect]:
    """The Q and the DQ of a pair have one scale.

    With two, the pair multiplies the tensor by their ratio. That is meant where a scaled skip is
    added to a layer (there it is not reported), and a mistake elsewhere.
    """
    for node in view.dequantizes:
        source = quantize_before(node)
        if source is None:
            continue
        first, second = value_past_casts(source.inputs[1]), value_past_casts(node.inputs[1])
        if first is None or second is None or same_scale(first, second):
            continue
        if any(reader.op not in SUMS for reader, _ in moved_readers(node.outputs[0])):
            got = f"Q with scale {scale_text(first)}, DQ with {scale_text(second)}"
            yield Defect(label(node), got, "the same scale in both")


def quantized_bias(view: View) -> Iterator[Defect]:
    """The bias of a layer has no Q/DQ.

    TensorRT takes the float bias into the accumulator. An INT8 bias parses, has 8 bits where the
    accumulator has 32, and keeps the layer from being recognised as INT8.
    """
    for layer in view.layers:
        tensor = layer.node.inputs[2] if len(layer.node.inputs) > 2 else None
        source = None if tensor is None or tensor.is_empty() else dequantize_before(tensor)
        if source is not None and _is_int8(source):
            yield Defect(label(layer.node), f"bias through {label(source)}", "a float bias")


def quantized_gate(view: View) -> Iterator[Defect]:
    """The output of Sigmoid, Softmax or Tanh is quantized only for an INT8 layer.

    As a gate or a factor of SiLU it is multiplied in float: a pair on it only loses accuracy. The
    pair belongs behind the product.
    """
    for node in view.activation_quantizes:
        before = producer_past_casts(node.inputs[0])
        after = [reader.op for reader, _ in pair_readers(node)]
        if before is None or before.op not in _GATES or not after:
            continue
        if all(op in ("Mul", "Add", "Sub", "Div") for op in after):
            yield Defect(label(node), f"Q/DQ between {before.op} and {after[0]}", "no Q/DQ")


def _output_pairs(view: View) -> Iterator[tuple[gs.Tensor, gs.Node]]:
    """Yield each output of the graph that is only a pair's result, and the pair's Q (else DQ)."""
    for tensor in view.graph.outputs:
        dequantize = _only_from(view, tensor)
        if dequantize is not None:
            yield tensor, quantize_before(dequantize) or dequantize


def _several_scales(node: gs.Node | None, tensor: gs.Tensor) -> Iterator[Defect]:
    """Yield a defect if a tensor, made by ``node``, is quantized with more than one scale."""
    if node is not None and (node.op in ("Cast", "Identity") or is_dequantize(node)):
        return  # casts belong to the tensor before them
    quantizes = [reader for reader, index in readers(tensor) if is_quantize(reader) and not index]
    scales = [value_past_casts(quantize.inputs[1]) for quantize in quantizes]
    if any(not same_scale(scales[0], scale) for scale in scales[1:]):
        texts = dict.fromkeys(scale_text(scale) for scale in scales)
        yield Defect(label(quantizes[0]), f"{tensor.name} with scales {', '.join(texts)}", "one")


def _only_from(view: View, tensor: gs.Tensor) -> gs.Node | None:
    """Return the DQ of an activation if a tensor is only that, activated or moved."""
    node = producer_past_casts(tensor)
    if node is None or view.is_constant(tensor):
        return None
    if is_dequantize(node):
        return node
    if not (moves(node) or node.op in (*ACTIVATIONS, *_GATES, "Mul")):
        return None
    sources = [_only_from(view, source) for source in view.data_inputs(node)]
    return sources[0] if sources and all(dq is not None for dq in sources) else None


def _is_int8(dequantize: gs.Node) -> bool:
    values = value_past_casts(dequantize.inputs[0])
    return values is None or str(values.dtype) == "int8"
