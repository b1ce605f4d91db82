"""Questions about one tensor or node of a Q/DQ graph.

All of them look through ``Cast`` and ``Identity``: a graph with FP16 parts has casts between any
two nodes. A node *moves* values if it changes their places only, so that Q/DQ commute with it.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from reptrt.core.grid import Grid
from reptrt.graph.net import WEIGHTED_OPS, constant_value, producer

LOOKED_THROUGH = ("Cast", "Identity")
SUMS = ("Add", "Sum")
POOLS = ("AveragePool", "GlobalAveragePool", "ReduceMean")
ACTIVATIONS = (
    *("Relu", "Clip", "LeakyRelu", "PRelu", "ThresholdedRelu", "Elu", "Selu", "Celu", "Gelu"),
    *("Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Mish", "Tanh", "Softplus", "Softsign"),
    "QuickGelu",
)
POINTWISE = (
    *ACTIVATIONS,
    *(*SUMS, "Sub", "Mul", "Div", "Pow", "Sqrt", "Exp", "Log", "Erf", "Abs", "Neg", "Reciprocal"),
    *("Min", "Max", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Where"),
    *("BatchNormalization", "Dropout"),
)
_MOVING = (
    *("MaxPool", "GlobalMaxPool", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose"),
    *("Slice", "Split", "DepthToSpace", "SpaceToDepth", "Expand", "Tile", "Gather"),
)
_SHAPE_OPS = ("Shape", "Size", "NonZero")  # what they make is no activation
_POINTWISE_OR_CAST = (*POINTWISE, *LOOKED_THROUGH)
_FIRST_ONLY = ("Clip", "Resize", "Pad", "Pow", "Dropout", "BatchNormalization", *POOLS)
_INTEGER_OPS = (
    *("ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QGemm", "QAttention"),
    *("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "DynamicQuantizeLSTM", "MatMulNBits"),
)
_BINARY = ("Add", "Sub", "Mul", "Div")
_TYPE_KEEPERS = (*POINTWISE, *_MOVING, "Pad", *POOLS, *WEIGHTED_OPS, "Concat", "Resize", "Identity")


def label(node: gs.Node) -> str:
    """Return a node's name, or that of its first output."""
    return str(node.name or next((t.name for t in node.outputs if t.name), node.op))


def is_integer_op(node: gs.Node) -> bool:
    """Whether a node computes on codes: QLinearConv, ConvInteger, QGemm..."""
    return node.op.startswith("QLinear") or node.op in _INTEGER_OPS


def is_quantize(node: gs.Node | None) -> bool:
    """Whether a node is a QuantizeLinear."""
    return node is not None and node.op == "QuantizeLinear"


def is_dequantize(node: gs.Node | None) -> bool:
    """Whether a node is a DequantizeLinear."""
    return node is not None and node.op == "DequantizeLinear"


def moves(node: gs.Node) -> bool:
    """Whether a node changes no value, only places; zeros that a Pad adds are code 0."""
    if node.op == "Pad":
        fill = given(node, 2)
        value = node.attrs.get("value", 0) if fill is None else value_past_casts(fill)
        is_constant = node.attrs.get("mode", "constant") == "constant"
        return not is_constant or (value is not None and not np.any(value))
    if node.op == "Resize":
        return bool(node.attrs.get("mode", "nearest") == "nearest")
    return node.op in _MOVING


def fuses(node: gs.Node) -> bool:
    """Whether a float node joins the kernel before it, or commutes with Q/DQ."""
    return node.op in (*POINTWISE, *LOOKED_THROUGH, "Concat", "Pad") or moves(node)


def value_inputs(node: gs.Node) -> list[tuple[int, gs.Tensor]]:
    """Return the inputs of a node that carry values: no shapes, bounds, conditions, constants."""
    if node.op in _SHAPE_OPS:
        return []
    count = 1 if moves(node) or node.op in _FIRST_ONLY else len(node.inputs)
    numbered = list(enumerate(node.inputs))[1:3] if node.op == "Where" else enumerate(node.inputs)
    return [
        (index, tensor)
        for index, tensor in list(numbered)[:count]
        if not tensor.is_empty() and value_past_casts(tensor) is None
    ]


def joins_one_tensor(node: gs.Node, order: Mapping[int, int]) -> bool:
    """Whether a node with several operands computes a pointwise function of one tensor.

    So does the sum inside GELU by tanh, 0.5 x (1 + tanh(a (x + b x^3))), but no residual sum.

    Args:
        node: one of the graph.
        order: id of each node -> its place in an order of execution.
    """
    return joined_tensor(node, order) is not None


def joined_tensor(node: gs.Node, order: Mapping[int, int]) -> gs.Tensor | None:
    """Return the one tensor of which a node with several operands is a pointwise function.

    From the operands, the way back goes through pointwise nodes, the latest first, until one tensor
    is left; if there is no pointwise node before that, the result is None.
    """
    front = {id(tensor): tensor for _, tensor in value_inputs(node)}
    while len(front) > 1:
        makers = [(maker, key) for key, t in front.items() if (maker := producer(t)) is not None]
        open_ = [(order[id(n)], key, n) for n, key in makers if n.op in _POINTWISE_OR_CAST]
        if not open_:
            return None
        _, key, latest = max(open_, key=lambda item: item[0])
        del front[key]
        front |= {id(tensor): tensor for _, tensor in value_inputs(latest)}
    return next(iter(front.values()), None)


def value_past_casts(tensor: gs.Tensor) -> npt.NDArray[np.generic] | None:
    """Return the value of a constant, casts looked through; None if it is not a known constant."""
    value = constant_value(tensor)
    maker = producer(tensor)
    if value is None and maker is not None and maker.op in LOOKED_THROUGH:
        return value_past_casts(maker.inputs[0])
    return value


def given(node: gs.Node, index: int) -> gs.Tensor | None:
    """Return an input of a node; None if it is left out."""
    if index >= len(node.inputs) or node.inputs[index].is_empty():
        return None
    return node.inputs[index]


def base(tensor: gs.Tensor) -> gs.Tensor:
    """Return the tensor that a chain of casts starts from."""
    while (node := producer(tensor)) is not None and node.op in LOOKED_THROUGH:
        tensor = node.inputs[0]
    return tensor


def producer_past_casts(tensor: gs.Tensor) -> gs.Node | None:
    """Return the node that computes a tensor, in front of casts."""
    return producer(base(tensor))


def readers(
    tensor: gs.Tensor, through: Collection[str] = LOOKED_THROUGH
) -> Iterator[tuple[gs.Node, int]]:
    """Yield the consumers of a tensor, each with the index of the input that reads it.

    Args:
        tensor: any tensor.
        through: kinds of nodes whose consumers are yielded in their place.
    """
    seen: set[int] = set()
    for node in tensor.outputs:
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.op in through:
            yield from readers(node.outputs[0], through)
        else:
            yield from ((node, i) for i, read in enumerate(node.inputs) if read is tensor)


def quantize_before(node: gs.Node | None) -> gs.Node | None:
    """Return the QuantizeLinear whose codes a DequantizeLinear reads; None if there is none."""
    source = (
        producer_past_casts(node.inputs[0]) if is_dequantize(node) and node is not None else None
    )
    return source if is_quantize(source) else None


def pair_readers(quantize: gs.Node) -> list[tuple[gs.Node, int]]:
    """Return the consumers of the dequantized output of a Q."""
    return [
        reading
        for dequantize, _ in readers(quantize.outputs[0])
        if is_dequantize(dequantize)
        for reading in readers(dequantize.outputs[0])
    ]


def moved_readers(tensor: gs.Tensor) -> Iterator[tuple[gs.Node, int]]:
    """Yield the consumers of a tensor, behind nodes that move values."""
    for node, index in readers(tensor):
        if moves(node) and index == 0:
            for output in node.outputs:
                yield from moved_readers(output)
        else:
            yield node, index


def dequantize_before(tensor: gs.Tensor) -> gs.Node | None:
    """Return the DequantizeLinear that a tensor's values come from, or None.

    Nodes that move values are passed, and a Concat whose inputs all have the same scale.
    """
    node = producer_past_casts(tensor)
    while node is not None and moves(node):
        node = producer_past_casts(node.inputs[0])
    if node is not None and node.op == "Concat":
        pairs = [dequantize_before(part) for part in node.inputs]
        scales = [None if dq is None else value_past_casts(dq.inputs[1]) for dq in pairs]
        return pairs[0] if all(same_scale(scales[0], scale) for scale in scales) else None
    return node if is_dequantize(node) else None


def same_scale(
    first: npt.NDArray[np.generic] | None, second: npt.NDArray[np.generic] | None
) -> bool:
    """Whether two scales are equal, to the rounding of FP16; unknown scales are not."""
    if first is None or second is None or first.size != second.size:
        return False
    left, right = first.astype(np.float64).ravel(), second.astype(np.float64).ravel()
    return bool(np.allclose(left, right, rtol=1e-3, atol=0.0, equal_nan=True))


def scale_text(scale: npt.NDArray[np.generic] | None) -> str:
    """Return a scale as text."""
    if scale is None:
        return "unknown"
    return f"{float(scale.ravel()[0]):.6g}" if scale.size == 1 else f"{scale.size} scales"


@dataclass(frozen=True, slots=True, eq=False)
class Quantization:
    """The parameters of a Q or DQ: x = scale * (code - zero_point)."""

    scale: npt.NDArray[Any]  # one value, or one per index of ``axis``
    axis: int
    type: str  # of the codes: "int8"
    zero_point: int

    @property
    def grid(self) -> Grid | None:
        """The codes less the zero point; None if they are not INT8 or UINT8."""
        if self.type not in ("int8", "uint8"):
            return None
        limits = np.iinfo(self.type)
        return Grid(int(limits.min) - self.zero_point, int(limits.max) - self.zero_point)


def quantization_of(node: gs.Node) -> Quantization | None:
    """Return scale and codes of a Q or DQ.

    None: the node is another one, scale or zero point are not known constants, the scale has a
    value per block, or the zero points differ.
    """
    if not (is_quantize(node) or is_dequantize(node)) or node.attrs.get("block_size", 0):
        return None
    scale, kind, tensor = value_past_casts(node.inputs[1]), codes_type(node), given(node, 2)
    zero_points = np.zeros(1, np.int8) if tensor is None else value_past_casts(tensor)
    if scale is None or kind is None or zero_points is None or zero_points.size == 0:
        return None
    if (zero_points != zero_points.flat[0]).any():
        return None
    return Quantization(scale, int(node.attrs.get("axis", 1)), kind, int(zero_points.flat[0]))


def symmetric_int8_scale(node: gs.Node) -> npt.NDArray[Any] | None:
    """Return the scale () of a Q or DQ of INT8 codes that has a zero point input, of value 0.

    None: the node is anything else.
    """
    parameters = quantization_of(node)
    if parameters is None or given(node, 2) is None or parameters.scale.size != 1:
        return None
    is_symmetric = parameters.type == "int8" and parameters.zero_point == 0
    return parameters.scale.reshape(()) if is_symmetric else None


def codes_type(node: gs.Node) -> str | None:
    """Return the type of a Q's or DQ's codes, such as ``int8``; None if it is unknown.

    A QuantizeLinear without zero point and output type gives UINT8 by the ONNX specification.
    """
    zero_point = given(node, 2)
    if is_quantize(node):
        if node.attrs.get("output_dtype"):
            return _type_name(node.attrs["output_dtype"])
        return "uint8" if zero_point is None else _type_of(zero_point)
    source = quantize_before(node)
    if source is not None:
        return codes_type(source)
    return _type_of(node.inputs[0]) or (None if zero_point is None else _type_of(zero_point))


def float_type(tensor: gs.Tensor) -> str | None:
    """Return the float type that a graph gives a tensor, such as ``float16``; None if unknown."""
    while (value := constant_value(tensor)) is None:
        node = producer(tensor)
        if node is None:
            return None if tensor.dtype is None else _float_name(tensor.dtype)
        if node.op == "Cast":
            return _float_name(node.attrs["to"])
        if is_dequantize(node) and node.attrs.get("output_dtype"):
            return _float_name(node.attrs["output_dtype"])
        if not is_dequantize(node) and node.op not in _TYPE_KEEPERS:
            return None
        tensor = node.inputs[1 if is_dequantize(node) or node.op == "Where" else 0]
    return _float_name(value.dtype)


def is_private_past_casts(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Whether a tensor has one consumer, behind casts, and is no output of the graph."""
    chain = base(tensor)
    asked = any(output is tensor or base(output) is chain for output in graph.outputs)
    return len(list(readers(chain))) == 1 and not asked


def before_epilogue(tensor: gs.Tensor, graph: gs.Graph) -> gs.Node | None:
    """Return the node whose kernel makes a tensor: BatchNormalization and constant factors fuse."""
    node = producer_past_casts(tensor)
    while node is not None:
        operands = [t for t in node.inputs if not t.is_empty() and value_past_casts(t) is None]
        fuses = node.op == "BatchNormalization" or (node.op in _BINARY and len(operands) == 1)
        if not (fuses and operands) or not is_private_past_casts(graph, operands[0]):
            return node
        node = producer_past_casts(operands[0])
    return None


def _type_of(tensor: gs.Tensor) -> str | None:
    """Return the type that a constant has or a tensor declares, None if unknown."""
    value = value_past_casts(tensor)
    if value is not None:
        return str(value.dtype)
    return None if tensor.dtype is None else _type_name(tensor.dtype)


def _type_name(kind: npt.DTypeLike | int) -> str:
    """Return the name of a NumPy type or ONNX type code."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind) if isinstance(kind, int) else np.dtype(kind)
    return str(dtype)


def _float_name(kind: npt.DTypeLike | int) -> str | None:
    """Return the name of a type if it is a float type."""
    name = _type_name(kind)
    return name if name.startswith(("float", "bfloat")) else None
