"""The Q/DQ contract, part 1: codes, scales and zero points (QDQ001 to 005, 008, 010).

What is said of tensorrt_rtx was tried with 1.7.1 (parse, and build for sm89, without a GPU).
"""

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.graph.queries import (
    codes_type,
    given,
    is_dequantize,
    is_integer_op,
    is_quantize,
    label,
    producer_past_casts,
    readers,
    value_past_casts,
)
from reptrt.linter.rule import Defect
from reptrt.linter.view import Parameters, View, codes_source

_OTHER_FORMATS = ("float8", "float4", "int4")  # TensorRT has them, but not for convolutions
_FP8 = "float8_e4m3fn"  # but this one


def nonzero_zero_point(view: View) -> Iterator[Defect]:
    """Every zero point is 0.

    TensorRT quantizes symmetrically, x ~ scale * q. A graph with another zero point, for example
    one that onnxruntime's quantize_static writes by default, does not parse.
    """
    for parameters in view.parameters:
        zero_point = parameters.zero_point
        if zero_point is None or not np.any(zero_point.astype(np.float64)):
            continue
        worst = zero_point.ravel()[np.abs(zero_point.astype(np.float64)).argmax()]
        yield Defect(label(parameters.node), f"zero point {worst}", "0")


def codes_not_int8(view: View) -> Iterator[Defect]:
    """Codes are INT8.

    UINT8 weights and graph inputs do not parse. A UINT8 activation with zero point 0 is worse: it
    parses with a warning and is read as INT8, so codes 128 to 255 are clipped away. A
    QuantizeLinear without zero point means UINT8 too. INT16 does not parse. FP4 and INT4
    have kernels for matrix products, none for convolutions. FP8 (E4M3) has both, from SM89 on:
    tensorrt_rtx builds such convolutions. INT32 has a rule of its own (QDQ008).
    """
    for parameters in view.parameters:
        node = parameters.node
        kind = codes_type(node)
        source = producer_past_casts(node.inputs[0])
        if kind in (None, "int8", "int32", _FP8):
            continue
        if source is not None and is_integer_op(source):  # that is QDQ009
            continue
        if kind.startswith(_OTHER_FORMATS) and not _feeds_convolution(node):
            continue
        implied = is_quantize(node) and given(node, 2) is None and "output_dtype" not in node.attrs
        yield Defect(label(node), f"{kind.upper()} codes{' (no zero point)' * implied}", "INT8")


def scale_not_positive(view: View) -> Iterator[Defect]:
    """Scales are positive and finite.

    A scale that is 0, negative or NaN does not parse. An infinite one does: every value becomes
    0 * inf = NaN.
    """
    for parameters in view.parameters:
        scale = parameters.scale
        if scale is None:
            continue
        values = scale.astype(np.float64).ravel()
        bad = values[~((values > 0) & np.isfinite(values))]
        if bad.size:
            where = f" in {bad.size} of {values.size} channels" if values.size > 1 else ""
            got = f"scale {bad[0]:g}{where}"
            yield Defect(label(parameters.node), got, "a positive finite scale")


def parameters_not_constant(view: View) -> Iterator[Defect]:
    """Scale and zero point are constants.

    TensorRT needs both when it builds. The build fails on a zero point that is computed at run
    time; tensorrt_rtx crashes the process on such a scale.
    """
    for parameters in view.parameters:
        for role, index in (("scale", 1), ("zero point", 2)):
            tensor = given(parameters.node, index)
            if tensor is None or view.is_constant(tensor):
                continue
            source = producer_past_casts(tensor)
            if source is None or source.op != "DynamicQuantizeLinear":  # that is QDQ009
                got = f"{role} {tensor.name} is computed at run time"
                yield Defect(label(parameters.node), got, "a constant")


def parameters_of_wrong_shape(view: View) -> Iterator[Defect]:
    """A scale has one value, or one per index of its axis; the zero point has as many.

    The parser counts both. Scales per block are for INT4 and FP4 by TensorRT's documentation;
    tensorrt_rtx parses them for INT8.
    """
    for parameters in view.parameters:
        scale, zero_point = parameters.scale, parameters.zero_point
        if scale is None:
            continue
        if scale.ndim > 1 and codes_type(parameters.node) == "int8":
            got = f"scales of shape {scale.shape}"
            yield Defect(label(parameters.node), got, "one scale, or one per channel")
            continue
        if zero_point is not None and zero_point.size != scale.size:
            got = f"{zero_point.size} zero points for {scale.size} scales"
            yield Defect(label(parameters.node), got, f"{scale.size} zero points")
        channels = _axis_size(parameters)
        if scale.size > 1 and channels is not None and scale.size != channels:
            got = f"{scale.size} scales for {channels} channels (axis {parameters.axis})"
            yield Defect(label(parameters.node), got, f"{channels} scales")


def int32_codes(view: View) -> Iterator[Defect]:
    """A bias is float: no DequantizeLinear reads INT32.

    onnxruntime writes INT32 biases; TensorRT's dequantization takes no INT32, so the graph does
    not parse. It adds the float bias to the INT32 accumulator by itself.
    """
    for node in view.dequantizes:
        if codes_type(node) == "int32":
            yield Defect(label(node), f"INT32 {node.inputs[0].name}", "a float bias, no Q/DQ")


def int8_constant(view: View) -> Iterator[Defect]:
    """An INT8 constant has at least one dimension and only a DequantizeLinear reads it.

    The build fails if a Reshape or Transpose comes between constant and DQ, or if the constant is a
    scalar, because TensorRT then puts a reshape there itself.
    """
    seen: set[int] = set()
    for node in view.nodes:
        for index, tensor in enumerate(node.inputs):
            values = value_past_casts(tensor)
            if values is None or values.dtype != np.int8 or id(tensor) in seen:
                continue
            if is_quantize(node) or (is_dequantize(node) and index) or is_integer_op(node):
                continue  # a zero point, or the operand of an integer operator
            seen.add(id(tensor))
            if not is_dequantize(node) and node.op != "Identity":
                yield Defect(label(node), f"{node.op} reads INT8 {tensor.name}", "a DQ reads it")
            elif is_dequantize(node) and values.ndim == 0:
                yield Defect(label(node), f"scalar INT8 {tensor.name}", "shape (1,), or float")


def _feeds_convolution(node: gs.Node) -> bool:
    """Whether a convolution reads what a Q or DQ makes."""
    return any(
        reader.op in ("Conv", "ConvTranspose")
        or (is_dequantize(reader) and _feeds_convolution(reader))
        for reader, _ in readers(node.outputs[0])
    )


def _axis_size(parameters: Parameters) -> int | None:
    """Return the size of the quantized axis of a constant, None if it is not known."""
    node = parameters.node
    values = value_past_casts(codes_source(node) if is_dequantize(node) else node.inputs[0])
    if values is None or not -values.ndim <= parameters.axis < values.ndim:
        return None
    return int(values.shape[parameters.axis])
