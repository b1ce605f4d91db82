"""Read and write ONNX files as graphs, and the questions that every rewrite asks of a graph.

Names of questions about a tensor: `producer` and `constant_value` return None where there is no
answer, `producer_of` and `constant_of` raise. Those of `reptrt.graph.queries` that end with
``past_casts`` look through casts, as TensorRT does.

A `Net` is an onnx-graphsurgeon graph plus the model's ``metadata_props``, where reptrt keeps what a
graph cannot express: the preprocessing, and the branch that each part of a kernel came from.
"""

import json
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from onnx_graphsurgeon.logger import G_LOGGER

from reptrt.core.artifacts import is_engine_file
from reptrt.core.errors import ArtifactError, RewriteError

Parsed = TypeVar("Parsed")

_DAMAGE = (OSError, ValueError, TypeError, LookupError)  # raised by reading a damaged file

WEIGHTED_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
QUANTIZED_OPS = (  # a float graph has none of them
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "QLinearConv",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
)


@dataclass(slots=True)
class Net:
    """A graph and its metadata; rewrites change the graph in place."""

    graph: gs.Graph
    metadata: dict[str, str] = field(default_factory=dict)
    _taken: "_Taken | None" = field(default=None, init=False, repr=False, compare=False)

    def fresh_name(self, wanted: str) -> str:
        """Return ``wanted``, or the first of ``wanted_1``, ``wanted_2``... that is free.

        A name is free when no node or tensor of the graph has it and it was not returned before.
        Rewrites take the names of all nodes and tensors that they add from here.
        """
        return self._names().fresh_name(wanted)

    def fresh_prefix(self, wanted: str, roles: Iterable[str]) -> str:
        """Return ``wanted``, or the first of ``wanted_``, ``wanted__``... that is free.

        A prefix is free when ``prefix.role`` is a free name for every role; all of them count as
        returned afterwards.
        """
        return self._names().fresh_prefix(wanted, tuple(roles))

    def copy(self) -> "Net":
        """Return a Net whose nodes and tensors may change freely; constant values are shared."""
        copied = Net(self.graph.copy(), dict(self.metadata))
        if self._taken is not None and self._taken.graph is self.graph:
            copied._taken = _Taken(copied.graph, set(self._taken.returned))
        return copied

    def _names(self) -> "_Taken":
        if self._taken is None or self._taken.graph is not self.graph:
            self._taken = _Taken(self.graph)
        return self._taken


class _Taken:
    """The names of one graph that are not free.

    The names of nodes and tensors are read from the graph at first, and again whenever a wanted
    name is among them: the node or tensor that had it may have been removed.
    """

    def __init__(self, graph: gs.Graph, returned: set[str] | None = None) -> None:
        self.graph = graph
        self.returned: set[str] = set() if returned is None else returned
        self._names = self._read()

    def fresh_name(self, wanted: str) -> str:
        """See `Net.fresh_name`."""
        self._refresh_if_taken([wanted])
        name = first_free(wanted, self._names)
        self._take([name])
        return name

    def fresh_prefix(self, wanted: str, roles: Collection[str]) -> str:
        """See `Net.fresh_prefix`."""
        self._refresh_if_taken([f"{wanted}.{role}" for role in roles])
        while any(f"{wanted}.{role}" in self._names for role in roles):
            wanted += "_"
        self._take([f"{wanted}.{role}" for role in roles])
        return wanted

    def _refresh_if_taken(self, names: Iterable[str]) -> None:
        if not self._names.isdisjoint(names):
            self._names = self._read()

    def _take(self, names: Collection[str]) -> None:
        self.returned.update(names)
        self._names.update(names)

    def _read(self) -> set[str]:
        nodes = (node.name for node in self.graph.nodes)
        return {*self.graph.tensors(), *nodes, *self.returned}


def read_model(path: Path) -> onnx.ModelProto:
    """Read and check an ONNX file, external data included.

    Raises:
        ArtifactError: the file is missing, truncated, not ONNX, or its external data is gone.
    """
    if is_engine_file(path):
        raise ArtifactError(f"{path}: is a TensorRT engine, expected an ONNX file")
    if path.is_dir():
        raise ArtifactError(f"{path}: is a folder, expected an ONNX file")
    try:
        model = onnx.load(str(path), format="protobuf")  # whatever the suffix
        onnx.checker.check_model(model, full_check=False)
        _check_content(model)
    except FileNotFoundError as err:
        missing = Path(err.filename or path)
        which = f"{path}" if missing == path else f"{path}: {missing.name}"
        raise ArtifactError(f"{which} does not exist; check the path") from err
    except (DecodeError, onnx.checker.ValidationError, *_DAMAGE) as err:
        reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise ArtifactError(f"{path}: not a readable ONNX file ({reason})") from err
    if not model.graph.node:
        raise ArtifactError(f"{path}: the ONNX graph has no nodes; expected a network")
    return model


def _check_content(message: Message) -> None:
    """Check what onnx's checker does not: texts, constants, types and sizes.

    A negative size, which some exporters write for a dynamic one, becomes dynamic.

    Raises:
        ValueError, TypeError: a text is not UTF-8, the number of values of a constant does not
            match its shape, or a type does not exist.
    """
    if isinstance(message, onnx.TensorProto):
        onnx.numpy_helper.to_array(message)
    elif isinstance(message, onnx.TypeProto.Tensor):
        onnx.TensorProto.DataType.Name(message.elem_type)
    elif isinstance(message, onnx.TensorShapeProto.Dimension) and message.dim_value < 0:
        message.ClearField("dim_value")
    for field_of, value in message.ListFields():
        if field_of.type == FieldDescriptor.TYPE_MESSAGE:
            for part in [value] if isinstance(value, Message) else value:
                _check_content(part)
        elif field_of.type == FieldDescriptor.TYPE_STRING:
            texts = [value] if isinstance(value, str | bytes) else list(value)
            damaged = [text for text in texts if isinstance(text, bytes)]  # could not be decoded
            if damaged:
                raise ValueError(f"{field_of.name} is not UTF-8: {damaged[0][:20]!r}")


def net_from_model(model: onnx.ModelProto) -> Net:
    """Return the graph-surgeon form of an ONNX model, in which every node has a unique name.

    ONNX nodes may have no name or share one. A node without a name gets the name of its first
    output; a number is appended to a name that is taken.
    """
    with G_LOGGER.suppress(G_LOGGER.ERROR):  # its warnings go to stdout, where results belong
        graph = gs.import_onnx(model)
    taken: set[str] = set()
    for node in graph.nodes:
        node.name = first_free(node.name or next(t.name for t in node.outputs if t.name), taken)
        taken.add(node.name)
    return Net(graph, {prop.key: prop.value for prop in model.metadata_props})


def model_from_net(net: Net) -> onnx.ModelProto:
    """Return a checked ONNX model with inferred shapes and the net's metadata.

    Raises:
        RewriteError: the graph is not valid ONNX: a rewrite broke it.
    """
    net.graph.cleanup(remove_unused_graph_inputs=False).toposort()
    model = gs.export_onnx(net.graph, do_type_check=False)
    onnx.helper.set_model_props(model, dict(sorted(net.metadata.items())))
    try:
        model = onnx.shape_inference.infer_shapes(model, strict_mode=False)
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        raise RewriteError(f"graph {net.graph.name}: invalid ONNX after rewriting ({err})") from err
    return model


def used_inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """Return the inputs of a graph that a node, a sub-graph or an output reads."""
    names = _names_read(graph)
    return [value for value in graph.input if value.name in names]


def _names_read(graph: onnx.GraphProto) -> set[str]:
    names = {value.name for value in graph.output}
    for node in graph.node:
        names.update(node.input)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                names |= _names_read(inner)
    return names


def bytes_from_model(model: onnx.ModelProto) -> bytes:
    """Serialize deterministically: the same model always gives the same bytes."""
    return bytes(model.SerializeToString(deterministic=True))


def get_json(net: Net, key: str, parse: Callable[[dict[str, Any]], Parsed]) -> Parsed | None:
    """Return the JSON object that is stored under ``reptrt.<key>``, parsed; None if there is none.

    Raises:
        ArtifactError: it is not a JSON object, or ``parse`` cannot read it.
    """
    text = net.metadata.get(f"reptrt.{key}")
    if text is None:
        return None
    try:
        return parse(dict(json.loads(text)))
    except (ValueError, TypeError, KeyError, AttributeError) as err:
        raise ArtifactError(
            f"metadata reptrt.{key}: not what reptrt wrote ({type(err).__name__}: {err}); the file "
            "was damaged or changed: make it again"
        ) from err


def set_json(net: Net, key: str, value: Mapping[str, Any]) -> None:
    """Store a JSON value under ``reptrt.<key>``."""
    net.metadata[f"reptrt.{key}"] = json.dumps(value, sort_keys=True)


def constant_value(tensor: gs.Tensor) -> npt.NDArray[Any] | None:
    """Return the value of an initializer, a Constant node or an Identity of one; else None."""
    if isinstance(tensor, gs.Constant):
        return np.asarray(tensor.values)
    if len(tensor.inputs) == 1:
        producer = tensor.inputs[0]
        if producer.op == "Identity":
            return constant_value(producer.inputs[0])
        if producer.op == "Constant" and "value" in producer.attrs:
            return np.asarray(producer.attrs["value"].values)
    return None


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """Return the node that computes a tensor; None for graph inputs and constants."""
    return tensor.inputs[0] if tensor.inputs else None


def producer_of(tensor: gs.Tensor) -> gs.Node:
    """Return the node that computes a tensor.

    Raises:
        RewriteError: the tensor is a graph input or a constant.
    """
    if not tensor.inputs:
        raise RewriteError(f"tensor {tensor.name}: no node computes it, expected a computed tensor")
    return tensor.inputs[0]


def constant_of(tensor: gs.Tensor) -> npt.NDArray[Any]:
    """Return the value of a constant.

    Raises:
        RewriteError: the tensor is computed.
    """
    value = constant_value(tensor)
    if value is None:
        raise RewriteError(f"tensor {tensor.name}: it is computed, expected a constant")
    return value


def weighted_nodes(graph: gs.Graph) -> list[gs.Node]:
    """Return the nodes with a constant weight as second input, in execution order.

    A MatMul counts with a matrix only: a vector or a stack of matrices has no output channels.
    """
    return [
        node
        for node in graph.nodes
        if node.op in WEIGHTED_OPS
        and (weight := constant_value(node.inputs[1])) is not None
        and (node.op != "MatMul" or weight.ndim == 2)
    ]


def refuse_not_finite(net: Net) -> None:
    """Refuse a net whose constants hold NaN, or infinity where layers and batch norms read them.

    Elsewhere infinity has a meaning: as the bound of a Clip, or the border of a pooling window.

    Raises:
        ArtifactError: there are such constants; the first five are named.
    """
    bad: dict[str, None] = {}
    for node in net.graph.nodes:
        strict = node.op in (*WEIGHTED_OPS, "BatchNormalization")
        for tensor in node.inputs:
            value = constant_value(tensor)
            if value is None or value.dtype.kind != "f" or np.isfinite(value).all():
                continue
            if strict or np.isnan(value).any():
                bad[tensor.name] = None
    if bad:
        raise ArtifactError(
            f"graph {net.graph.name}: {len(bad)} constants hold NaN or Inf ("
            f"{', '.join(list(bad)[:5])}{', ...' if len(bad) > 5 else ''}); take weights from "
            "before training diverged"
        )


def first_free(wanted: str, taken: Container[str]) -> str:
    """Return ``wanted``, or the first of ``wanted_1``, ``wanted_2``... that is not taken."""
    name, number = wanted, 0
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    return name


def is_private(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Return whether a tensor has exactly one consumer and is no output of the graph."""
    return len(tensor.outputs) == 1 and not any(tensor is output for output in graph.outputs)
