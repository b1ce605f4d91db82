"""A Q/DQ graph as TensorRT sees it: which layers get INT8, and what is float between them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from reptrt.graph.layers import output_axis
from reptrt.graph.net import WEIGHTED_OPS, Net, producer
from reptrt.graph.queries import (
    POOLS,
    SUMS,
    codes_type,
    dequantize_before,
    fuses,
    given,
    is_dequantize,
    is_integer_op,
    is_quantize,
    joins_one_tensor,
    producer_past_casts,
    quantize_before,
    value_inputs,
    value_past_casts,
)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A convolution or a matrix product."""

    node: gs.Node
    activation: gs.Node | None  # the DequantizeLinear of its input, None if that is float
    weight: gs.Node | None  # the DequantizeLinear of its weight, None if that is float
    has_constant_weight: bool
    weight_shape: tuple[int, ...] | None  # where the layer reads it, None if unknown

    @property
    def is_int8(self) -> bool:
        """Whether input and weight are quantized."""
        return self.activation is not None and self.weight is not None

    @property
    def rank(self) -> int | None:
        """Number of dimensions of the weight, None if unknown."""
        return None if self.weight_shape is None else len(self.weight_shape)

    @property
    def output_axis(self) -> int:
        """Axis of the output channels in the weight."""
        return output_axis(self.node, self.rank or 2)

    @property
    def channels(self) -> tuple[int, int] | None:
        """Number of input and output channels (K and N of a matrix product), None if unknown."""
        shape = self.weight_shape
        if shape is None or len(shape) < 2:
            return None
        groups = int(self.node.attrs.get("group", 1))
        if self.node.op == "Conv":
            return shape[1] * groups, shape[0]
        if self.node.op == "ConvTranspose":
            return shape[0], shape[1] * groups
        axis = self.output_axis
        return shape[axis - 1 if axis else 1], shape[axis]


@dataclass(frozen=True, slots=True, eq=False)
class Parameters:
    """Scale and zero point of a Q or DQ."""

    node: gs.Node
    scale: npt.NDArray[np.generic] | None  # None: not a known constant
    zero_point: npt.NDArray[np.generic] | None  # None: left out, or not a known constant
    axis: int


class View:
    """Facts about one graph that several rules ask for; the graph is not changed."""

    def __init__(self, net: Net) -> None:
        self.metadata = net.metadata
        self.graph: gs.Graph = net.copy().graph.toposort()
        self.nodes: list[gs.Node] = list(self.graph.nodes)
        self._order = {id(node): place for place, node in enumerate(self.nodes)}
        self._constants = _constant_tensors(self.nodes)
        self.quantizes = [node for node in self.nodes if is_quantize(node)]
        self.dequantizes = [node for node in self.nodes if is_dequantize(node)]
        self.layers = [
            self._layer(node)
            for node in self.nodes
            if node.op in WEIGHTED_OPS and len(node.inputs) > 1
        ]

    def is_constant(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor is known when the engine is built."""
        return id(tensor) in self._constants or isinstance(tensor, gs.Constant)

    @cached_property
    def int8_layers(self) -> list[Layer]:
        """The layers that run in INT8."""
        return [layer for layer in self.layers if layer.is_int8]

    @cached_property
    def weighted(self) -> list[Layer]:
        """The layers with a constant weight."""
        return [
            layer
            for layer in self.layers
            if layer.has_constant_weight and (layer.node.op != "MatMul" or layer.rank in (None, 2))
        ]

    @cached_property
    def activation_quantizes(self) -> list[gs.Node]:
        """The QuantizeLinear nodes of activations, not of weights."""
        weights = {id(quantize_before(layer.weight)) for layer in self.layers if _is_fixed(layer)}
        return [
            node
            for node in self.quantizes
            if not self.is_constant(node.inputs[0]) and id(node) not in weights
        ]

    @cached_property
    def parameters(self) -> list[Parameters]:
        """Scales and zero points; those of a DQ only where its Q has others or there is no Q."""
        parameters = []
        for node in self.nodes:
            if not (is_quantize(node) or is_dequantize(node)):
                continue
            source = quantize_before(node)
            if source is not None and _same_parameters(node, source):
                continue
            parameters.append(parameters_of(node))
        return parameters

    @cached_property
    def between(self) -> set[int]:
        """Ids of the float nodes on a way from something INT8 to a QuantizeLinear."""
        return self._after & self._before(through_islands=True)

    @cached_property
    def right_between(self) -> set[int]:
        """Ids of those from which only nodes that fuse lie on the way to the QuantizeLinear."""
        return self._after & self._before(through_islands=False)

    @cached_property
    def leading_to_int8(self) -> set[int]:
        """Ids of all nodes from which a QuantizeLinear of an activation is reached."""
        leading: set[int] = set()
        quantizes = {id(node) for node in self.activation_quantizes}
        for node in reversed(self.nodes):
            reading = (reader for tensor in node.outputs for reader in tensor.outputs)
            if id(node) in quantizes or any(id(reader) in leading for reader in reading):
                leading.add(id(node))
        return leading

    def data_inputs(self, node: gs.Node) -> list[gs.Tensor]:
        """Return the inputs through which activations come, not shapes, bounds or constants."""
        return [tensor for _, tensor in value_inputs(node) if not self.is_constant(tensor)]

    def is_residual(self, node: gs.Node) -> bool:
        """Whether a node adds different activations, outside of an activation function."""
        return node.op in SUMS and not joins_one_tensor(node, self._order)

    @cached_property
    def before_int8(self) -> set[int]:
        """Ids of the tensors whose value reaches something that computes on codes.

        That is a layer or a pool with a quantized input, or an integer operator. A value passes
        through pointwise nodes, nodes that move values, Concat and further Q/DQ pairs.
        """
        reaching: set[int] = set()
        layers = {id(layer.node) for layer in self.layers if layer.activation or layer.weight}
        for node in reversed(self.nodes):
            passes = fuses(node) or is_quantize(node) or is_dequantize(node)
            if id(node) in layers or is_integer_op(node):
                reaching |= {id(tensor) for tensor in node.inputs}
            elif self.is_boundary(node) and node.op in POOLS:
                reaching.add(id(node.inputs[0]))
            elif passes and any(id(tensor) in reaching for tensor in node.outputs):
                reaching |= {id(tensor) for tensor in self.data_inputs(node)}
        return reaching

    def is_boundary(self, node: gs.Node) -> bool:
        """Whether a node is part of the INT8 world: Q, DQ, an INT8 layer or an INT8 pool."""
        return id(node) in self._boundary

    @cached_property
    def _boundary(self) -> set[int]:
        pools = (
            node
            for node in self.nodes
            if node.op in POOLS and dequantize_before(node.inputs[0]) is not None
        )
        layers = (layer.node for layer in self.int8_layers)
        return {id(n) for n in (*self.quantizes, *self.dequantizes, *pools, *layers)}

    @cached_property
    def _after(self) -> set[int]:
        after: set[int] = set()
        for node in self.nodes:
            sources = [producer(tensor) for tensor in self.data_inputs(node)]
            reached = any(
                source is not None and (id(source) in after or self.is_boundary(source))
                for source in sources
            )
            if reached and not self.is_boundary(node):
                after.add(id(node))
        return after

    def _before(self, *, through_islands: bool) -> set[int]:
        before: set[int] = set()
        for node in reversed(self.nodes):
            reached = any(
                is_quantize(reader) or (id(reader) in before and (through_islands or fuses(reader)))
                for reader in self.data_readers(node)
            )
            if reached and not self.is_boundary(node):
                before.add(id(node))
        return before

    def data_readers(self, node: gs.Node) -> Iterator[gs.Node]:
        """Yield the nodes that read what a node makes as an activation."""
        for tensor in node.outputs:
            for reader in tensor.outputs:
                if any(read is tensor for read in self.data_inputs(reader)):
                    yield reader

    def _layer(self, node: gs.Node) -> Layer:
        weight = node.inputs[1]
        direct = producer_past_casts(weight)
        values = value_past_casts(codes_source(direct) if is_dequantize(direct) else weight)
        return Layer(
            node=node,
            activation=dequantize_before(node.inputs[0]),
            weight=dequantize_before(weight),
            has_constant_weight=self.is_constant(weight),
            weight_shape=_static_shape(weight) if values is None else tuple(values.shape),
        )


def parameters_of(node: gs.Node) -> Parameters:
    """Return scale and zero point of a Q or DQ."""
    zero_point = given(node, 2)
    return Parameters(
        node=node,
        scale=value_past_casts(node.inputs[1]),
        zero_point=None if zero_point is None else value_past_casts(zero_point),
        axis=int(node.attrs.get("axis", 1)),
    )


def _is_fixed(layer: Layer) -> bool:
    """Whether the second input of a layer is a weight, not an activation like any other."""
    return layer.weight is not None and (layer.node.op != "MatMul" or layer.has_constant_weight)


def _constant_tensors(nodes: list[gs.Node]) -> set[int]:
    """Return the ids of the tensors that nodes make from constants alone; nodes in order."""
    constant: set[int] = set()
    for node in nodes:
        inputs = [tensor for tensor in node.inputs if not tensor.is_empty()]
        is_constant = all(isinstance(t, gs.Constant) or id(t) in constant for t in inputs)
        if is_constant and (inputs or node.op == "Constant"):
            constant |= {id(tensor) for tensor in node.outputs}
    return constant


def codes_source(dequantize: gs.Node) -> gs.Tensor:
    """Return what a DQ's values come from: the input of its Q, or its codes if there is no Q."""
    source = quantize_before(dequantize)
    return (dequantize if source is None else source).inputs[0]


def _same_parameters(node: gs.Node, source: gs.Node) -> bool:
    mine, its = parameters_of(node), parameters_of(source)
    pairs = ((mine.scale, its.scale), (mine.zero_point, its.zero_point))
    equal = all(
        (a is None and b is None) or (a is not None and b is not None and _equal(a, b))
        for a, b in pairs
    )
    return equal and mine.axis == its.axis and codes_type(node) == codes_type(source)


def _equal(first: npt.NDArray[np.generic], second: npt.NDArray[np.generic]) -> bool:
    one, other = first.astype(np.float64), second.astype(np.float64)
    return np.array_equal(one, other, equal_nan=True)


def _static_shape(tensor: gs.Tensor) -> tuple[int, ...] | None:
    shape = tensor.shape
    if shape is None or not all(isinstance(size, int) for size in shape):
        return None
    return tuple(shape)
