"""Raw heads: the tensors at which the float tail of a detector begins.

Behind its last layers a detector decodes: sigmoids, grids, strides, a Concat of boxes and scores.
What comes out is in units that say little about the layers (pixels of thousands of places that hold
nothing), so errors are measured where decoding begins.

1. The tail are the nodes that read what a weighted layer or averaging pool made, and from which no
   other is computed. The walk starts at the tensors that enter the tail.
2. It goes on through nodes that only move or join values, through activation functions, through
   Sigmoid and Softmax, which make scores, and through products of scores (objectness and class).
3. It stops at a tensor that any other node reads, or the caller. Those tensors are the heads.
4. Fewer than two heads are no detector: its outputs are compared, as those of a classifier.

What went through a Sigmoid but is read by arithmetic (offsets in a cell, the bins of a box's side)
is part of a box.

The same heads are found in a graph with Q/DQ pairs: the pairs are looked through.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from reptrt.graph.flow import Flow
from reptrt.graph.net import QUANTIZED_OPS, Net, constant_value, weighted_nodes
from reptrt.graph.queries import ACTIVATIONS, moves, value_inputs, value_past_casts
from reptrt.graph.splits import read_splits

_TO_SCORES = ("Sigmoid", "HardSigmoid", "Softmax")
_OF_SCORES = ("Mul", "Sqrt")  # of scores alone: scores
_SHAPES = ("Shape", "Size")
_PAIR = ("QuantizeLinear", "DequantizeLinear")
_ARITHMETIC = (
    *("Add", "Sub", "Div", "Pow", "Exp", "Neg", "MatMul", "Gemm", "Conv", "Einsum"),
    *("ReduceSum", "ReduceMean"),
)
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


@dataclass(frozen=True, slots=True)
class Heads:
    """The raw heads of a net."""

    names: tuple[str, ...] = ()  # of the tensors at which decoding begins
    # each head and each tensor on the way to it -> whether it holds scores, between 0 and 1
    scores: Mapping[str, bool] = field(default_factory=dict)


def heads_of(net: Net) -> Heads:
    """Return the raw heads of a float net; none if it does not decode, or has Q/DQ pairs.

    Args:
        net: not changed.
    """
    if any(node.op in QUANTIZED_OPS for node in net.graph.nodes):
        return Heads()
    return _heads(net.copy().graph.toposort(), net)


def decoding_of(net: Net) -> frozenset[str]:
    """Return the names of the nodes that compute boxes: all behind the raw heads, and their grids.

    A grid, or any other operand that no layer makes, may be computed by nodes too. Nodes that make
    integers are left out.

    Args:
        net: float or with Q/DQ pairs; not changed. No node is returned if no head has scores.
    """
    graph = net.copy().graph.toposort()
    _look_through_pairs(graph)
    heads = _heads(graph, net)
    if not any(heads.scores[name] for name in heads.names):
        return frozenset()
    behind = {id(tensor) for name, tensor in graph.tensors().items() if name in heads.names}
    ends = set(behind)
    decoding = []
    for node in graph.nodes:
        if any(id(tensor) in behind for tensor in node.inputs):
            decoding.append(node)
            behind |= {id(tensor) for tensor in node.outputs}
    pending, names = [*decoding], set[str]()
    while pending:
        node = pending.pop()
        if node.name not in names and any(map(_may_be_float, node.outputs)):
            names.add(node.name)
            read = (t for t in node.inputs if id(t) not in ends and _may_be_float(t))
            pending += [maker for tensor in read for maker in tensor.inputs]
    return frozenset(names)


def _heads(graph: gs.Graph, net: Net) -> Heads:
    """Return the heads of a graph without pairs, which is that of a net."""
    tail, starts = _tail(graph, {split.sum for split in read_splits(net)})
    ends, scores = _Walk(graph, tail, starts).result()
    return Heads(tuple(ends), scores) if tail and len(ends) > 1 else Heads()


def _look_through_pairs(graph: gs.Graph) -> None:
    """Turn Q and DQ into Identity, in place, and the DQ of constant codes into the constant."""
    for node in graph.nodes:
        if node.op not in _PAIR:
            continue
        source = node.inputs[0]
        if constant_value(source) is not None:
            for reader in list(node.outputs[0].outputs):
                reader.inputs = [source if t is node.outputs[0] else t for t in reader.inputs]
        node.op, node.attrs, node.inputs = "Identity", {}, [source]


def _tail(graph: gs.Graph, sums: Collection[str]) -> tuple[list[gs.Node], list[gs.Tensor]]:
    """Return the nodes of the tail in order, and the tensors that enter it or leave the net.

    Args:
        graph: sorted.
        sums: names of the nodes that add the parts of a split layer.
    """
    layers = {node.name for node in weighted_nodes(graph)}
    flow = Flow(graph, layers, ())
    makers = {*layers, *sums}
    last = {id(node) for node in graph.nodes if node.name in makers or flow.is_int8_pool(node)}
    feeding: set[int] = set()  # tensors that a layer is computed from
    for node in reversed(graph.nodes):
        if id(node) in last or any(id(tensor) in feeding for tensor in node.outputs):
            feeding |= {id(tensor) for _, tensor in value_inputs(node)}
    made: set[int] = set()  # tensors that are computed from a layer's output
    tail: list[gs.Node] = []
    entering: dict[int, gs.Tensor] = {}
    for node in graph.nodes:
        read = [tensor for _, tensor in value_inputs(node) if id(tensor) in made]
        if read or id(node) in last:
            made |= {id(tensor) for tensor in node.outputs}
        if read and id(node) not in last and feeding.isdisjoint(map(id, node.outputs)):
            tail.append(node)
            entering |= {id(tensor): tensor for tensor in read}
    inner = {id(tensor) for node in tail for tensor in node.outputs}
    entering |= {id(tensor): tensor for tensor in graph.outputs if id(tensor) in made}
    return tail, [tensor for key, tensor in entering.items() if key not in inner]


class _Walk:
    """The way from the start of the tail to the heads."""

    def __init__(
        self, graph: gs.Graph, tail: Sequence[gs.Node], starts: Sequence[gs.Tensor]
    ) -> None:
        self._tail, self._starts = tail, starts
        self._asked = {id(tensor) for tensor in graph.outputs}

    def result(self) -> tuple[list[str], dict[str, bool]]:
        """Return the names of the tensors at which the walk stops; of all, whether they are scores.

        A node is passed if it can be and if its operands go nowhere else, so the nodes that are
        passed are found by taking away those that are not, until none is left to take away.
        """
        passed = {id(node) for node in self._tail}
        while True:
            reached, went = self._reached(passed)
            stopped = [tensor for tensor, _ in reached if self._stops_at(tensor, went)]
            blocked = {id(reader) for tensor in stopped for reader in tensor.outputs}
            if went.isdisjoint(blocked):
                scores = {t.name: kind and not _is_in_box(t) for t, kind in reached}
                return [tensor.name for tensor in stopped], scores
            passed = went - blocked

    def _reached(self, allowed: Collection[int]) -> tuple[list[tuple[gs.Tensor, bool]], set[int]]:
        """Return the tensors that are reached, and the ids of the nodes that are passed."""
        scores = {id(tensor): False for tensor in self._starts}
        reached, passed = [(tensor, False) for tensor in self._starts], set()
        for node in self._tail:
            kind = _kind(node, scores) if id(node) in allowed else None
            if kind is not None:
                passed.add(id(node))
                scores |= {id(tensor): kind for tensor in node.outputs}
                reached += [(tensor, kind) for tensor in node.outputs]
        return reached, passed

    def _stops_at(self, tensor: gs.Tensor, passed: Collection[int]) -> bool:
        readers = [node for node in tensor.outputs if node.op not in _SHAPES]
        return id(tensor) in self._asked or any(id(node) not in passed for node in readers)


def _kind(node: gs.Node, scores: dict[int, bool]) -> bool | None:
    """Return whether a node makes scores; None if the walk cannot pass it."""
    operands = [id(tensor) for _, tensor in value_inputs(node)]
    if not operands or any(operand not in scores for operand in operands):
        return None
    kinds = {scores[operand] for operand in operands}
    if len(kinds) > 1 or (node.op == "Concat" and len(operands) < len(node.inputs)):
        return None
    (kind,) = kinds
    if node.op in _TO_SCORES:
        return True
    if node.op == "Cast":
        return kind if node.attrs["to"] in _FLOATS else None
    if node.op in _OF_SCORES:
        return kind if kind and (node.op == "Sqrt" or len(operands) > 1) else None
    is_passed = moves(node) or node.op in ("Identity", "Concat") or node.op in ACTIVATIONS
    return kind if is_passed else None


def _may_be_float(tensor: gs.Tensor) -> bool:
    return tensor.dtype is None or np.issubdtype(tensor.dtype, np.floating)


def _is_in_box(tensor: gs.Tensor) -> bool:
    """Return whether arithmetic goes on with a tensor: its values are no scores."""
    return any(
        node.op in _ARITHMETIC
        or (node.op == "Mul" and any(value_past_casts(read) is not None for read in node.inputs))
        for node in tensor.outputs
    )
