"""The weight and the bias of a layer: where they are, how large, and how a constant is added.

A layer here is a Conv, ConvTranspose, Gemm or MatMul; a bias may also be the constant of an Add.
"""

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from reptrt.core.arrays import Float64Array
from reptrt.graph.net import Net, constant_value, producer


def output_axis(node: gs.Node, rank: int = 2) -> int:
    """Return the axis of the output channels in the weight of a layer.

    Args:
        node: the layer.
        rank: number of dimensions of the weight; it matters for a MatMul only.
    """
    if node.op == "Conv" or (node.op == "Gemm" and node.attrs.get("transB", 0)):
        return 0
    return rank - 1 if node.op == "MatMul" else 1


def dequantized_weight(node: gs.Node) -> Float64Array | None:
    """Return the weight of a layer as it is deployed, codes times scales; None if not constant."""
    value = constant_value(node.inputs[1])
    if value is not None:
        return value.astype(np.float64)
    dequantize = producer(node.inputs[1])
    if dequantize is None or dequantize.op != "DequantizeLinear":
        return None
    codes, scale = (constant_value(tensor) for tensor in dequantize.inputs[:2])
    if codes is None or scale is None or scale.ndim > 1:
        return None
    shape = [1] * codes.ndim
    if scale.size > 1:
        shape[int(dequantize.attrs.get("axis", 1))] = -1
    return np.asarray(codes.astype(np.float64) * scale.astype(np.float64).reshape(shape))


def weight_sums(node: gs.Node) -> Float64Array:
    """Return the sum of the weights of each output channel of a Conv or Gemm, (O,)."""
    weight = dequantized_weight(node)
    if weight is None:
        return np.zeros(())
    if node.op == "Gemm":
        sums = weight.sum(axis=1 - output_axis(node))
        return np.asarray(sums * float(node.attrs.get("alpha", 1.0)))
    return np.asarray(weight.reshape(weight.shape[0], -1).sum(axis=1))


def has_bias(node: gs.Node) -> bool:
    """Whether a layer, or an Add of a constant, has a bias."""
    index = _bias_index(node)
    return len(node.inputs) > index and not node.inputs[index].is_empty()


def add_to_bias(net: Net, node: gs.Node, delta: Float64Array) -> None:
    """Add a constant to the output of a Conv, ConvTranspose, Gemm or Add of a constant.

    Args:
        net: the net of the node.
        node: the node; a layer without a bias gets one.
        delta: a scalar, or one value per output channel, float64.
    """
    index = _bias_index(node)
    old = constant_value(node.inputs[index]) if has_bias(node) else None
    if node.op == "Add":
        value = np.asarray(old, dtype=np.float64) + delta
    else:
        delta = delta / float(node.attrs.get("beta", 1.0)) if old is not None else delta
        channels = _num_outputs(node)
        before = np.zeros(channels) if old is None else old.astype(np.float64).reshape(-1)
        value = np.broadcast_to(before + delta, (channels,))
        if old is None:
            node.attrs.pop("beta", None)
    set_constant(net, node, index, value.astype(np.float32))


def set_constant(net: Net, node: gs.Node, index: int, value: npt.NDArray[np.float32]) -> None:
    """Give a node another constant, under the old name if no other node reads the old one."""
    old = node.inputs[index] if index < len(node.inputs) else None
    if isinstance(old, gs.Constant) and len(old.outputs) == 1:
        old.values = value
        return
    constant = gs.Constant(net.fresh_name(f"{node.name}.bias"), value)
    if old is None:
        node.inputs.append(constant)
    else:
        node.inputs[index] = constant


def _bias_index(node: gs.Node) -> int:
    """Return the input that holds the bias of a layer (2), or the constant of an Add."""
    if node.op != "Add":
        return 2
    return next(i for i, tensor in enumerate(node.inputs) if constant_value(tensor) is not None)


def _num_outputs(node: gs.Node) -> int:
    weight = node.inputs[1]
    dequantize = producer(weight)
    if dequantize is not None and dequantize.op == "DequantizeLinear":
        weight = dequantize.inputs[0]
    shape = np.asarray(constant_value(weight)).shape
    channels = int(shape[output_axis(node)])
    return channels if output_axis(node) == 0 else channels * int(node.attrs.get("group", 1))
