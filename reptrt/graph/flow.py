"""What the values of a float graph come from and where they go, for a choice of INT8 layers.

A value passes through pointwise nodes, nodes that move values, Concat and residual sums. It ends at
a layer, which makes new values of it, and at everything else that is not in this list (Softmax,
normalizations, interpolation): Q/DQ pairs in front of such a node would help no layer behind it.
"""

from collections.abc import Collection

import onnx_graphsurgeon as gs

from reptrt.graph.net import constant_value, producer
from reptrt.graph.queries import (
    LOOKED_THROUGH,
    POINTWISE,
    SUMS,
    joins_one_tensor,
    moves,
    value_inputs,
    value_past_casts,
)

_RARELY_INT8 = ("Expand", "Tile", "Gather")  # not every TensorRT moves codes with these


class Flow:
    """Where values come from and go, in one sorted graph; the graph is not changed.

    Args:
        graph: a float graph, sorted.
        layers: names of the layers that run in INT8.
        float_nodes: names of nodes that neither read nor pass on quantized values.
    """

    def __init__(
        self, graph: gs.Graph, layers: Collection[str], float_nodes: Collection[str]
    ) -> None:
        self._graph, self._layers, self._float = graph, layers, float_nodes
        self._order = {id(node): place for place, node in enumerate(graph.nodes)}
        self._after: set[int] = set()  # ids of tensors behind an INT8 layer or pool
        self._before: set[int] = set()  # ids of tensors in front of one
        for node in graph.nodes:
            self._go_forward(node)
        for node in reversed(graph.nodes):
            self._go_back(node)

    def reaches_int8(self, node: gs.Node) -> bool:
        """Return whether a value that a node makes reaches a layer or pool in INT8."""
        return any(id(tensor) in self._before for tensor in node.outputs)

    def is_int8_pool(self, node: gs.Node) -> bool:
        """Return whether a node averages values that come from an INT8 layer or pool."""
        return (
            node.name not in self._float
            and (node.op in ("AveragePool", "GlobalAveragePool") or is_spatial_mean(node))
            and id(node.inputs[0]) in self._after
        )

    def is_residual(self, node: gs.Node) -> bool:
        """Return whether a node adds different tensors, outside of an activation function."""
        return node.op in SUMS and not joins_one_tensor(node, self._order)

    def origin(self, node: gs.Node, index: int) -> tuple[gs.Tensor, tuple[str, int]]:
        """Return the tensor at which an input is quantized, and its first reader on the way there.

        That is where its values were made, in front of nodes that only move them. A node of which
        some output stays in float (one half of a Split goes to the caller) is not passed: the pair
        goes behind it.
        """
        tensor = node.inputs[index]
        while (maker := producer(tensor)) is not None and self._is_passed(maker):
            node, index, tensor = maker, 0, maker.inputs[0]
        return tensor, (node.name, index)

    def _is_passed(self, node: gs.Node) -> bool:
        asked = {id(tensor) for tensor in self._graph.outputs}
        return (
            moves_values(node)
            and node.name not in self._float
            and value_past_casts(node.inputs[0]) is None
            and asked.isdisjoint(id(tensor) for tensor in node.outputs)
            and all(not t.outputs or id(t) in self._before for t in node.outputs)
        )

    def _go_forward(self, node: gs.Node) -> None:
        if node.name in self._float:
            return
        passes = _passes(node) and any(id(t) in self._after for _, t in value_inputs(node))
        if node.name in self._layers or passes or self.is_int8_pool(node):
            self._after |= {id(tensor) for tensor in node.outputs}

    def _go_back(self, node: gs.Node) -> None:
        if node.name in self._float:
            return
        if node.name in self._layers or self.is_int8_pool(node):
            self._before.add(id(node.inputs[0]))
        elif _passes(node) and self.reaches_int8(node):
            self._before |= {id(tensor) for _, tensor in value_inputs(node)}


def moves_values(node: gs.Node) -> bool:
    """Return whether a node moves values and TensorRT moves their codes instead."""
    return node.op == "Identity" or (moves(node) and node.op not in _RARELY_INT8)


def is_spatial_mean(node: gs.Node) -> bool:
    """Return whether a node is a ReduceMean over height and width."""
    if node.op != "ReduceMean":
        return False
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1:
        axes = constant_value(node.inputs[1])
    return axes is not None and sorted(int(axis) for axis in axes) in ([2, 3], [-2, -1])


def tail_of(graph: gs.Graph, names: Collection[str]) -> frozenset[str]:
    """Return the names of some nodes and of all nodes that are reached only through them.

    Args:
        graph: sorted.
        names: of nodes.
    """
    tail: set[int] = set()
    constant: set[int] = set()
    for node in graph.nodes:
        read = [t for t in node.inputs if not t.is_empty() and constant_value(t) is None]
        read = [tensor for tensor in read if id(tensor) not in constant]
        if not read:
            constant |= {id(tensor) for tensor in node.outputs}
        if node.name in names or (read and all(id(tensor) in tail for tensor in read)):
            tail |= {id(tensor) for tensor in node.outputs}
    made = (node for node in graph.nodes if any(id(tensor) in tail for tensor in node.outputs))
    return frozenset(node.name for node in made)


def _passes(node: gs.Node) -> bool:
    return node.op in (*POINTWISE, *LOOKED_THROUGH, "Concat") or moves(node)
