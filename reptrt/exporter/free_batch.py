"""A batch size that a file has fixed, made free.

Tools that simplify a graph for one batch size B write B where a Reshape or Resize had "as many
images as there are". Each such constant is replaced by a form for any batch: a Reshape target's B
by 0 ("as in the input", allowzero = 0), or by -1 where the batch is part of an axis; the sizes of a
Resize by scales. The result counts only if onnxruntime computes the same
from two batches at once as the original does from one after the other; otherwise the file's own
batch is used.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from reptrt.core.errors import ReptrtError
from reptrt.execute.runner import OrtRunner
from reptrt.graph.net import first_free

_INDEX = {"Reshape": 1, "Resize": 3}  # the input that can hold the batch: target, sizes
_FREE_INDEX = {"Reshape": 1, "Resize": 2}  # and the one that takes its place: target, scales
_TOLERANCE = 1e-5  # of the largest value; other batch sizes may sum in another order
_LOG = logging.getLogger(__name__)

Outputs = dict[str, npt.NDArray[np.floating]]


def fixed_batch(model: onnx.ModelProto) -> int | None:
    """Return the batch size that a model has fixed; None if it is free."""
    dims = model.graph.input[0].type.tensor_type.shape.dim
    return (dims[0].dim_value or None) if dims else None


def with_free_batch(model: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """Return a model with a free batch size if it is proved equal, else the model itself.

    A model in which the batch size is only declared, and no constant holds it, stays as it is.

    Args:
        model: a float model with one input.
        where: what messages call it.
    """
    batch = fixed_batch(model)
    sizes = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    if batch is None or not all(sizes):
        return model
    freed, changed, stuck = _freed(model, batch)
    if not changed and not stuck:
        return model
    reason = f"{', '.join(stuck)} hold it" if stuck else _difference(model, freed, sizes)
    if reason is not None:
        _LOG.warning(
            "%s: its batch size %d is fixed and cannot be made free, so it is run with it (%s)",
            *(where, batch, reason),
        )
        return model
    _LOG.warning(
        "%s: batch size %d is made free in %s; outputs are the same",
        *(where, batch, ", ".join(changed)),
    )
    return freed


def _freed(
    model: onnx.ModelProto, batch: int
) -> tuple[onnx.ModelProto, tuple[str, ...], tuple[str, ...]]:
    """Return a model without the batch in its constants, nodes that changed, nodes that keep it."""
    freed = onnx.ModelProto()
    freed.CopyFrom(model)
    graph = freed.graph
    constants, shapes = _constants(graph), _shapes(model)
    taken = {*constants, *(name for node in graph.node for name in (*node.input, *node.output))}
    changed, stuck = [], []
    for node in graph.node:
        index = _INDEX.get(node.op_type, len(node.input))
        value = constants.get(node.input[index]) if index < len(node.input) else None
        if value is None or value.ndim != 1 or not value.size or value[0] < 1 or value[0] % batch:
            continue
        if any(entry.name == "axes" and 0 not in entry.ints for entry in node.attribute):
            continue  # sizes of height and width alone
        free = _free_constant(node, value, batch, shapes)
        if free is None:
            stuck.append(node.name or node.output[0])
            continue
        name = first_free(f"{node.input[index]}.free", taken)
        taken.add(name)
        graph.initializer.append(numpy_helper.from_array(free, name))
        node.input[index] = ""
        node.input[_FREE_INDEX[node.op_type]] = name
        changed.append(node.name or node.output[0])
    del graph.value_info[:]
    for info in (graph.input[0], *graph.output):
        dims = info.type.tensor_type.shape.dim
        if dims and dims[0].dim_value == batch:
            dims[0].dim_param = "N"
    inferred = onnx.shape_inference.infer_shapes(freed, data_prop=True)
    return inferred, tuple(changed), tuple(stuck)


def _free_constant(
    node: onnx.NodeProto,
    value: npt.NDArray[np.int64],
    batch: int,
    shapes: Mapping[str, Sequence[int]],
) -> npt.NDArray[Any] | None:
    """Return the target of a Reshape or the scales of a Resize for any batch; None: not known."""
    before, after = shapes.get(node.input[0]), shapes.get(node.output[0])
    kept = [attribute for attribute in node.attribute if attribute.name != "allowzero"]
    if node.op_type == "Reshape":
        del node.attribute[:]
        node.attribute.extend(kept)
        return _free_target(value, batch, before, after)
    has_axes = any(attribute.name == "axes" for attribute in node.attribute)
    return None if has_axes else _scales(value, before)


def _free_target(
    target: npt.NDArray[np.int64],
    batch: int,
    before: Sequence[int] | None,
    after: Sequence[int] | None,
) -> npt.NDArray[np.int64]:
    """Return a Reshape target for any batch.

    Args:
        target: of the Reshape; its first size holds the batch.
        batch: the fixed batch size.
        before: the shape of the Reshape's input at that batch size; a size that is not known is 0.
        after: the shape of its output.
    """
    if target[0] == batch and before and before[0] == batch:
        return np.concatenate([np.zeros(1, np.int64), target[1:]])
    rest = after[1:] if after and all(after) else target[1:]
    return np.array([-1, *rest], dtype=np.int64)  # the batch is a part of this axis, or of another


def _scales(
    sizes: npt.NDArray[np.int64], before: Sequence[int] | None
) -> npt.NDArray[np.float32] | None:
    """Return the scales of a Resize to fixed sizes, floor(scale * size before) = size after.

    Where float32 rounds a scale down, the next number above is taken. None: there are none.
    """
    if before is None or not all(before) or len(before) != len(sizes):
        return None
    scales = np.asarray(sizes / np.asarray(before), dtype=np.float32)
    for _ in range(2):
        got = np.floor(scales * np.asarray(before, np.float32))
        scales = np.where(got < sizes, np.nextafter(scales, np.float32(np.inf)), scales)
    got = np.floor(scales * np.asarray(before, np.float32))
    return scales.astype(np.float32) if np.array_equal(got, sizes) else None


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Return the inferred shape of every tensor; a size that is not known is 0."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
    }


def _constants(graph: onnx.GraphProto) -> dict[str, npt.NDArray[np.int64]]:
    """Return the int64 constants of a graph by name: initializers and Constant nodes."""
    tensors = [(tensor.name, tensor) for tensor in graph.initializer]
    tensors += [
        (node.output[0], attribute.t)
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    return {
        name: numpy_helper.to_array(tensor)
        for name, tensor in tensors
        if tensor.data_type == TensorProto.INT64
    }


def _difference(model: onnx.ModelProto, freed: onnx.ModelProto, sizes: list[int]) -> str | None:
    """Return how a freed model differs from the original on random images; None if it does not."""
    rng = np.random.default_rng(0)
    shape = (2 * sizes[0], *sizes[1:])
    x: npt.NDArray[np.float32] = rng.random(shape, dtype=np.float32)
    if model.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8:
        x = np.rint(255 * x)
    try:
        with OrtRunner(model.SerializeToString()) as runner:
            parts = [runner.run(x[: sizes[0]]), runner.run(x[sizes[0] :])]
        with OrtRunner(freed.SerializeToString()) as runner:
            got = runner.run(x)
    except ReptrtError as err:
        return str(err)
    for name, value in got.items():
        if parts[0][name].ndim == 0:
            return f"output {name} has no batch"
        expected = np.concatenate([part[name] for part in parts])
        if expected.shape != value.shape:
            return f"output {name} becomes {value.shape}, expected {expected.shape}"
        largest = float(np.abs(expected).max(initial=0))
        apart = float(np.abs(expected.astype(np.float64) - value).max(initial=0))
        if not apart <= _TOLERANCE * largest:
            return f"output {name} differs by {apart:.3g} at values up to {largest:.3g}"
    return None
