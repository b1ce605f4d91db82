"""Where Q/DQ pairs go: TensorRT's placement rules, as a plan that calibration and qdq share.

0. A tensor gets a pair only if its value reaches a layer or pool that runs in INT8, possibly
   through Concat, residual sums, pointwise nodes and nodes that move values
   (`reptrt.graph.flow`). The nodes with which a detector decodes boxes and scores behind the last
   layer stay in float.
1. A weighted layer with a constant weight (Conv, ConvTranspose, Gemm, MatMul) gets its input and
   its weight quantized; never its bias, and nothing between it and its activation function.
2. A pool that averages (AveragePool, GlobalAveragePool, ReduceMean over both spatial axes) gets its
   input quantized, so that the convolution before it can write INT8.
3. A residual Add gets Q/DQ on the skip input only: the output of the convolution that TensorRT
   fuses with the Add stays untouched. If neither input is such an output, both get Q/DQ. A sum
   inside an activation function (GELU by tanh) is no residual Add. In a net for onnxruntime, which
   fuses no sum, all inputs get Q/DQ.
4. All inputs of a Concat, and its output, share one scale.
5. The sum of a split layer adds two parts of one layer: in the float form (default) neither
   summand gets Q/DQ, which is exact; in the INT8 form both do, at the price of their rounding.
   The Mul of an identity split reads the quantized input that its convolution reads; with one
   factor for the layer its result has those codes already, under another scale.
6. A tensor that is 0 on all images (`dead`) has no scale and gets no pair; a layer that reads it
   stays in float. In a Concat, whose inputs share one scale, it gets the pair of the others.
7. Nodes that only move values (MaxPool, Flatten, Split, Pad with zeros...) commute with Q/DQ: the
   pair goes before them, at the tensor where the values were made, unless some output of such a
   node is used in float only.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.core.errors import ConfigError, option
from reptrt.graph.flow import Flow, tail_of
from reptrt.graph.layers import output_axis
from reptrt.graph.made_for import KEY
from reptrt.graph.net import QUANTIZED_OPS, Net, constant_value, weighted_nodes
from reptrt.graph.queries import SUMS, before_epilogue, is_private_past_casts, value_inputs
from reptrt.graph.splits import Split, read_splits


@dataclass(frozen=True, slots=True)
class Activation:
    """A tensor that gets one Q/DQ pair, and the nodes that read the pair's result."""

    tensor: str
    readers: tuple[tuple[str, int], ...]  # (node name, input index)
    group: int  # tensors of one group share one scale


@dataclass(frozen=True, slots=True)
class Weight:
    """A constant weight that becomes INT8 codes and a DequantizeLinear."""

    node: str
    axis: int  # of the output channels


@dataclass(frozen=True, slots=True)
class Placement:
    """The whole plan for one graph."""

    activations: tuple[Activation, ...]
    weights: tuple[Weight, ...]
    excluded: tuple[str, ...] = ()  # weighted layers that stay in float
    float_nodes: tuple[str, ...] = ()  # nodes that read nothing quantized, on request


def place(
    net: Net,
    exclude: Iterable[str] = (),
    float_nodes: Iterable[str] = (),
    dead: Collection[str] = (),
) -> Placement:
    """Return where Q/DQ pairs go in a float graph.

    Args:
        net: a float graph; not changed.
        exclude: regular expressions; a weighted layer whose name contains a match stays in float.
        float_nodes: regular expressions; a node of any kind whose name contains a match stays in
            float, and so does every node that is reached only through such nodes.
        dead: tensors that get no pair because they are 0 on all images.

    Raises:
        ConfigError: the graph is quantized already, has nothing to quantize, or a pattern is wrong
            or matches nothing.
    """
    graph = net.graph.toposort()
    _refuse_quantized(graph)
    layers = weighted_nodes(graph)
    excluded = _matches("exclude", exclude, [node.name for node in layers], "layers")
    named = _matches("float_nodes", float_nodes, [node.name for node in graph.nodes], "nodes")
    tail = tail_of(graph, named)
    excluded |= {node.name for node in layers if node.name in tail}
    chosen = [node for node in layers if node.name not in excluded]
    rules = _Rules(net, chosen, tail)
    while idle := [node for node in chosen if rules.flow.origin(node, 0)[0].name in dead]:
        excluded |= {node.name for node in idle}
        chosen = [node for node in chosen if node.name not in excluded]
        rules = _Rules(net, chosen, tail)
    if not chosen:
        raise ConfigError(f"graph {graph.name}: no layer to quantize ({len(layers)} weighted)")
    readers = _Readers(rules.flow, dead)
    for node in graph.nodes:
        for index in rules.quantized_inputs(node):
            readers.want(node, index)
    return Placement(
        activations=readers.activations(),
        weights=tuple(Weight(node.name, output_axis(node)) for node in chosen),
        excluded=tuple(sorted(excluded)),
        float_nodes=tuple(sorted(tail)),
    )


def exactly(names: Iterable[str]) -> tuple[str, ...]:
    """Return patterns for `place` that match these nodes and no others.

    Rewrites name the parts of a layer after it, so a pattern may match more after them than before.
    """
    return tuple(rf"\A{re.escape(name)}\Z" for name in names)


class _Readers:
    """Collects, for each tensor to be quantized, the node inputs that read its quantized value."""

    def __init__(self, flow: Flow, dead: Collection[str]) -> None:
        self._flow, self._dead = flow, dead
        self._readers: dict[str, list[tuple[str, int]]] = {}
        self._group: dict[str, str] = {}

    def want(self, node: gs.Node, index: int) -> None:
        origin, reader = self._flow.origin(node, index)
        if origin.name in self._dead:
            return
        self._readers.setdefault(origin.name, [])
        if reader not in self._readers[origin.name]:
            self._readers[origin.name].append(reader)
        if node.op == "Concat":
            self._join(origin.name, node.outputs[0].name)

    def _find(self, name: str) -> str:
        while (parent := self._group.get(name, name)) != name:
            name = parent
        return name

    def _join(self, first: str, second: str) -> None:
        self._group[self._find(first)] = self._find(second)

    def activations(self) -> tuple[Activation, ...]:
        roots = list(dict.fromkeys(self._find(name) for name in self._readers))
        return tuple(
            Activation(name, tuple(readers), roots.index(self._find(name)))
            for name, readers in self._readers.items()
        )


class _Rules:
    """Which inputs of a node get Q/DQ, by the rules above.

    Args:
        net: a float net, sorted.
        chosen: the layers that run in INT8.
        float_nodes: names of the nodes that stay in float.
    """

    def __init__(self, net: Net, chosen: Sequence[gs.Node], float_nodes: frozenset[str]) -> None:
        self._graph, self._float = net.graph, float_nodes
        self._chosen = {node.name: node for node in chosen}
        self._splits = {split.sum: split for split in read_splits(net)}
        self._muls = {
            split.side for split in self._splits.values() if split.form.startswith("identity")
        }
        self._fuses_sums = net.metadata.get(KEY) != "onnxruntime"
        self.flow = Flow(net.graph, self._chosen, float_nodes)

    def quantized_inputs(self, node: gs.Node) -> list[int]:
        """Return the indices of the inputs of a node that get Q/DQ."""
        if node.name in self._float:
            return []
        if (split := self._splits.get(node.name)) is not None:
            return _quantized_summands(split) if split.main in self._chosen else []
        if node.name in self._muls or node.name in self._chosen or self.flow.is_int8_pool(node):
            return [0]
        if not self.flow.reaches_int8(node):
            return []
        if self.flow.is_residual(node):
            return self._skip_inputs(node)
        return list(range(len(node.inputs))) if node.op == "Concat" else []

    def _skip_inputs(self, node: gs.Node) -> list[int]:
        """Rule 3: every input but the one whose convolution TensorRT fuses with the Add."""
        operands = value_inputs(node)
        if not self._fuses_sums:
            return [index for index, _ in operands]
        fused = [(size, -index) for index, t in operands if (size := self._fusable(t)) is not None]
        main = -max(fused)[1] if fused else None  # of two convolutions, the larger
        return [index for index, _ in operands if index != main]

    def _fusable(self, tensor: gs.Tensor) -> int | None:
        """Return the weights of the layer that is fused with a sum of its output; None: none is.

        Of a split layer the sum counts: one pass adds the summands and the skip. So does the sum of
        a layer and another skip.
        """
        node = before_epilogue(tensor, self._graph)
        if node is None or not is_private_past_casts(self._graph, tensor):
            return None
        split = self._splits.get(node.name)
        layer = self._chosen.get(node.name if split is None else split.main)
        if layer is not None:
            return int(np.asarray(constant_value(layer.inputs[1])).size)
        if split is not None or node.op not in SUMS or node.name in self._float:
            return None
        parts = [self._fusable(operand) for _, operand in value_inputs(node)]
        return max((size for size in parts if size is not None), default=None)


def _quantized_summands(split: Split) -> list[int]:
    """Rule 5; summand 1 of an identity split is the Mul."""
    if split.precision == "float":
        return []
    return [0] if split.form == "identity-scalar" else [0, 1]


def _refuse_quantized(graph: gs.Graph) -> None:
    quantized = [node for node in graph.nodes if node.op in QUANTIZED_OPS]
    if quantized:
        raise ConfigError(
            f"{quantized[0].name}: the graph is quantized already ({quantized[0].op}, "
            f"{len(quantized)} such nodes); expected a float ONNX file"
        )


def _matches(name: str, patterns: Iterable[str], names: Sequence[str], what: str) -> set[str]:
    """Return the names that contain a match of a pattern, each pattern at least one.

    Args:
        name: the option that the patterns come from.
        patterns: regular expressions.
        names: of nodes.
        what: what the nodes are called in a message.
    """
    matches: set[str] = set()
    for pattern in patterns:
        try:
            matching = {node for node in names if re.search(pattern, node)}
        except re.error as err:
            raise ConfigError(f"{option(name, pattern)}: not a regular expression ({err})") from err
        if not matching:
            raise ConfigError(
                f"{option(name, pattern)}: matches none of {len(names)} {what} "
                f"({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
            )
        matches |= matching
    return matches
