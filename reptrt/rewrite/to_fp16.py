"""Give everything that is not INT8 the type FP16: scales, casts, biases and float layers.

TensorRT takes every type from the graph: with FP32 scales, all that is not INT8 runs in FP32.

    Q   has the type of its input: FP32 at a graph input, so that the input is not rounded twice
    DQ  has the type of its consumers: FP16

A scale is rounded to FP16, which changes it by a factor of 1 +- 2^-11 at most; Q and DQ use the
same rounded scale. Codes of weights stay: quantizing codes * scale anew with the rounded scale
would move a code by 127 * 2^-11 = 0.06 at most, never to another code.

Scales outside FP16's normal range [6.1e-5, 65504] and constants beyond 65504 stay in FP32 together
with their layer, so that the layer still fuses into one INT8 kernel. They are reported. Graph
inputs and outputs keep their types.

Requires: a float graph, or one with the Q/DQ that reptrt writes. Ensures: opset 19 or newer (FP16
scales), the same nodes apart from casts and copies of DQ, the same codes of weights.
"""

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from reptrt.core.errors import RewriteError, option
from reptrt.graph.net import (
    WEIGHTED_OPS,
    Net,
    is_private,
    model_from_net,
    net_from_model,
    producer,
)
from reptrt.rewrite.contract import RewriteReport, Skipped

_LOG = logging.getLogger(__name__)
_SMALLEST = float(np.finfo(np.float16).smallest_normal)  # 6.1e-5
_LARGEST = float(np.finfo(np.float16).max)  # 65504
_OPSET = 19  # the first whose scales can be FP16
_FREE = "tensor(float16)"
_BY_ATTRIBUTE = ("Cast", "Constant", "ConstantOfShape")  # an attribute says what type they make
_POINTWISE = ("Relu", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "HardSwish", "HardSigmoid", "Tanh")


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
    scales = _scales(graph)
    reasons = _unfit(graph, scales)
    kept = _with_neighbours(graph, scales, set(reasons))
    _split_dequantizers(net, kept)
    typing = _Typing(net, kept, scales)
    for node in list(graph.nodes):
        typing.convert(node)
    typing.close_outputs()
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    skipped = tuple(Skipped(name, reason) for name, reason in reasons.items())
    return RewriteReport("to_fp16", tuple(typing.changed), skipped)


def log_left_fp32(skipped: Sequence[Skipped]) -> None:
    """Log the number of nodes that `to_fp16` left in FP32; each with its reason at level INFO."""
    if skipped:
        _LOG.warning(
            "%d node%s in FP32, because FP16 cannot hold a scale or constant there; the sidecar "
            "and the log at level INFO (-v) list each",
            len(skipped),
            " stays" if len(skipped) == 1 else "s stay",
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


class _Scales:
    """The scales that a graph will have: rounded to FP16 where it can hold them."""

    def __init__(self) -> None:
        self.values: dict[str, npt.NDArray[np.float32]] = {}
        self.unfit: dict[str, str] = {}  # constant -> why FP16 cannot hold it

    def add(self, constant: gs.Constant) -> None:
        value = np.asarray(constant.values, dtype=np.float32)
        outside = (value < _SMALLEST) | (value > _LARGEST)
        if outside.any():
            worst = float(value[outside].ravel()[0])
            self.unfit[constant.name] = (
                f"scale {worst:.3g} is outside FP16's normal range "
                f"[{_SMALLEST:.2g}, {_LARGEST:.0f}]"
            )
            self.values[constant.name] = value
        else:
            self.values[constant.name] = value.astype(np.float16).astype(np.float32)


def _scales(graph: gs.Graph) -> _Scales:
    scales = _Scales()
    for node in graph.nodes:
        if _is_qdq(node) and _is_float_constant(node.inputs[1]):
            scales.add(node.inputs[1])
    return scales


def _unfit(graph: gs.Graph, scales: _Scales) -> dict[str, str]:
    """Return the nodes with constants that FP16 cannot hold: name -> reason."""
    reasons: dict[str, str] = {}
    for node in graph.nodes:
        if _is_qdq(node):
            if node.inputs[1].name in scales.unfit:
                reasons[node.name] = scales.unfit[node.inputs[1].name]
            continue
        for tensor in node.inputs:
            if node.op != "Clip" and _is_float_constant(tensor):  # a bound may become infinite
                value = np.abs(tensor.values)
                largest = float(np.max(value, where=np.isfinite(value), initial=0.0))
                if largest > _LARGEST:
                    reasons[node.name] = (
                        f"{tensor.name} holds {largest:.3g}, beyond FP16's {_LARGEST:.0f}"
                    )
    return reasons


def _with_neighbours(graph: gs.Graph, scales: _Scales, kept: set[str]) -> set[str]:
    """Return the names of all nodes that stay in FP32, given those with unfit constants.

    These are the layers that consume an unfit DQ, the nodes between a layer and an unfit Q, and the
    nodes that fuse with such a layer: sums and pointwise nodes behind it, up to the next Q.
    """
    kept = set(kept)
    for node in graph.nodes:
        if node.op == "DequantizeLinear" and node.inputs[1].name in scales.unfit:
            kept |= {reader.name for reader in node.outputs[0].outputs if reader.op in WEIGHTED_OPS}
        if node.op == "QuantizeLinear" and node.inputs[1].name in scales.unfit:
            kept |= {maker.name for maker in _makers(graph, node)}
    for node in graph.nodes:  # in execution order
        if node.op in (*_POINTWISE, "Add") and any(
            maker.name in kept and not _is_qdq(maker) and is_private(graph, tensor)
            for tensor in node.inputs
            if (maker := producer(tensor)) is not None
        ):
            kept |= {node.name, *_factors(graph, node)}
    return kept


def _factors(graph: gs.Graph, node: gs.Node) -> Iterator[str]:
    """Yield the Mul nodes that feed only this sum: they join the same kernel."""
    for tensor in node.inputs if node.op == "Add" else ():
        maker = producer(tensor)
        if maker is not None and maker.op == "Mul" and is_private(graph, tensor):
            yield maker.name


def _makers(graph: gs.Graph, node: gs.Node) -> Iterator[gs.Node]:
    """Yield the nodes in front of a Q, back to the layer, as long as they feed only the Q."""
    while is_private(graph, node.inputs[0]):
        maker = producer(node.inputs[0])
        if maker is None or maker.op not in (*_POINTWISE, *WEIGHTED_OPS):
            return
        yield maker
        if maker.op in WEIGHTED_OPS:
            return
        node = maker


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

    def __init__(self, net: Net, kept: set[str], scales: _Scales) -> None:
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
        if _is_qdq(node):
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


def _is_qdq(node: gs.Node) -> bool:
    return node.op in ("QuantizeLinear", "DequantizeLinear")


def _is_float_constant(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and tensor.dtype == np.float32


def _short(kind: npt.DTypeLike) -> str:
    return "fp16" if np.dtype(kind) == np.float16 else "fp32"
