"""The Q/DQ contract, part 2: axes, operators, types, opset, and what reads codes.

What is said of tensorrt_rtx was tried with 1.7.1 (parse, and build for sm89, without a GPU).
"""

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from reptrt.core.choices import OPSETS
from reptrt.graph.net import producer
from reptrt.graph.queries import (
    POINTWISE,
    float_type,
    is_dequantize,
    is_integer_op,
    label,
    moved_readers,
    producer_past_casts,
    scale_text,
    value_past_casts,
)
from reptrt.linter.rule import Defect
from reptrt.linter.view import View, parameters_of

_MIXED_OPERANDS = ("Pow", "Dropout", "BatchNormalization")  # whose operands may differ in type


def activation_per_channel(view: View) -> Iterator[Defect]:
    """An activation has one scale.

    Scales per input channel cannot be taken out of the sum over input channels, so there is no
    INT8 kernel for them. tensorrt_rtx parses them; the contract of TensorRT does not have them.
    """
    for node in view.activation_quantizes:
        scale = value_past_casts(node.inputs[1])
        if scale is not None and scale.size > 1:
            yield Defect(label(node), f"{scale.size} scales (per channel)", "one scale")


def weight_axis(view: View) -> Iterator[Defect]:
    """Scales of a weight lie along its output channels.

    Axis 0 for Conv, 1 for ConvTranspose, the axis of N for Gemm and MatMul. Scales along the input
    channels cannot be taken out of the sum: at best the layer runs in float. tensorrt_rtx parses
    them. TensorRT 8 computed wrong results for an INT8 ConvTranspose whose scales lay along an axis
    that its kernels did not expect (NVIDIA/TensorRT issue 1694).
    """
    for layer in view.layers:
        if layer.weight is None or producer_past_casts(layer.node.inputs[1]) is not layer.weight:
            continue
        parameters = parameters_of(layer.weight)
        scale = parameters.scale
        if scale is None or scale.ndim != 1 or scale.size < 2 or layer.rank is None:
            continue
        axis = parameters.axis + (layer.rank if parameters.axis < 0 else 0)
        if axis != layer.output_axis:
            expected = f"axis {layer.output_axis} for {layer.node.op}"
            yield Defect(label(layer.weight), f"scales along axis {axis}", expected)


def integer_operator(view: View) -> Iterator[Defect]:
    """Layers are float nodes between DQ and Q, not integer operators.

    QLinearConv, QLinearMatMul, ConvInteger, MatMulInteger, DynamicQuantizeLinear and the
    com.microsoft integer operators (QGemm, QLinearAdd...) do not parse.
    """
    for node in view.nodes:
        if is_integer_op(node):
            yield Defect(label(node), node.op, "the float operator between DQ and Q")


def mixed_types(view: View) -> Iterator[Defect]:
    """Input and weight of a layer have one float type.

    The type of a DQ's result is the type of its scale. In a strongly typed network, FP16 on one
    side and FP32 on the other does not parse.
    """
    for layer in view.layers:
        types = [float_type(tensor) for tensor in layer.node.inputs[:2]]
        if len({kind for kind in types if kind is not None}) > 1:
            got = f"input {types[0]}, weight {types[1]}"
            yield Defect(label(layer.node), got, f"both {types[0]}")


def scale_type(view: View) -> Iterator[Defect]:
    """A scale has the float type of the tensors around its pair.

    The input of a QuantizeLinear and its scale have one type by ONNX (up to opset 22): onnxruntime
    refuses others, tensorrt_rtx casts. The result of a DequantizeLinear has the type of its scale:
    a sum, a product or a Concat with a tensor of another type parses nowhere. Converters to FP16
    that leave scales in FP32, or the other way round, write such files. The operands of layers
    are QDQ011.
    """
    for node in view.quantizes:
        kind, scale = (float_type(tensor) for tensor in node.inputs[:2])
        if kind is not None and scale is not None and kind != scale:
            yield Defect(label(node), f"input {kind}, scale {scale}", f"a {kind} scale")
    for node in view.nodes:
        types = _operand_types(node)
        for tensor, kind in types:
            dequantize = producer(tensor)
            others = [other for _, other in types if other != kind]
            if dequantize is not None and is_dequantize(dequantize) and others:
                got = f"{kind} beside {others[0]} in {label(node)}"
                yield Defect(label(dequantize), got, f"a {others[0]} scale")
                break


def opset_outside(view: View) -> Iterator[Defect]:
    """The opset is 13 to 20.

    TensorRT 10.x and 11.x both take these. Before 13 there is no per-channel axis, before 19 no
    FP16 scale. tensorrt_rtx parsed everything from 9 to 26.
    """
    opset = int(view.graph.opset)
    if opset not in OPSETS:
        yield Defect("graph", f"opset {opset}", f"{OPSETS.start} to {OPSETS.stop - 1}")


def codes_read_as_numbers(view: View) -> Iterator[Defect]:
    """What QuantizeLinear makes is read by DequantizeLinear.

    Nodes that only move values may come between. A graph output of codes parses, and the caller
    gets integers without their scale; arithmetic on codes parses, and is done without the scale.
    """
    outputs = {id(tensor) for tensor in view.graph.outputs}
    for node in view.quantizes:
        codes = node.outputs[0]
        reading = [reader for reader, _ in moved_readers(codes)]
        others = [n.op for n in reading if not is_dequantize(n) and not is_integer_op(n)]
        others += [reader.op for reader in codes.outputs if reader.op == "Cast"]
        if id(codes) in outputs:
            others.append("the graph's output")
        if others or not reading:
            yield Defect(label(node), f"read by {', '.join(others) or 'nobody'}", "a DQ reads it")


def codes_from_elsewhere(view: View) -> Iterator[Defect]:
    """What DequantizeLinear reads was made by QuantizeLinear, or is a constant.

    Codes as graph input parse: whoever runs the engine has to quantize with just this scale.
    """
    for node in view.dequantizes:
        source = producer_past_casts(node.inputs[0])
        if source is None and not view.is_constant(node.inputs[0]):
            scale = scale_text(value_past_casts(node.inputs[1]))
            got = f"codes come in as {node.inputs[0].name}, scale {scale}"
            yield Defect(label(node), got, "a QuantizeLinear in the graph")


def simulated_bits(view: View) -> Iterator[Defect]:
    """The graph is no simulation of fewer than 8 bits.

    TensorRT has no such kernels: the engine would be as slow as INT8 and less accurate, and
    reptrt does not build it.
    """
    simulation = view.metadata.get("reptrt.simulation")
    if simulation:
        yield Defect("graph", simulation, "8 bits")


def _operand_types(node: gs.Node) -> list[tuple[gs.Tensor, str]]:
    """Return the operands that have to be of one float type, with their types where known."""
    if node.op not in (*POINTWISE, "Concat") or node.op in _MIXED_OPERANDS:
        return []
    operands = [tensor for tensor in node.inputs if not tensor.is_empty()]
    return [(tensor, kind) for tensor in operands if (kind := float_type(tensor)) is not None]
