"""A DequantizeLinear that some exporters write as the cast of a UINT8 image."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from reptrt.graph.net import first_free

_LOG = logging.getLogger(__name__)


def widen_pixels(model: onnx.ModelProto, where: str) -> None:
    """Replace each DequantizeLinear of a UINT8 graph input by (Cast(x) - zero point) * scale.

    Its scale, and the zero point if there is one, have to be a constant number each. In place; what
    is replaced is logged.

    Args:
        model: any model.
        where: what messages call it.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    pixels = {
        value.name
        for value in graph.input
        if value.type.tensor_type.elem_type == TensorProto.UINT8 and value.name not in constants
    }
    taken = {*constants, *(name for node in graph.node for name in (*node.input, *node.output))}
    replaced = []
    for place, node in reversed(list(enumerate(graph.node))):
        parameters = [constants.get(name) for name in node.input[1:] if name]
        if node.op_type != "DequantizeLinear" or node.input[0] not in pixels:
            continue
        values = [numpy_helper.to_array(tensor) for tensor in parameters if tensor is not None]
        if len(values) < len(parameters) or any(value.size != 1 for value in values):
            continue
        nodes = _arithmetic(graph, node, values, taken)
        del graph.node[place]
        for step in reversed(nodes):
            graph.node.insert(place, step)
        replaced.append(node.name or node.output[0])
    if replaced:
        _LOG.warning(
            "%s: DequantizeLinear %s is read as a cast of UINT8 pixels",
            *(where, ", ".join(reversed(replaced))),
        )


def _arithmetic(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    parameters: Sequence[npt.NDArray[Any]],
    taken: set[str],
) -> list[onnx.NodeProto]:
    """Return the nodes that stand for a DequantizeLinear; their constants are added to the graph.

    Args:
        graph: of the node.
        node: the DequantizeLinear.
        parameters: its scale, and its zero point if it has one.
        taken: names that are in use.
    """
    scale, *zero = (np.float32(value.reshape(())) for value in parameters)
    steps: list[tuple[str, np.float32 | None]] = [("Cast", None), ("Mul", scale)]
    if zero and zero[0]:
        steps.insert(1, ("Sub", zero[0]))
    nodes: list[onnx.NodeProto] = []
    source = node.input[0]
    for op, constant in steps:
        inputs = [source]
        if constant is not None:
            inputs.append(first_free(f"{node.output[0]}.{op}.value", taken))
            graph.initializer.append(numpy_helper.from_array(np.asarray(constant), inputs[1]))
        source = node.output[0] if op == "Mul" else first_free(f"{node.output[0]}.{op}", taken)
        taken.update((source, *inputs))
        nodes.append(helper.make_node(op, inputs, [source], f"{node.name or source}.{op}"))
    nodes[0].attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
    return nodes
