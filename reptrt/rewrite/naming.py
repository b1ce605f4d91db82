"""Names for fused nodes and their constants, after the modules that they came from."""

import re
from collections.abc import Sequence

import onnx_graphsurgeon as gs

from reptrt.graph.net import WEIGHTED_OPS, Net, first_free, weighted_nodes

_FOLDED = re.compile(r"\.folded(_\d+)?$")  # what `layers.set_parameters` appends
_NAMED = (*WEIGHTED_OPS, "BatchNormalization")  # their parameters are named after a module


def common_prefix(names: Sequence[str]) -> str:
    """Return the dotted prefix that all names share.

    >>> common_prefix(["stage1.0.rbr_dense.conv.weight", "stage1.0.rbr_identity.bias"])
    'stage1.0'
    """
    if not names:
        return ""
    parts = [name.split(".") for name in names]
    shared = 0
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    return ".".join(parts[0][: min(shared, min(len(part) for part in parts) - 1)])


def parameter_names(nodes: Sequence[gs.Node]) -> list[str]:
    """Return the names of the constants that nodes read, without the suffix of folded ones."""
    names = []
    for node in nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant):
                names.append(_FOLDED.sub("", tensor.name))
    return names


def block_name(root: gs.Node, nodes: Sequence[gs.Node]) -> str:
    """Return what the parameters of a block have in common, else the path of its last node."""
    names = parameter_names(nodes)
    if not all("." in name for name in names):  # a factor may have any name
        names = parameter_names([node for node in nodes if node.op in _NAMED])
    if all("." in name for name in names) and (prefix := common_prefix(names)):
        return prefix
    path = (root.name or root.outputs[0].name).strip("/").split("/")
    return path[-2] if len(path) > 1 else f"{path[0]}.fused"


def layer_name(node: gs.Node) -> str:
    """Return the module path in the name of a node's weight, else the node's own name.

    >>> layer_name(gs.Node("Gemm", "n7", inputs=[gs.Variable("x"), gs.Variable("head.fc.weight")]))
    'head.fc'
    """
    name = _FOLDED.sub("", node.inputs[1].name)
    if name.endswith(".weight") and name != ".weight":
        return name.removesuffix(".weight")
    return str(node.name or node.outputs[0].name)


def name_layers(net: Net) -> None:
    """Name every weighted node after the module its weight came from, its constants after it."""
    taken = {node.name for node in net.graph.nodes}
    tensors = set(net.graph.tensors())
    for node in weighted_nodes(net.graph):
        taken.discard(node.name)
        node.name = first_free(layer_name(node), taken)
        taken.add(node.name)
        for tensor, role in zip(node.inputs[1:], ("weight", "bias"), strict=False):
            wanted = f"{node.name}.{role}"
            private = isinstance(tensor, gs.Constant) and len(tensor.outputs) == 1
            if private and wanted not in tensors:
                tensors.discard(tensor.name)
                tensor.values = tensor.values  # read now, or graph-surgeon renames it in the model
                tensor.name = wanted
                tensors.add(wanted)
