"""Layers as maps, whatever their form: Conv, ConvTranspose, Gemm and matrix product."""

from collections.abc import Callable, Mapping

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.core.arrays import Float64Array
from reptrt.graph.net import Net, constant_value
from reptrt.rewrite.linear import LinearMap, regroup

COMPUTED_WEIGHTS = "its weights are not constant"


def layer_of(node: gs.Node) -> LinearMap | str:
    """Return kernel, bias and groups of a Conv, ConvTranspose, Gemm or matrix product (N, C).

    The window is left at stride 1 without padding. Returns the reason if weights are computed or
    the node has a form that is not a layer's.
    """
    reader = _LAYERS.get(node.op)
    return "it is not a layer" if reader is None else reader(node)


def write_layer(net: Net, name: str, source: gs.Tensor, linear: LinearMap) -> gs.Node:
    """Append the Conv, ConvTranspose or Gemm that computes a map of ``source``."""
    output = gs.Variable(net.fresh_name(f"{name}.output"), dtype=np.float32)
    op = "Gemm" if linear.axes == 0 else "ConvTranspose" if linear.transposed else "Conv"
    node = gs.Node(op, name, _attributes(linear), [source], [output])
    set_parameters(net, node, linear, f"{name}.weight", f"{name}.bias")
    net.graph.nodes.append(node)
    return node


def set_parameters(net: Net, node: gs.Node, linear: LinearMap, weight: str, bias: str) -> None:
    """Give a layer the kernel and bias of a map, as float64 constants; its window stays.

    Args:
        net: the net, for free names.
        node: a Conv, ConvTranspose, Gemm or MatMul; the last two become a Gemm with transB.
        linear: has the node's groups.
        weight: name of the new weight, before ``.folded``.
        bias: name of the new bias, before ``.folded``.
    """
    kernel = linear.kernel
    if node.op in ("Gemm", "MatMul"):
        node.op, node.attrs = "Gemm", {"transB": 1}
        kernel = regroup(linear, 1).kernel
    elif node.op == "ConvTranspose":
        parts = kernel.reshape(linear.groups, -1, *kernel.shape[1:]).swapaxes(1, 2)
        kernel = parts.reshape(-1, *parts.shape[2:])
    names = [net.fresh_name(f"{name}.folded") for name in (weight, bias)]
    constants = zip(names, (np.ascontiguousarray(kernel), linear.bias), strict=True)
    node.inputs = [node.inputs[0], *(gs.Constant(name, value) for name, value in constants)]


def _attributes(linear: LinearMap) -> dict[str, list[int] | int]:
    if linear.axes == 0:
        return {"transB": 1}
    attributes: dict[str, list[int] | int] = {
        "kernel_shape": list(linear.size),
        "strides": list(linear.stride),
        "pads": [*linear.begin, *(max(pad, 0) for pad in linear.end)],
        "dilations": list(linear.dilation),
        "group": linear.groups,
    }
    if min(linear.end) < 0:
        attributes["output_padding"] = [max(-pad, 0) for pad in linear.end]
    return attributes


def has_input(node: gs.Node, index: int) -> bool:
    """Whether a node has an input that ONNX lets be left out."""
    return len(node.inputs) > index and not node.inputs[index].is_empty()


def parameter(node: gs.Node, index: int) -> Float64Array | None:
    """Return a constant input as float64; None if it is computed or left out."""
    value = constant_value(node.inputs[index]) if has_input(node, index) else None
    return None if value is None else value.astype(np.float64)


def _convolution(node: gs.Node) -> LinearMap | str:
    weight, bias = parameter(node, 1), parameter(node, 2)
    if weight is None or weight.ndim < 3 or (bias is None and has_input(node, 2)):
        return COMPUTED_WEIGHTS
    groups = int(node.attrs.get("group", 1))
    if node.op == "ConvTranspose":  # (I, O / groups, *taps)
        parts = weight.reshape(groups, -1, *weight.shape[1:]).swapaxes(1, 2)
        weight = parts.reshape(-1, *parts.shape[2:])
    bias = np.zeros(weight.shape[0]) if bias is None else bias
    return LinearMap(weight, bias, groups=groups, transposed=node.op == "ConvTranspose")


def _gemm(node: gs.Node) -> LinearMap | str:
    weight, bias = parameter(node, 1), parameter(node, 2)
    if weight is None or (bias is None and has_input(node, 2)):
        return COMPUTED_WEIGHTS
    if node.attrs.get("transA", 0):
        return "its input is transposed"
    if not node.attrs.get("transB", 0):
        weight = weight.T
    if bias is None:
        bias = np.zeros(weight.shape[0])
    elif bias.size not in (1, len(weight)) or bias.shape[-1:] != (bias.size,) * bool(bias.ndim):
        return "its bias is not one value per channel"
    bias = np.broadcast_to(bias.reshape(-1), weight.shape[:1])
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    return LinearMap(weight * alpha, bias * beta)


def _matmul(node: gs.Node) -> LinearMap | str:
    weight = parameter(node, 1)
    if weight is None or weight.ndim != 2:
        return COMPUTED_WEIGHTS
    if len(node.inputs[0].shape or ()) != 2:
        return "it multiplies matrices, not one row per image"
    return LinearMap(weight.T, np.zeros(weight.shape[1]))


_LAYERS: Mapping[str, Callable[[gs.Node], LinearMap | str]] = {
    "Conv": _convolution,
    "ConvTranspose": _convolution,
    "Gemm": _gemm,
    "MatMul": _matmul,
}
