"""Remove what only an exporter needed: Identity, inference-mode Dropout, Constant nodes.

Ensures: graph outputs keep their names; every constant is an initializer.
"""

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.errors import RewriteError
from reptrt.graph import Net, constant_value, weighted_nodes
from reptrt.rewrite.contract import RewriteReport


def simplify(net: Net) -> RewriteReport:
    """Bypass Identity and Dropout, turn Constant nodes and Identities of constants into constants.

    Raises:
        RewriteError: a Dropout is in training mode.
    """
    graph = net.graph
    changed = []
    for node in list(graph.nodes):
        if node.op not in ("Identity", "Dropout", "Constant"):
            continue
        result = node.outputs[0]
        if any(result is output for output in graph.outputs):
            continue
        value = constant_value(result)
        if value is not None:
            _replace(result, gs.Constant(result.name, value))
        elif node.op == "Constant":
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


def _replace(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every reader of ``old`` read ``new``."""
    for reader in list(old.outputs):
        for index, tensor in enumerate(reader.inputs):
            if tensor is old:
                reader.inputs[index] = new
