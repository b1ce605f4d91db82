"""Do at export what depends on constants and on known shapes alone: the grids of a YOLO head."""

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
from onnx import helper, numpy_helper

from reptrt.graph.net import first_free

_MOST_VALUES = 2**24  # of a constant that is computed here
_KEPT = ("DequantizeLinear", "RandomNormal", "RandomUniform", "RandomNormalLike")  # left as it is


def has_constant_arithmetic(model: onnx.ModelProto) -> bool:
    """Return whether a model computes something that `with_constants_folded` may compute now."""
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants.update(node.output)
        if node.op_type == "Shape":
            return True
        if node.input and node.op_type not in _KEPT and constants.issuperset(node.input):
            return True
    return False


def with_constants_folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with all arithmetic on constants done, by onnxscript's optimizer.

    Heights, widths and channels that a Gather or Slice takes from a Shape are constants too where
    they are known, beside a free batch; so is the target of a Reshape of which only the batch is
    open. Constants become initializers. Codes of weights stay with their DequantizeLinear, and
    random numbers stay random. Shapes of outputs are those that follow from the input's.
    """
    folded = with_shapes(_folded(model))
    while _read_sizes(folded) + _write_targets(folded) + _split_constants(folded):
        folded = with_shapes(_folded(folded))
    return folded


def _folded(model: onnx.ModelProto) -> onnx.ModelProto:
    # A fifth of what calibrate imports, for the few files that have something to fold.
    from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass
    from onnxscript import ir
    from onnxscript.optimizer import fold_constants_ir

    logging.getLogger("onnxscript.optimizer").setLevel(logging.ERROR)  # it warns of what it leaves
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


def _read_sizes(model: onnx.ModelProto) -> int:
    """Make each Gather and Slice of known sizes of a Shape a Constant; return how many."""
    values = {value.name: value.type for value in (*model.graph.value_info, *model.graph.input)}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    shapes = {node.output[0]: node for node in model.graph.node if node.op_type == "Shape"}
    changed = 0
    for node in model.graph.node:
        if node.op_type not in ("Gather", "Slice") or node.input[0] not in shapes:
            continue
        shape = shapes[node.input[0]]
        indices = [constants[name] for name in node.input[1:] if name in constants]
        kind = values.get(shape.input[0])
        is_known = kind is not None and kind.tensor_type.HasField("shape")
        is_known &= len(indices) == len(node.input) - 1
        if shape.attribute or kind is None or not is_known:
            continue
        sizes = _taken(node.op_type, kind, indices)
        if all(size > 0 for size in sizes.flat):
            value = numpy_helper.from_array(sizes)
            node.CopyFrom(helper.make_node("Constant", [], list(node.output), value=value))
            changed += 1
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


def _write_targets(model: onnx.ModelProto) -> int:
    """Make computed targets of Reshapes constants: 0 for a size that stays, -1 for another one.

    Returns:
        How many were made; a target with two sizes that are neither known nor kept is left.
    """
    graph = model.graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in graph.value_info}
    shapes |= {value.name: value.type.tensor_type.shape.dim for value in graph.input}
    shapes |= {value.name: value.type.tensor_type.shape.dim for value in graph.output}
    taken = {tensor.name for tensor in graph.initializer}
    constants, changed = frozenset(taken), 0
    for node in graph.node:
        if node.op_type != "Reshape" or node.input[1] in constants:
            continue
        if any(entry.name == "allowzero" and entry.i for entry in node.attribute):
            continue
        before, after = (shapes.get(name) for name in (node.input[0], node.output[0]))
        sizes = [_kept_size(before or (), index, dim) for index, dim in enumerate(after or ())]
        if not sizes or sizes.count(-1) > 1:
            continue
        name = first_free(f"{node.output[0]}.target", taken)
        taken.add(name)
        graph.initializer.append(numpy_helper.from_array(np.array(sizes, np.int64), name))
        node.input[1] = name
        changed += 1
    return changed


def _kept_size(before: Sequence[Any], axis: int, dim: Any) -> int:
    """Return what a Reshape's target says of an axis: its size, 0 if it stays, -1 if unknown."""
    if dim.dim_value:
        return int(dim.dim_value)
    stays = axis < len(before) and dim.dim_param and before[axis].dim_param == dim.dim_param
    return 0 if stays else -1


def with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with shapes as they follow from the input's, whatever names it had for them.

    A shape that does not follow, of an operator that onnx does not know, stays as it was.
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    first = bare.graph.input[0].type.tensor_type.shape.dim[:1]
    for dim in first:
        if not dim.dim_value and not dim.dim_param:
            dim.dim_param = "N"
    del bare.graph.value_info[:]
    for value in bare.graph.output:
        value.type.tensor_type.ClearField("shape")
    found = {value.name: value for value in _inferred(bare)}
    old = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    for value in bare.graph.output:
        value.CopyFrom(found.pop(value.name, value))
    present = {name for node in bare.graph.node for name in node.output}
    values = {**old, **found}
    outputs = {value.name for value in bare.graph.output}
    bare.graph.value_info.extend(
        value for name, value in values.items() if name in present and name not in outputs
    )
    for value in (*bare.graph.value_info, *bare.graph.output):
        if value.name in old:
            _fill_sizes(value.type.tensor_type, old[value.name].type.tensor_type)
    return bare


def _inferred(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Return the values of a graph with the shapes that follow from its input's.

    onnx computes shapes from shapes less well before opset 17.
    """
    newer = model
    if max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")) < 17:
        with contextlib.suppress(Exception):  # RuntimeError, and C++ types of the converter
            newer = onnx.version_converter.convert_version(model, 17)
    graph = onnx.shape_inference.infer_shapes(newer, data_prop=True).graph
    return [*graph.value_info, *graph.output]


def _fill_sizes(kind: onnx.TypeProto.Tensor, before: onnx.TypeProto.Tensor) -> None:
    """Take over from an earlier shape what a shape leaves open."""
    if not kind.HasField("shape"):
        if before.HasField("shape"):
            kind.shape.CopyFrom(before.shape)
        return
    if len(kind.shape.dim) != len(before.shape.dim):
        return
    for dim, other in zip(kind.shape.dim, before.shape.dim, strict=True):
        if not dim.dim_value and (other.dim_value or not dim.dim_param):
            dim.CopyFrom(other)


def _taken(op: str, kind: onnx.TypeProto, indices: list[onnx.TensorProto]) -> np.ndarray:
    """Return what a Gather or Slice takes of a shape; a size that is not known is 0."""
    sizes = np.array([dim.dim_value for dim in kind.tensor_type.shape.dim], dtype=np.int64)
    first, *others = (numpy_helper.to_array(tensor) for tensor in indices)
    if op == "Gather":
        return np.asarray(sizes[first])
    end, step = others[0], others[2] if len(others) > 2 else [1]
    return sizes[int(first[0]) : int(end[0]) : int(step[0])]
