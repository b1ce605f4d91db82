"""Rewrite a TensorRT-form Q/DQ graph so that a CPU runs it as INT8 kernels do.

TensorRT needs a symmetric INT8 Q behind the ReLU. onnxruntime fuses a convolution only with a Q
that follows it directly, so it would run every convolution of an unchanged graph in float. Steps 1,
2 and 5 are exact: the codes of every tensor stay the same.

0. Float nodes in FP16 become FP32 nodes with the same numbers: casts are removed, and scales,
   biases and float weights are widened, which is exact. FP16 arithmetic is not simulated.
   Tensors that `reptrt.rewrite.recentre` gave all 256 codes get UINT8 codes with zero point 0
   again (`reptrt.rewrite.restore`).
1. ``Relu -> Q(int8)`` becomes ``Q(uint8, zero point 0) -> Clip(0, 127)``: saturation at 0 is the
   ReLU, and the clip restores the saturation at 127 that INT8 has. ``Clip(0, c)`` likewise.
2. ``DQ -> Flatten, Reshape, MaxPool...`` gets another Q/DQ pair with the same scale behind it;
   onnxruntime needs it in order to move codes.
3. The bias of a Gemm of two DQ becomes INT32 codes of the accumulator's own step, which
   onnxruntime does by itself for convolutions only. It moves the bias by half such a step at most.
4. If the weights of a channel are so small compared to its bias that those codes would overflow,
   the step of the weights grows until the bias fits; if all weights are zero, the step is chosen
   for the bias. This moves an output by less than 2^-22 of the bias for each weight of the channel.
5. The remaining INT8 activations get UINT8 codes with zero point 128
   (`reptrt.rewrite.to_unsigned`).
6. Layers for which there is no INT8 kernel, because no Q follows, sum codes in float operators
   (`reptrt.execute.code_sums`), which is exact. For a runtime without any INT8 kernels,
   `reptrt.execute.torchgraph`, all layers do. Codes and outputs are then those of onnxruntime, to
   the bit, except where onnxruntime has a kernel of another kind (average pools, sums of INT8
   summands; see docs/methods.md).

A pair in another form than reptrt writes (other zero points, codes with other consumers) is left
unchanged.
"""

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from reptrt.core.grid import Grid, along_axis
from reptrt.execute.code_sums import quantize_behind, sum_codes
from reptrt.graph.flow import moves_values
from reptrt.graph.net import constant_value, model_from_net, net_from_model, producer
from reptrt.graph.queries import quantization_of, symmetric_int8_scale
from reptrt.rewrite.restore import restore
from reptrt.rewrite.to_unsigned import make_unsigned

_MAX_BIAS_CODE = 1 << 30  # leaves room for the sum in an INT32 accumulator
_LONE_BIAS_CODE = 1 << 22  # of a channel without weights: sums in float are exact below 2^24
_MIN_WEIGHT_SCALE = 1e-20  # times the activation's scale it is still a float32


def lower(model: onnx.ModelProto, *, kernels: bool = True) -> onnx.ModelProto:
    """Return the model in the form that runs as INT8; a float model is returned unchanged.

    Args:
        model: a Q/DQ model; it is not changed.
        kernels: keep the layers for which onnxruntime has an INT8 kernel; if False, all layers sum
            codes in float operators (step 6).
    """
    if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return model
    net = net_from_model(model)
    graph = net.graph
    _widen(graph)
    restore(net)
    for node in list(graph.toposort().nodes):
        if node.op in ("Relu", "Clip"):
            _saturate_instead(graph, node)
        elif moves_values(node):
            _repeat_pair(graph, node)
        elif node.op in ("Conv", "ConvTranspose", "Gemm"):
            _fit_bias(node)
            if node.op == "Gemm":
                _quantize_bias(graph, node)
    for node in graph.nodes:
        make_unsigned(graph, node)
    for node in list(graph.nodes):
        if not (kernels and _has_kernel(graph, node)):
            sum_codes(graph, node)
    return model_from_net(net)


def _has_kernel(graph: gs.Graph, node: gs.Node) -> bool:
    """Return whether onnxruntime has an INT8 kernel for a layer whose operands are dequantized."""
    return node.op == "Gemm" or (node.op == "Conv" and quantize_behind(graph, node) is not None)


def _widen(graph: gs.Graph) -> None:
    """Step 0."""
    for node in list(graph.nodes):
        if node.op == "Cast" and node.attrs["to"] == onnx.TensorProto.FLOAT16:
            node.attrs["to"] = int(onnx.TensorProto.FLOAT)
        for name, value in node.attrs.items():
            if isinstance(value, gs.Constant) and value.dtype == np.float16:
                node.attrs[name] = gs.Constant(value.name, value.values.astype(np.float32))
    for tensor in graph.tensors().values():
        if tensor.dtype != np.float16:
            continue
        if isinstance(tensor, gs.Constant):
            tensor.values = tensor.values.astype(np.float32)
        else:
            tensor.dtype = np.dtype(np.float32)
    for node in list(graph.nodes):
        if node.op == "Cast" and node.inputs[0].dtype == node.outputs[0].dtype == np.float32:
            _bypass(graph, node)


def _bypass(graph: gs.Graph, node: gs.Node) -> None:
    """Remove a node that changes nothing; graph outputs keep their names."""
    (source,), (result,) = node.inputs, node.outputs
    if any(result is output for output in graph.outputs):
        maker = producer(source)
        if maker is None or any(source is output for output in graph.outputs):
            node.op, node.attrs = "Identity", {}
            return
        node.inputs.clear()
        node.outputs.clear()
        maker.outputs[maker.outputs.index(source)] = result
        source, result = result, source
    else:
        node.inputs.clear()
        node.outputs.clear()
    for reader in list(result.outputs):
        for index, tensor in enumerate(reader.inputs):
            if tensor is result:
                reader.inputs[index] = source


def _saturate_instead(graph: gs.Graph, node: gs.Node) -> None:
    """Step 1."""
    activated = node.outputs[0]
    readers = activated.outputs
    if len(readers) != 1 or readers[0].op != "QuantizeLinear" or activated in graph.outputs:
        return
    quantize = readers[0]
    parameters = quantization_of(quantize)
    if node.op == "Relu" and parameters is not None and parameters.grid == Grid(0, 255):
        _bypass(graph, node)  # as onnxruntime does by itself
        return
    scale = symmetric_int8_scale(quantize)
    low, high = _bounds(node)
    codes = quantize.outputs[0]
    if scale is None or low != 0.0 or codes in graph.outputs:
        return
    if any(symmetric_int8_scale(reader) is None for reader in codes.outputs):
        return
    name = codes.name
    unsigned_zero = gs.Constant(f"{name}.u8_zero_point", np.array(0, dtype=np.uint8))
    unsigned = gs.Variable(f"{name}.u8", dtype=np.uint8, shape=codes.shape)
    top = min(127, int(np.rint(np.float32(high) / scale))) if np.isfinite(high) else 127
    clip = gs.Node(
        "Clip",
        f"{quantize.name}.clip",
        inputs=[unsigned, unsigned_zero, gs.Constant(f"{name}.u8_max", np.array(top, np.uint8))],
    )
    clipped = gs.Variable(f"{name}.u8_clipped", dtype=np.uint8, shape=codes.shape)
    for dequantize in list(codes.outputs):
        dequantize.inputs[0] = clipped
        dequantize.inputs[2] = unsigned_zero
    clip.outputs = [clipped]
    quantize.inputs = [node.inputs[0], quantize.inputs[1], unsigned_zero]
    quantize.outputs = [unsigned]
    graph.nodes.append(clip)
    node.outputs.clear()
    node.inputs.clear()


def _bounds(node: gs.Node) -> tuple[float, float]:
    if node.op == "Relu":
        return 0.0, np.inf
    if len(node.inputs) == 1:  # opset < 11
        return float(node.attrs.get("min", -np.inf)), float(node.attrs.get("max", np.inf))
    bounds = [-np.inf, np.inf]
    for index, tensor in enumerate(node.inputs[1:3]):
        if tensor.name:
            value = constant_value(tensor)
            bounds[index] = np.nan if value is None else float(value)
    return bounds[0], bounds[1]


def _repeat_pair(graph: gs.Graph, node: gs.Node) -> None:
    """Step 2."""
    dequantize = producer(node.inputs[0])
    if dequantize is None or dequantize.op != "DequantizeLinear" or len(dequantize.inputs) < 3:
        return
    if np.asarray(constant_value(dequantize.inputs[1])).size != 1:
        return  # one scale per channel: the channels may have moved
    for moved in node.outputs:
        if any(reader.op != "QuantizeLinear" for reader in moved.outputs):
            prefix = node.name if moved is node.outputs[0] else moved.name
            _append_pair(graph, prefix, moved, dequantize.inputs[1:3])


def _append_pair(
    graph: gs.Graph, prefix: str, moved: gs.Tensor, parameters: Sequence[gs.Tensor]
) -> None:
    """Put a Q/DQ pair between a tensor and all its consumers; a graph output is not changed."""
    codes = gs.Variable(f"{moved.name}.q", dtype=parameters[1].dtype, shape=moved.shape)
    result = gs.Variable(f"{moved.name}.dq", dtype=np.float32, shape=moved.shape)
    for reader in list(moved.outputs):
        for index, tensor in enumerate(reader.inputs):
            if tensor is moved:
                reader.inputs[index] = result
    graph.nodes += [
        gs.Node("QuantizeLinear", f"{prefix}.q", {}, [moved, *parameters], [codes]),
        gs.Node("DequantizeLinear", f"{prefix}.dq", {}, [codes, *parameters], [result]),
    ]


def _fit_bias(node: gs.Node) -> None:
    """Step 4."""
    sources = [producer(tensor) for tensor in node.inputs[:2]]
    if len(node.inputs) < 3 or any(s is None or s.op != "DequantizeLinear" for s in sources):
        return
    activation, weight = sources
    if activation is None or weight is None or len(weight.outputs[0].outputs) != 1:
        return
    bias, step, scale, codes = (
        constant_value(tensor)
        for tensor in (node.inputs[2], activation.inputs[1], weight.inputs[1], weight.inputs[0])
    )
    if bias is None or step is None or scale is None or codes is None:
        return
    if bias.ndim != 1 or scale.shape != bias.shape or codes.dtype != np.int8:
        return
    axis = int(weight.attrs.get("axis", 1))
    others = tuple(i for i in range(codes.ndim) if i != axis)
    free = ~codes.any(axis=others)  # all weights are zero, so any scale represents them
    largest = np.where(free, float(_LONE_BIAS_CODE), float(_MAX_BIAS_CODE))
    needed = np.maximum(np.abs(bias.astype(np.float64)) / (step * largest), _MIN_WEIGHT_SCALE)
    fitted = np.where(free, needed, np.maximum(scale, needed)).astype(np.float32)
    if np.array_equal(fitted, scale):
        return
    name = weight.outputs[0].name
    shrunk = np.rint(codes * along_axis(scale / fitted, codes.ndim, axis)).astype(np.int8)
    weight.inputs[0] = gs.Constant(f"{name}.fitted_q", shrunk)
    weight.inputs[1] = gs.Constant(f"{name}.fitted_scale", fitted)


def _quantize_bias(graph: gs.Graph, node: gs.Node) -> None:
    """Step 3."""
    sources = [producer(tensor) for tensor in node.inputs[:2]]
    if len(node.inputs) < 3 or any(s is None or s.op != "DequantizeLinear" for s in sources):
        return
    bias = constant_value(node.inputs[2])
    scales = [
        value
        for source in sources
        if source is not None and (value := constant_value(source.inputs[1])) is not None
    ]
    if bias is None or bias.ndim != 1 or len(scales) != 2:
        return
    if any(value.size not in (1, bias.size) for value in scales):
        return  # one value for all channels
    scale = np.broadcast_to(scales[0] * scales[1], bias.shape).astype(np.float32)
    name = f"{node.name}.bias"
    codes = np.rint(bias.astype(np.float64) / scale).astype(np.int32)
    inputs = [
        gs.Constant(f"{name}.int32", codes),
        gs.Constant(f"{name}.int32_scale", scale),
        gs.Constant(f"{name}.int32_zero_point", np.zeros(codes.shape, np.int32)),
    ]
    result = gs.Variable(f"{name}.dq", dtype=np.float32, shape=bias.shape)
    graph.nodes.append(gs.Node("DequantizeLinear", f"{name}.dq", {"axis": 0}, inputs, [result]))
    node.inputs[2] = result
