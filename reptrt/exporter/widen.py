"""Float16 and bfloat16 in a graph as float32.

Every such value is a float32 value too, so weights keep theirs; arithmetic is rounded less. A Cast
between the types has nothing left to do and is removed.
"""

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

_HALF = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "stash_type")  # hold a data type


def widen(model: onnx.ModelProto) -> str | None:
    """Widen a model in place; return the name of the half type that it had, None if it had none."""
    kinds = _half_types(model.graph)
    if not kinds:
        return None
    _widen(model.graph)
    inferred = onnx.shape_inference.infer_shapes(model)
    _remove_casts(inferred)
    model.CopyFrom(inferred)
    return " and ".join(sorted(kinds))


def _half_types(graph: onnx.GraphProto) -> set[str]:
    kinds = {tensor.data_type for tensor in graph.initializer}
    kinds |= {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    names = set()
    for node in graph.node:
        for attribute in node.attribute:
            kinds.add(attribute.t.data_type)
            if attribute.name in _TYPE_ATTRIBUTES:
                kinds.add(attribute.i)
            for inner in _subgraphs(attribute):
                names |= _half_types(inner)
    return names | {_HALF[kind] for kind in kinds if kind in _HALF}


def _widen(graph: onnx.GraphProto) -> None:
    """Replace every half type in a graph and its sub-graphs by float32."""
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in _HALF:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del graph.value_info[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in _TYPE_ATTRIBUTES and attribute.i in _HALF:
                attribute.i = TensorProto.FLOAT
            if attribute.type == onnx.AttributeProto.TENSOR:
                _widen_tensor(attribute.t)
            for inner in _subgraphs(attribute):
                _widen(inner)


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in _HALF:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _subgraphs(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    one = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else []
    return [*one, *attribute.graphs]


def _remove_casts(model: onnx.ModelProto) -> None:
    """Remove each Cast from float32 to float32; one that makes an output becomes an Identity."""
    graph = model.graph
    values = (*graph.input, *graph.value_info, *graph.output)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    sources: dict[str, str] = {}  # result of a removed Cast -> its input
    kept = []
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = sources.get(name, name)
        to = next((a.i for a in node.attribute if a.name == "to"), None)
        is_idle = node.op_type == "Cast" and to == TensorProto.FLOAT == kinds.get(node.input[0])
        if is_idle and not (node.output[0] in outputs or _inside(graph, node.output[0])):
            sources[node.output[0]] = node.input[0]
            continue
        if is_idle:
            node.CopyFrom(onnx.helper.make_node("Identity", node.input, node.output, node.name))
        kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _inside(graph: onnx.GraphProto, name: str) -> bool:
    """Return whether a sub-graph of a node reads a tensor of the graph."""
    inner = (part for node in graph.node for a in node.attribute for part in _subgraphs(a))
    return any(name in node.input or _inside(part, name) for part in inner for node in part.node)
