"""Give everything that is not INT8 the type FP16: scales, casts, biases and float layers.

TensorRT takes every type from the graph: with FP32 scales, all that is not INT8 runs in FP32.

    Q   has the type of its input: FP32 at a graph input, so that the input is not rounded twice
    DQ  has the type of its consumers: FP16

A scale is rounded to FP16, which changes it by a factor of 1 +- 2^-11 at most; Q and DQ use the
same rounded scale. Codes of weights stay: quantizing codes * scale anew with the rounded scale
would move a code by 127 * 2^-11 = 0.06 at most, never to another code.

What FP16 cannot hold and what decodes boxes stays in FP32 (`reptrt.rewrite.stay_fp32`) and is
reported. Graph inputs and outputs keep their types.

Requires: a float graph, or one with the Q/DQ that reptrt writes. Ensures: opset 19 or newer (FP16
scales), the same nodes apart from casts and copies of DQ, the same codes of weights.
"""

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from reptrt.core.errors import RewriteError, option
from reptrt.graph.net import Net, model_from_net, net_from_model, producer
from reptrt.rewrite.contract import RewriteReport, Skipped
from reptrt.rewrite.stay_fp32 import (
    DECODES,
    Scales,
    is_pair,
    reasons_to_stay,
    scales_of,
    with_neighbours,
)

_LOG = logging.getLogger(__name__)
_OPSET = 19  # the first whose scales can be FP16
_FREE = "tensor(float16)"
_BY_ATTRIBUTE = ("Cast", "Constant", "ConstantOfShape")  # an attribute says what type they make


def to_fp16(net: Net) -> RewriteReport:
    """Give scales and float nodes of a graph the type FP16, in place.

    Returns:
        The nodes that are FP16 now, and those left in FP32 with the reason.

    Raises:
        RewriteError: the graph has control flow, a tensor of unknown type, or an opset below 19
            that cannot be converted.
    """
    net.graph = _typed_graph(net)
    graph = net.graph
    scales = scales_of(graph)
    reasons = reasons_to_stay(net, scales)
    kept = with_neighbours(graph, scales, set(reasons))
    _split_dequantizers(net, kept)
    typing = _Typing(net, kept, scales)
    for node in list(graph.nodes):
        typing.convert(node)
    typing.close_outputs()
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    skipped = tuple(Skipped(name, reason) for name, reason in reasons.items())
    return RewriteReport("to_fp16", tuple(typing.changed), skipped)


def log_left_fp32(skipped: Sequence[Skipped]) -> None:
    """Log what `to_fp16` left in FP32, each with its reason at level INFO.

    The number of nodes that FP16 cannot hold is a warning; decoding stays as it should.
    """
    unfit = sum(skip.reason != DECODES for skip in skipped)
    if unfit:
        _LOG.warning(
            "%d node%s in FP32, because FP16 cannot hold a scale or constant there; the sidecar "
            "and the log at level INFO (-v) list each",
            unfit,
            " stays" if unfit == 1 else "s stay",
        )
    for skip in skipped:
        _LOG.info("%s stays in FP32: %s", skip.node, skip.reason)


def _typed_graph(net: Net) -> gs.Graph:
    """Return a copy in which the type of every tensor is known, at opset 19 or newer."""
    model = model_from_net(net)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < _OPSET:
        try:
            model = onnx.version_converter.convert_version(model, _OPSET)
        except RuntimeError as err:
            raise RewriteError(
                f"graph {net.graph.name}: opset {opset} cannot be converted to {_OPSET}, which "
                f"FP16 scales need ({' '.join(str(err).split())}); export with "
                f"{option('opset', _OPSET)}"
            ) from err
        model = onnx.shape_inference.infer_shapes(model)
    graph = net_from_model(model).graph
    for node in graph.nodes:
        if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
            raise RewriteError(
                f"{node.name}: {node.op} is control flow, which stays in FP32; use "
                f"{option('high_precision', 'fp32')}"
            )
        for tensor in node.outputs:
            if tensor.dtype is None and not tensor.is_empty():
                raise RewriteError(
                    f"{node.name}: the type of its output {tensor.name} is not known; run onnx "
                    f"shape inference on the file, or give {option('high_precision', 'fp32')}"
                )
    return graph


def _split_dequantizers(net: Net, kept: set[str]) -> None:
    """Give layers that stay in FP32 their own DQs, which stay in FP32 too."""
    for node in [node for node in net.graph.nodes if node.op == "DequantizeLinear"]:
        if node.name in kept:
            continue
        result = node.outputs[0]
        staying = [reader for reader in result.outputs if reader.name in kept]
        if not staying:
            continue
        name = net.fresh_name(f"{node.name}.fp32")
        own = gs.Variable(net.fresh_name(f"{result.name}.fp32"), np.float32, result.shape)
        net.graph.nodes.append(gs.Node(node.op, name, dict(node.attrs), list(node.inputs), [own]))
        kept.add(name)
        for reader in staying:
            _reconnect(reader, result, own)


class _Typing:
    """Sets the types of nodes and tensors, and inserts Casts where two types meet."""

    def __init__(self, net: Net, kept: set[str], scales: Scales) -> None:
        graph = net.graph
        self._net, self._graph, self._kept, self._scales = net, graph, kept, scales
        self._opset = int(graph.opset)
        self._float = {name: tensor.dtype == np.float32 for name, tensor in graph.tensors().items()}
        self._half_makers = {  # nodes whose float outputs become FP16
            node.name for node in graph.toposort().nodes if self._is_half(node)
        }
        self._constants: dict[tuple[str, str], gs.Constant] = {}
        self._casts: dict[tuple[int, str], gs.Variable] = {}
        self.changed: list[str] = []

    def _is_half(self, node: gs.Node) -> bool:
        """Whether a node's free float inputs and outputs are to be FP16."""
        if node.op == "QuantizeLinear":
            return False  # its type is that of its input: see `convert`
        if node.name in self._kept or node.domain not in (None, "", "ai.onnx"):
            return False
        if node.op in _BY_ATTRIBUTE:
            return False
        return any(self._frees(node, inputs=False)) or any(self._frees(node, inputs=True))

    def _frees(self, node: gs.Node, inputs: bool) -> list[bool]:
        """Return, for each input or output of a node, whether it is FP32 and may be FP16."""
        schema = onnx.defs.get_schema(node.op, self._opset, "")
        formals = schema.inputs if inputs else schema.outputs
        tensors = node.inputs if inputs else node.outputs
        free = []
        for index, tensor in enumerate(tensors):
            formal = formals[min(index, len(formals) - 1)]
            free.append(self._float.get(tensor.name, False) and _FREE in formal.types)
        return free

    def convert(self, node: gs.Node) -> None:
        """Set the types of a node's inputs and outputs."""
        if is_pair(node):
            self._convert_qdq(node)
            return
        half = node.name in self._half_makers
        frees = self._frees(node, inputs=True) if half else [False] * len(node.inputs)
        for index, (tensor, free) in enumerate(zip(list(node.inputs), frees, strict=True)):
            if self._float.get(tensor.name, False):
                node.inputs[index] = self._as(tensor, np.float16 if free else np.float32)
        if half:
            self._mark(node, self._frees(node, inputs=False))

    def _convert_qdq(self, node: gs.Node) -> None:
        scale = node.inputs[1]
        if not self._float.get(scale.name, False):
            return
        if node.op == "QuantizeLinear":
            half = self._made_half(node.inputs[0]) and scale.name not in self._scales.unfit
            kind = np.float16 if half else np.float32
            node.inputs[0] = self._as(node.inputs[0], kind)
        else:
            half = node.name in self._half_makers
            kind = np.float16 if half else np.float32
        node.inputs[1] = self._scale(scale, kind)
        if half:
            self._mark(node, [node.op == "DequantizeLinear"])

    def _mark(self, node: gs.Node, frees: list[bool]) -> None:
        for tensor, free in zip(node.outputs, frees, strict=True):
            if free:
                tensor.dtype = np.float16
        self.changed.append(node.name)

    def _made_half(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor is FP16 in the end."""
        maker = producer(tensor)
        if maker is None or maker.name not in self._half_makers:
            return False
        index = next(i for i, output in enumerate(maker.outputs) if output is tensor)
        return self._frees(maker, inputs=False)[index]

    def _as(self, tensor: gs.Tensor, kind: npt.DTypeLike) -> gs.Tensor:
        """Return a float tensor in a type: itself, a rounded constant, or through a Cast."""
        kind = np.dtype(kind)
        if isinstance(tensor, gs.Constant):
            if kind == np.float32:
                return tensor
            with np.errstate(over="ignore"):
                return self._constant(tensor.name, np.asarray(tensor.values).astype(kind))
        if self._made_half(tensor) == (kind == np.float16):
            return tensor
        key = (id(tensor), kind.name)
        if key not in self._casts:
            self._casts[key] = self._cast(tensor, kind, f"{tensor.name}.{_short(kind)}")
        return self._casts[key]

    def _scale(self, scale: gs.Tensor, kind: npt.DTypeLike) -> gs.Tensor:
        if scale.name not in self._scales.values:
            return self._as(scale, kind)
        return self._constant(scale.name, self._scales.values[scale.name].astype(kind))

    def _constant(self, name: str, value: npt.NDArray[np.floating]) -> gs.Constant:
        key = (name, value.dtype.name)
        if key not in self._constants:
            self._constants[key] = gs.Constant(
                self._net.fresh_name(f"{name}.{_short(value.dtype)}"), value
            )
        return self._constants[key]

    def _cast(self, tensor: gs.Tensor, kind: npt.DTypeLike, name: str) -> gs.Variable:
        result = gs.Variable(self._net.fresh_name(name), np.dtype(kind), tensor.shape)
        self._append_cast(tensor, result)
        return result

    def _append_cast(self, tensor: gs.Tensor, result: gs.Variable) -> None:
        to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(result.dtype))
        name = self._net.fresh_name(f"{result.name}.cast")
        self._graph.nodes.append(gs.Node("Cast", name, {"to": int(to)}, [tensor], [result]))

    def close_outputs(self) -> None:
        """Put a Cast before every graph output that would be FP16 now."""
        for output in self._graph.outputs:
            if not self._made_half(output):
                continue
            maker = output.inputs[0]
            half = gs.Variable(
                self._net.fresh_name(f"{output.name}.fp16"), np.float16, output.shape
            )
            for reader in list(output.outputs):
                _reconnect(reader, output, half)
            index = next(i for i, tensor in enumerate(maker.outputs) if tensor is output)
            maker.outputs[index] = half
            output.dtype = np.dtype(np.float32)
            self._append_cast(half, output)


def _reconnect(reader: gs.Node, old: gs.Tensor, new: gs.Tensor) -> None:
    for index, tensor in enumerate(reader.inputs):
        if tensor is old:
            reader.inputs[index] = new


def _short(kind: npt.DTypeLike) -> str:
    return "fp16" if np.dtype(kind) == np.float16 else "fp32"
