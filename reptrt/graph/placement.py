"""Where Q/DQ pairs go: TensorRT's placement rules, as a plan that calibration and qdq share.

1. A weighted layer with a constant weight (Conv, ConvTranspose, Gemm, MatMul) gets its input and
   its weight quantized; never its bias, and nothing between it and its activation function.
2. A pool that averages (AveragePool, GlobalAveragePool, ReduceMean over both spatial axes) gets its
   input quantized, so that the convolution before it can write INT8.
3. A residual Add gets Q/DQ on the skip input only: the output of the convolution that TensorRT
   fuses with the Add stays untouched. If neither input is such an output, both get Q/DQ.
4. All inputs of a Concat, and its output, share one scale.
5. The sum of a split layer adds two parts of one layer: in the float form (default) neither
   summand gets Q/DQ, which is exact; in the INT8 form both do, at the price of their rounding.
   The Mul of an identity split reads the quantized input that its convolution reads; with one
   factor for the layer its result has those codes already, under another scale.
6. Ops that only move values (MaxPool, Flatten, zero Pad...) commute with Q/DQ: the pair goes before
   them, at the tensor where the values were made.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.core.errors import ConfigError
from reptrt.graph.net import (
    QUANTIZED_OPS,
    WEIGHTED_OPS,
    Net,
    constant_value,
    is_private,
    producer,
    weighted_nodes,
)
from reptrt.graph.splits import Split, read_splits

MOVING_OPS = ("MaxPool", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Identity")
_ELEMENTWISE = ("Relu", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "HardSwish", "HardSigmoid", "Mul")


@dataclass(frozen=True, slots=True)
class Activation:
    """A tensor that gets one Q/DQ pair, and who reads the pair's result."""

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
    excluded: tuple[str, ...] = ()  # weighted layers left in float on request


def place(net: Net, exclude: Iterable[str] = ()) -> Placement:
    """Return where Q/DQ pairs go in a float graph.

    Args:
        net: a float graph; not changed.
        exclude: regular expressions; a layer whose name contains a match stays in float.

    Raises:
        ConfigError: the graph is quantized already, has nothing to quantize, or a pattern is wrong
            or matches no layer.
    """
    graph = net.graph.toposort()
    _refuse_quantized(graph)
    layers = weighted_nodes(graph)
    excluded = _excluded([node.name for node in layers], exclude)
    chosen = [node for node in layers if node.name not in excluded]
    if not chosen:
        raise ConfigError(f"graph {graph.name}: no layer to quantize ({len(layers)} weighted)")
    readers = _Readers()
    names = {node.name for node in chosen}
    splits = {split.sum: split for split in read_splits(net)}
    by_name = {node.name: node for node in chosen}
    fusable = by_name | {
        split.sum: by_name[split.main] for split in splits.values() if split.main in by_name
    }
    muls = {split.side for split in splits.values() if split.form.startswith("identity")}
    for node in graph.nodes:
        if node.name in splits:
            inputs = _quantized_summands(splits[node.name])
        elif node.name in muls:
            inputs = [0]
        else:
            inputs = _quantized_inputs(graph, node, names, fusable)
        for index in inputs:
            readers.want(node, index)
    return Placement(
        activations=readers.activations(),
        weights=tuple(Weight(node.name, output_axis(node)) for node in chosen),
        excluded=tuple(sorted(excluded)),
    )


def exactly(names: Iterable[str]) -> tuple[str, ...]:
    """Return patterns for `place` that match these layers and no others.

    Rewrites name the parts of a layer after it, so a pattern may match more after them than before.
    """
    return tuple(rf"\A{re.escape(name)}\Z" for name in names)


def moves_values(node: gs.Node) -> bool:
    """Return whether a node only moves values, or pads them with zeros, which are code 0."""
    if node.op != "Pad":
        return node.op in MOVING_OPS
    value = constant_value(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2].name else 0
    return node.attrs.get("mode", "constant") == "constant" and value is not None and value == 0


def output_axis(node: gs.Node) -> int:
    """Return the axis of the output channels in the weight of a weighted node."""
    if node.op == "Conv" or (node.op == "Gemm" and node.attrs.get("transB", 0)):
        return 0
    return 1


class _Readers:
    """Collects who wants which tensor quantized, at the tensor where its values were made."""

    def __init__(self) -> None:
        self._readers: dict[str, list[tuple[str, int]]] = {}
        self._group: dict[str, str] = {}

    def want(self, node: gs.Node, index: int) -> None:
        origin, reader = _origin(node, index)
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
            Activation(name, tuple(found), roots.index(self._find(name)))
            for name, found in self._readers.items()
        )


def _origin(node: gs.Node, index: int) -> tuple[gs.Tensor, tuple[str, int]]:
    """Return where the values of an input were made, and who reads that tensor on the way."""
    tensor = node.inputs[index]
    while (maker := producer(tensor)) is not None and moves_values(maker):
        node, index, tensor = maker, 0, maker.inputs[0]
    return tensor, (node.name, index)


def _quantized_summands(split: Split) -> list[int]:
    """Rule 5; summand 1 of an identity split is the Mul."""
    if split.precision == "float":
        return []
    return [0] if split.form == "identity-scalar" else [0, 1]


def _quantized_inputs(
    graph: gs.Graph, node: gs.Node, chosen: set[str], fusable: Mapping[str, gs.Node]
) -> list[int]:
    """Return the inputs of a node that get Q/DQ."""
    if node.name in chosen:
        return [0]
    if node.op in ("AveragePool", "GlobalAveragePool") or _is_spatial_mean(node):
        return [0] if _follows_layer(node.inputs[0], chosen) else []
    if node.op == "Add" and all(constant_value(tensor) is None for tensor in node.inputs):
        return _skip_inputs(graph, node, chosen, fusable)
    if node.op == "Concat" and any(_feeds_layer(t, chosen) for t in node.outputs):
        return list(range(len(node.inputs)))
    return []


def _skip_inputs(
    graph: gs.Graph, node: gs.Node, chosen: set[str], fusable: Mapping[str, gs.Node]
) -> list[int]:
    """Rule 3: every input but the one whose convolution TensorRT fuses with the Add.

    ``fusable`` names those makers, each with the layer that holds its weight: of a split layer the
    sum, since one pass adds the summands and the skip.
    """
    if not _feeds_layer(node.outputs[0], chosen):
        return []
    found = []
    for index, tensor in enumerate(node.inputs):
        maker = producer(tensor)
        if maker is not None and maker.name in fusable and is_private(graph, tensor):
            weight = constant_value(fusable[maker.name].inputs[1])
            found.append((np.asarray(weight).size, -index))
    main = -max(found)[1] if found else None  # of two convolutions, the larger
    return [index for index in range(len(node.inputs)) if index != main]


def _feeds_layer(tensor: gs.Tensor, chosen: set[str]) -> bool:
    """Whether a tensor reaches a quantized layer or pool, passing elementwise and moving ops.

    What only says a shape (the second input of a Reshape) reaches nothing.
    """
    return any(
        node.name in chosen
        or node.op in ("Concat", "Add", "AveragePool", "GlobalAveragePool")
        or _is_spatial_mean(node)
        or (
            (node.op in _ELEMENTWISE or (node.op in MOVING_OPS and node.inputs[0] is tensor))
            and any(_feeds_layer(output, chosen) for output in node.outputs)
        )
        for node in tensor.outputs
    )


def _follows_layer(tensor: gs.Tensor, chosen: set[str]) -> bool:
    """Whether a tensor comes from a quantized layer, passing elementwise and moving ops."""
    node = producer(tensor)
    if node is None:
        return False
    if node.name in chosen or node.op in ("Concat", "Add"):
        return True
    return node.op in (*_ELEMENTWISE, *MOVING_OPS) and _follows_layer(node.inputs[0], chosen)


def _is_spatial_mean(node: gs.Node) -> bool:
    if node.op != "ReduceMean":
        return False
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1:
        axes = constant_value(node.inputs[1])
    return axes is not None and sorted(int(axis) for axis in axes) in ([2, 3], [-2, -1])


def _refuse_quantized(graph: gs.Graph) -> None:
    found = [node for node in graph.nodes if node.op in QUANTIZED_OPS]
    if found:
        raise ConfigError(
            f"{found[0].name}: the graph is quantized already ({found[0].op}, {len(found)} such "
            "nodes); expected a float ONNX file"
        )


def _excluded(names: list[str], patterns: Iterable[str]) -> set[str]:
    excluded: set[str] = set()
    for pattern in patterns:
        try:
            found = {name for name in names if re.search(pattern, name)}
        except re.error as err:
            raise ConfigError(f"--exclude {pattern}: not a regular expression ({err})") from err
        if not found:
            raise ConfigError(
                f"--exclude {pattern}: matches none of {len(names)} layers ({', '.join(names[:5])}"
                f"{', ...' if len(names) > 5 else ''})"
            )
        excluded |= found
    return excluded


__all__ = [
    "MOVING_OPS",
    "WEIGHTED_OPS",
    "Activation",
    "Placement",
    "Weight",
    "moves_values",
    "output_axis",
    "place",
]
