"""Rewrite a TensorRT-form Q/DQ graph so that onnxruntime runs it in INT8 on a CPU.

TensorRT wants Q after the ReLU, symmetric INT8; onnxruntime fuses a convolution only with a Q that
follows it directly. Run as it is, the graph would compute every convolution in float. Each step
here is exact: the codes of every tensor stay the same.

1. ``Relu -> Q(int8)`` becomes ``Q(uint8, zero point 0) -> Clip(0, 127)``: saturation at 0 is the
   ReLU, and the clip restores the saturation at 127 that INT8 has. ``Clip(0, c)`` likewise.
2. ``DQ -> Flatten, Reshape, MaxPool...`` gets a Q/DQ pair of the same scale behind it, which
   onnxruntime needs in order to keep the codes.
3. A Gemm of two DQ with a float bias becomes Gemm + Add: onnxruntime's INT8 Gemm with float output
   takes no float bias.
"""

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from reptrt.graph import constant_value, model_from_net, net_from_model, producer
from reptrt.placement import MOVING_OPS


def lower(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model in the form that onnxruntime fuses; a float model comes back as it is."""
    if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return model
    net = net_from_model(model)
    graph = net.graph
    for node in list(graph.nodes):
        if node.op in ("Relu", "Clip"):
            _saturate_instead(graph, node)
        elif node.op == "Gemm":
            _split_bias(graph, node)
    for node in list(graph.toposort().nodes):
        if node.op in MOVING_OPS:
            _repeat_pair(graph, node)
    return model_from_net(net)


def _saturate_instead(graph: gs.Graph, node: gs.Node) -> None:
    """Step 1."""
    activated = node.outputs[0]
    readers = activated.outputs
    if len(readers) != 1 or readers[0].op != "QuantizeLinear" or activated in graph.outputs:
        return
    quantize = readers[0]
    scale, zero_point = (constant_value(tensor) for tensor in quantize.inputs[1:3])
    low, high = _bounds(node)
    if scale is None or zero_point is None or zero_point.dtype != np.int8 or low != 0.0:
        return
    codes = quantize.outputs[0]
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
    if dequantize is None or dequantize.op != "DequantizeLinear" or not node.outputs[0].outputs:
        return
    if all(reader.op == "QuantizeLinear" for reader in node.outputs[0].outputs):
        return
    moved = node.outputs[0]
    scale, zero_point = dequantize.inputs[1:3]
    codes = gs.Variable(f"{moved.name}.q", dtype=zero_point.dtype, shape=moved.shape)
    result = gs.Variable(f"{moved.name}.dq", dtype=np.float32, shape=moved.shape)
    for reader in list(moved.outputs):
        for index, tensor in enumerate(reader.inputs):
            if tensor is moved:
                reader.inputs[index] = result
    graph.nodes += [
        gs.Node("QuantizeLinear", f"{node.name}.q", {}, [moved, scale, zero_point], [codes]),
        gs.Node("DequantizeLinear", f"{node.name}.dq", {}, [codes, scale, zero_point], [result]),
    ]


def _split_bias(graph: gs.Graph, node: gs.Node) -> None:
    """Step 3."""
    sources = [producer(tensor) for tensor in node.inputs[:2]]
    if len(node.inputs) < 3 or any(s is None or s.op != "DequantizeLinear" for s in sources):
        return
    bias = constant_value(node.inputs[2])
    if bias is None or node.attrs.get("beta", 1.0) != 1.0:
        return
    result = node.outputs[0]
    product = gs.Variable(f"{node.name}.product", dtype=np.float32, shape=result.shape)
    offset = node.inputs[2]
    node.inputs = node.inputs[:2]
    node.outputs = [product]
    graph.nodes.append(gs.Node("Add", f"{node.name}.bias_add", {}, [product, offset], [result]))
