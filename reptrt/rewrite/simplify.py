"""Remove what only an exporter needed: Identity, inference-mode Dropout, arithmetic on constants.

Ensures: graph outputs keep their names; what depends on constants alone is an initializer.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator

from reptrt.core.errors import RewriteError
from reptrt.graph.net import Net, constant_value, weighted_nodes
from reptrt.rewrite.contract import RewriteReport

_KEPT = (  # though their inputs are constant: codes of weights, and what is random
    "QuantizeLinear",
    "DequantizeLinear",
    "RandomNormalLike",
    "RandomUniformLike",
    "Bernoulli",
    "Multinomial",
)


def simplify(net: Net) -> RewriteReport:
    """Bypass Identity and Dropout, evaluate nodes whose inputs are all constant.

    Raises:
        RewriteError: a Dropout is in training mode.
    """
    graph = net.graph.toposort()
    changed = []
    for node in list(graph.nodes):
        result = node.outputs[0]
        if any(result is output for output in graph.outputs):
            continue
        value = _value_of(node, graph.opset)
        if value is not None:
            _replace(result, gs.Constant(result.name, value))
        elif node.op not in ("Identity", "Dropout"):
            continue
        else:
            if len(node.inputs) > 2 and np.any(constant_value(node.inputs[2])):
                raise RewriteError(
                    f"{node.name}: dropout in training mode; export after net.eval()"
                )
            _replace(result, node.inputs[0])
        changed.append(node.name)
        node.inputs.clear()
        node.outputs.clear()
    graph.cleanup(remove_unused_graph_inputs=False)
    return RewriteReport("simplify", tuple(changed))


def narrow_to_float32(net: Net) -> None:
    """Round the weights and biases that rewrites have made in float64 to float32."""
    for node in weighted_nodes(net.graph):
        for tensor in node.inputs[1:]:
            if isinstance(tensor, gs.Constant) and tensor.dtype == np.float64:
                tensor.values = tensor.values.astype(np.float32)


def _value_of(node: gs.Node, opset: int) -> npt.NDArray[Any] | None:
    """Return the output of a node that depends on constants alone, else None."""
    if node.op in ("Constant", "Identity"):
        return constant_value(node.outputs[0])
    if node.op in _KEPT or node.domain not in (None, "", "ai.onnx"):
        return None
    if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
        return None  # its branches may read tensors that are not among its inputs
    given = [tensor for tensor in node.inputs if tensor.name]
    values = {t.name: value for t in given if (value := constant_value(t)) is not None}
    if not given or len(values) < len({t.name for t in given}) or len(node.outputs) != 1:
        return None
    inputs = {name: gs.Variable(name, value.dtype, value.shape) for name, value in values.items()}
    output = gs.Variable(node.outputs[0].name)
    arguments = [inputs.get(tensor.name, tensor) for tensor in node.inputs]
    copy = gs.Node(node.op, node.name, node.attrs, arguments, [output])
    graph = gs.Graph([copy], list(inputs.values()), [output], opset=opset)
    evaluator = ReferenceEvaluator(gs.export_onnx(graph, do_type_check=False))
    (result,) = evaluator.run(None, values)
    return np.asarray(result)


def _replace(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every reader of ``old`` read ``new``."""
    for reader in list(old.outputs):
        for index, tensor in enumerate(reader.inputs):
            if tensor is old:
                reader.inputs[index] = new
