"""The layers that a Q/DQ graph asks TensorRT to run in INT8.

A Conv, ConvTranspose, Gemm or MatMul is planned INT8 when both its activation and its weight come
from a DequantizeLinear, with nothing but Casts and changes of shape in between. Every other node
runs in the type that the graph gives it.
"""

from collections.abc import Mapping

import onnx

from reptrt.graph.net import WEIGHTED_OPS

_TRANSPARENT = ("Cast", "Transpose", "Identity", "Reshape", "Flatten")


def planned_int8(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the names of the layers planned INT8, in the order of the graph.

    A node without a name is listed under the name of its output.
    """
    makers = {output: node for node in model.graph.node for output in node.output if output}
    return tuple(
        node_name(node)
        for node in model.graph.node
        if node.op_type in WEIGHTED_OPS
        and all(_is_dequantized(tensor, makers) for tensor in node.input[:2])
    )


def uint8_node(model: onnx.ModelProto) -> str | None:
    """Return the first Q/DQ node whose codes are UINT8 (``name (op)``), or None.

    A QuantizeLinear without zero point and output type gives UINT8 by the ONNX specification.
    """
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                types[node.output[0]] = attribute.t.data_type
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zero_point = node.input[2] if len(node.input) > 2 else ""
        has_type = any(attribute.name == "output_dtype" for attribute in node.attribute)
        implied = node.op_type == "QuantizeLinear" and not zero_point and not has_type
        if implied or types.get(zero_point) == onnx.TensorProto.UINT8:
            return f"{node_name(node)} ({node.op_type})"
    return None


def runtime_scale_node(model: onnx.ModelProto) -> str | None:
    """Return the first Q/DQ node whose scale depends on a graph input (``name (op)``), or None."""
    constant = {tensor.name for tensor in model.graph.initializer} | {""}
    constant |= {tensor.values.name for tensor in model.graph.sparse_initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[1] not in constant:
            return f"{node_name(node)} ({node.op_type})"
        if all(name in constant for name in node.input):
            constant.update(node.output)
    return None


def node_name(node: onnx.NodeProto) -> str:
    """Return a node's name, or that of its output if it has none."""
    return node.name or next((output for output in node.output if output), node.op_type)


def _is_dequantized(tensor: str, makers: Mapping[str, onnx.NodeProto]) -> bool:
    maker = makers.get(tensor)
    while maker is not None and maker.op_type in _TRANSPARENT:
        maker = makers.get(maker.input[0])
    return maker is not None and maker.op_type == "DequantizeLinear"
