"""Remove nodes that change nothing: Identity, inference-mode Dropout, ``x + 0`` and ``x * 1``.

Convolutions whose padding is given by a rule (auto_pad) get it as numbers where sizes are known.

Ensures: graph outputs keep their names, and every tensor that is left its value.
"""

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.core.errors import RewriteError
from reptrt.graph.net import Net, constant_of, constant_value, weighted_nodes
from reptrt.rewrite.borders import pads_of
from reptrt.rewrite.contract import RewriteReport
from reptrt.rewrite.linear_nodes import affine_of, data_input


def simplify(net: Net) -> RewriteReport:
    """Bypass every node that returns its input.

    Raises:
        RewriteError: a Dropout is in training mode.
    """
    graph = net.graph.toposort()
    changed = []
    for node in list(graph.nodes):
        _write_pads(node)
        result = node.outputs[0]
        if any(result is output for output in graph.outputs) or not _returns_its_input(node):
            continue
        _replace(result, data_input(node))
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


def _write_pads(node: gs.Node) -> None:
    """Replace the auto_pad of a convolution of known height and width by explicit pads."""
    is_ruled = node.op == "Conv" and node.attrs.get("auto_pad", "NOTSET") != "NOTSET"
    pads = pads_of(node) if is_ruled and constant_value(node.inputs[1]) is not None else None
    if pads is not None:
        del node.attrs["auto_pad"]
        node.attrs["pads"] = pads or [0] * 2 * (constant_of(node.inputs[1]).ndim - 2)


def _returns_its_input(node: gs.Node) -> bool:
    if node.op == "Identity":
        return True
    if node.op == "Dropout":
        if len(node.inputs) > 2 and np.any(constant_value(node.inputs[2])):
            raise RewriteError(f"{node.name}: dropout in training mode; export after net.eval()")
        return True
    affine = None if node.op == "BatchNormalization" else affine_of(node)
    return affine is not None and bool(np.all(affine.kernel == 1) and not np.any(affine.bias))


def _replace(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every reader of ``old`` read ``new``."""
    for reader in list(old.outputs):
        for index, tensor in enumerate(reader.inputs):
            if tensor is old:
                reader.inputs[index] = new
