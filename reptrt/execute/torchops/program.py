"""Compile an ONNX graph: constants become tensors, and nodes become steps in execution order.

A node that no operator can run becomes a step with an obstacle. Only a run that needs such a step
fails (`reptrt.execute.torchops.plan`): the statistics of a detector do not need its NMS.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from reptrt.core.errors import RewriteError
from reptrt.execute.torchops.node import Builder, NodeView, Operator, Precision
from reptrt.graph.net import Net, first_free

_STANDARD_DOMAINS = (None, "", "ai.onnx")
_CONSTANT_FIELDS = ("value", "value_float", "value_int", "value_floats", "value_ints")

_DISCRETE_OPS = (
    *("ArgMax", "ArgMin", "NonZero", "NonMaxSuppression", "Shape", "Size", "QuantizeLinear"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN", "IsInf"),
)
_REAL_OPS = ("DequantizeLinear", "ConstantOfShape", "RandomUniform", "RandomNormal")


@dataclass(frozen=True, slots=True)
class Step:
    """One node, ready to run."""

    name: str  # unique in the graph; an unnamed node has the name of its first output
    op: str
    inputs: tuple[str, ...]  # tensor names; "" where an optional input is omitted
    outputs: tuple[str, ...]  # without the last ones that no node reads
    function: Operator
    obstacle: str | None = None  # why it cannot be run, such as "Resize with mode cubic"


@dataclass(frozen=True, slots=True)
class Program:
    """A compiled graph."""

    name: str
    inputs: Mapping[str, tuple[Any, ...]]  # name -> declared shape (int, name or None per axis)
    outputs: tuple[str, ...]
    steps: tuple[Step, ...]  # producers before consumers
    constants: Mapping[str, Tensor]  # floating ones in float32; they move with the module
    host_constants: Mapping[str, Tensor]  # these compute shapes: on the CPU, in their own type
    captured: frozenset[str]  # constants whose values are compiled into steps
    discrete: frozenset[str]  # tensors of indices, codes, truth values or shapes


def program_from_net(net: Net, operators: Mapping[str, Builder], precision: Precision) -> Program:
    """Compile a graph; ``net`` is not changed.

    Raises:
        RewriteError: a constant is of a type that torch does not have.
    """
    graph = net.copy().graph.toposort()
    constants = _constants(graph)
    nodes = [node for node in graph.nodes if node.op != "Constant"]
    host = _host_nodes(nodes, constants)
    names = _unique_names(nodes)
    compiler = _Compiler(graph, constants, operators, precision)
    steps = [compiler.step(node, names[id(node)], id(node) in host) for node in nodes]
    on_host = _host_constants(graph, nodes, constants, host)
    return Program(
        name=graph.name,
        inputs={t.name: tuple(t.shape or ()) for t in graph.inputs},
        outputs=tuple(t.name for t in graph.outputs),
        steps=tuple(steps),
        constants={
            name: value.float() if value.is_floating_point() else value
            for name, value in constants.items()
            if name not in on_host
        },
        host_constants={name: constants[name] for name in constants if name in on_host},
        captured=frozenset(compiler.captured),
        discrete=_discrete_tensors(nodes, constants),
    )


class _Compiler:
    """Builds the steps of one graph."""

    def __init__(
        self,
        graph: gs.Graph,
        constants: Mapping[str, Tensor],
        operators: Mapping[str, Builder],
        precision: Precision,
    ) -> None:
        self.graph = graph
        self.outputs = {t.name for t in graph.outputs}
        self.constants = constants
        self.operators = operators
        self.precision = precision
        self.captured: set[str] = set()

    def step(self, node: gs.Node, name: str, host: bool) -> Step:
        """Return the step of a node, with an obstacle if no operator can run it."""
        op = node.op if node.domain in _STANDARD_DOMAINS else f"{node.domain}.{node.op}"
        view = self._view(node, host)
        function, obstacle = _no_function, None
        try:
            if op in self.operators:
                function = self.operators[op](view)
                self.captured |= {node.inputs[index].name for index in view.captured}
            else:
                obstacle = op
        except RewriteError as err:
            obstacle = f"{op} with {err}"
        return Step(
            name=name,
            op=op,
            inputs=(*(t.name for t in node.inputs), *_read_by_branches(node)),
            outputs=tuple(t.name for t in node.outputs[: view.num_used]),
            function=function,
            obstacle=obstacle,
        )

    def _view(self, node: gs.Node, host: bool) -> NodeView:
        used = [bool(t.outputs) or t.name in self.outputs for t in node.outputs]
        return NodeView(
            op=node.op,
            attrs=node.attrs,
            constants=tuple(self.constants.get(t.name) for t in node.inputs),
            present=tuple(bool(t.name) for t in node.inputs),
            num_outputs=len(node.outputs),
            num_used=max((i + 1 for i, flag in enumerate(used) if flag), default=1),
            opset=self.graph.opset,
            host=host,
            precision=self.precision,
        )


def _no_function(*_: Any) -> Any:
    """Take the place of the operator in a step with an obstacle; no plan contains such a step."""
    raise RewriteError("a step with an obstacle was run")


def _read_by_branches(node: gs.Node) -> tuple[str, ...]:
    """Return the tensors of the outer graph that the subgraphs of If, Loop or Scan read."""
    graphs = [value for value in node.attrs.values() if isinstance(value, gs.Graph)]
    names: dict[str, None] = {}
    for graph in graphs:
        inner = {tensor.name for part in graph.nodes for tensor in part.outputs}
        inner |= {tensor.name for tensor in graph.inputs}
        for part in graph.nodes:
            read = (*(t.name for t in part.inputs if not isinstance(t, gs.Constant)),)
            names |= dict.fromkeys((*read, *_read_by_branches(part)))
        names |= dict.fromkeys(t.name for t in graph.outputs if not isinstance(t, gs.Constant))
        for name in inner & names.keys():
            del names[name]
    return tuple(name for name in names if name)


def _discrete_tensors(nodes: list[gs.Node], constants: Mapping[str, Tensor]) -> frozenset[str]:
    """Return the tensors that do not hold real values, judged by operators and constants."""
    discrete = {name for name, value in constants.items() if not value.is_floating_point()}
    for node in nodes:
        if node.op == "Cast":
            kind = onnx.TensorProto.DataType.Name(int(node.attrs["to"]))
            if "FLOAT" not in kind and kind != "DOUBLE":
                discrete.add(node.outputs[0].name)
        elif node.op == "TopK":
            discrete |= {tensor.name for tensor in node.outputs[1:]}
        elif node.op in _DISCRETE_OPS or (
            node.op not in _REAL_OPS and all(t.name in discrete for t in node.inputs if t.name)
        ):
            discrete |= {tensor.name for tensor in node.outputs}
    return frozenset(discrete)


def _constants(graph: gs.Graph) -> dict[str, Tensor]:
    """Return initializers and the values of Constant nodes, by tensor name."""
    constants = {
        name: _tensor_from_array(tensor.values, name)
        for name, tensor in graph.tensors().items()
        if isinstance(tensor, gs.Constant)
    }
    for node in graph.nodes:
        if node.op == "Constant":
            name = node.outputs[0].name
            field = next((field for field in _CONSTANT_FIELDS if field in node.attrs), None)
            if field is None:
                raise RewriteError(f"constant {name}: holds {list(node.attrs)}, expected numbers")
            value = node.attrs[field]
            constants[name] = _tensor_from_array(_array_from_value(value), name)
    return constants


def _array_from_value(value: Any) -> npt.NDArray[Any]:
    if isinstance(value, gs.Tensor):
        return np.asarray(value.values)
    array = np.asarray(value)
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int64)


def _tensor_from_array(array: npt.NDArray[Any], name: str) -> Tensor:
    """Return a tensor with a copy of the array; types that NumPy does not have become float32.

    Torch allocates aligned memory for the copy; the last bits of a matrix product depend on the
    alignment.
    """
    try:
        return torch.tensor(array.astype(np.float32) if array.dtype.kind == "V" else array)
    except TypeError as err:
        raise RewriteError(f"constant {name}: type {array.dtype}, expected numbers") from err


def _host_nodes(nodes: list[gs.Node], constants: Mapping[str, Tensor]) -> set[int]:
    """Return the ids of the nodes that compute shapes, from Shape, Size and int64 constants."""
    host: set[int] = set()
    for node in nodes:
        inputs = [t for t in node.inputs if t.name]
        computed = [t for t in inputs if t.name not in constants]
        if node.op in ("Shape", "Size"):
            host.add(id(node))
        elif computed:
            if all(t.inputs and id(t.inputs[0]) in host for t in computed):
                host.add(id(node))
        elif all(constants[t.name].dtype == torch.int64 for t in inputs):
            host.add(id(node))
    return host


def _host_constants(
    graph: gs.Graph, nodes: list[gs.Node], constants: Mapping[str, Tensor], host: set[int]
) -> set[str]:
    """Return the constants that stay on the CPU: those in int64, or read by host nodes only."""
    read_by_data = {t.name for t in graph.outputs}
    read_by_data |= {t.name for node in nodes if id(node) not in host for t in node.inputs}
    return {
        name
        for name, value in constants.items()
        if value.dtype == torch.int64 or name not in read_by_data
    }


def _unique_names(nodes: list[gs.Node]) -> dict[int, str]:
    """Return a unique name for the id of each node.

    It is the node's own name or else the name of its first output, with a number if it is taken.
    """
    names: dict[int, str] = {}
    taken: set[str] = set()
    for node in nodes:
        name = first_free(node.name or node.outputs[0].name, taken)
        taken.add(name)
        names[id(node)] = name
    return names
