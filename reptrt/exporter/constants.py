"""Do at export what depends on constants and on known shapes alone: the grids of a YOLO head."""

import logging

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass
from onnxscript import ir
from onnxscript.optimizer import fold_constants_ir

_MOST_VALUES = 2**24  # of a constant that is computed here

logging.getLogger("onnxscript.optimizer").setLevel(logging.ERROR)  # it warns of what it leaves


def with_constants_folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with all arithmetic on constants done, by onnxscript's optimizer.

    Heights, widths and channels that a Gather or Slice takes from a Shape are constants too where
    they are known, beside a free batch. Constants become initializers. Codes of weights stay with
    their DequantizeLinear, and random numbers stay random.
    """
    folded = _folded(model)
    while _read_sizes(folded) or _split_constants(folded):
        folded = _folded(folded)
    return folded


def _folded(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = ir.serde.deserialize_model(model)
    fold_constants_ir(
        graph,
        onnx_shape_inference=True,
        input_size_limit=_MOST_VALUES,
        output_size_limit=_MOST_VALUES,
        should_fold=lambda node: True if node.op_type == "ConstantOfShape" else None,
    )
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    RemoveUnusedNodesPass()(graph)
    folded = ir.serde.serialize_model(graph)
    del folded.opset_import[:]  # onnxscript writes the default domain out
    folded.opset_import.extend(model.opset_import)
    return folded


def _read_sizes(model: onnx.ModelProto) -> bool:
    """Make each Gather and Slice of known sizes of a Shape a Constant; return if there were any."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    values = {value.name: value.type for value in (*inferred.value_info, *inferred.input)}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    shapes = {node.output[0]: node for node in model.graph.node if node.op_type == "Shape"}
    changed = False
    for node in model.graph.node:
        if node.op_type not in ("Gather", "Slice") or node.input[0] not in shapes:
            continue
        shape = shapes[node.input[0]]
        indices = [constants[name] for name in node.input[1:] if name in constants]
        is_known = shape.input[0] in values and len(indices) == len(node.input) - 1
        if shape.attribute or not is_known:
            continue
        sizes = _taken(node.op_type, values[shape.input[0]], indices)
        if all(size > 0 for size in sizes.flat):
            value = numpy_helper.from_array(sizes)
            node.CopyFrom(helper.make_node("Constant", [], list(node.output), value=value))
            changed = True
    return changed


def _split_constants(model: onnx.ModelProto) -> bool:
    """Replace each Split of a constant by its parts; return if there was any.

    onnxscript leaves nodes with several outputs.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    asked = {value.name for value in model.graph.output}
    nodes = list(model.graph.node)
    kept = []
    for node in nodes:
        is_constant = all(not name or name in constants for name in node.input)
        if node.op_type != "Split" or not is_constant or not asked.isdisjoint(node.output):
            kept.append(node)
            continue
        whole = numpy_helper.to_array(constants[node.input[0]])
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        axis = attributes.get("axis", 0)
        if len(node.input) > 1 and node.input[1]:
            sizes = numpy_helper.to_array(constants[node.input[1]])
        else:
            largest = -(-whole.shape[axis] // len(node.output))
            sizes = np.array(attributes.get("split", [largest] * len(node.output)))
        parts = np.split(whole, np.cumsum(sizes)[:-1], axis)
        named = zip(parts, node.output, strict=True)
        made = [numpy_helper.from_array(part, name) for part, name in named if name]
        model.graph.initializer.extend(made)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return len(kept) < len(nodes)


def _taken(op: str, kind: onnx.TypeProto, indices: list[onnx.TensorProto]) -> np.ndarray:
    """Return what a Gather or Slice takes of a shape; a size that is not known is 0."""
    sizes = np.array([dim.dim_value for dim in kind.tensor_type.shape.dim], dtype=np.int64)
    first, *others = (numpy_helper.to_array(tensor) for tensor in indices)
    if op == "Gather":
        return np.asarray(sizes[first])
    end, step = others[0], others[2] if len(others) > 2 else [1]
    return sizes[int(first[0]) : int(end[0]) : int(step[0])]
