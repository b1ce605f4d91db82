"""Put a per-channel affine after every layer, before its activation function: QPRep.

    y = gain[c] * conv(x, W) + shift[c]        at first gain = 1, shift = the layer's bias

After RepAPQ (arXiv 2402.16121). Calibration learns gain and shift. The layer itself loses its bias;
a split layer gets one affine for the sum of its parts. `fold_affine` multiplies the affine into the
layer, so it costs nothing in the deployed graph.

Requires: layers with constant or dequantized constant weights, and a bias with one value per
channel. A split layer whose summands are quantized gets no affine, since their steps are per
tensor. Ensures: the output tensor of each layer keeps its name and, to float rounding, its value.
"""

import math

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from reptrt.graph.affines import Affine, read_affines, record_affines
from reptrt.graph.net import Net, constant_value, producer
from reptrt.graph.splits import Split, read_splits
from reptrt.rewrite.contract import RewriteReport, Skipped


def insert_affine(net: Net) -> RewriteReport:
    """Insert an affine after every Conv and Gemm, or after the sum of a split one.

    The skip of a scalar identity split has one factor for all channels, which later becomes a
    scale. There the affine goes behind the convolution, and the skip is added unchanged.
    """
    nodes = {node.name: node for node in net.graph.nodes}
    splits = {split.main: split for split in read_splits(net)}
    sides = {split.side for split in splits.values()}
    present = read_affines(net)
    have_one = {affine.layer for affine in present}
    affines, skipped = list(present), []
    for node in list(net.graph.toposort().nodes):
        split = splits.get(node.name)
        layer = split.layer if split else node.name
        if node.op not in ("Conv", "Gemm") or node.name in sides or layer in have_one:
            continue
        reason = _reason_against(node, split)
        if reason is not None:
            skipped.append(Skipped(layer, reason))
            continue
        whole = split is None or split.form == "identity-scalar"
        last = node if whole or split is None else nodes[split.sum]
        affines.append(_insert(net, node, last, layer))
    net.graph.toposort()
    record_affines(net, affines)
    changed = tuple(affine.layer for affine in affines[len(present) :])
    return RewriteReport("insert_affine", changed, tuple(skipped))


def weight_of(node: gs.Node) -> npt.NDArray[np.generic] | None:
    """Return the codes or floats of a layer's weight; None if they are computed."""
    values = constant_value(node.inputs[1])
    if values is not None:
        return values
    maker = producer(node.inputs[1])
    if maker is None or maker.op != "DequantizeLinear":
        return None
    return constant_value(maker.inputs[0])


def _reason_against(node: gs.Node, split: Split | None) -> str | None:
    if split is not None and split.precision == "int8":
        return "the summands of its split are quantized"
    if weight_of(node) is None:
        return "its weight is not a constant"
    if len(node.inputs) > 2 and constant_value(node.inputs[2]) is None:
        return "its bias is not a constant"
    if any(node.attrs.get(name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return "alpha or beta is not 1"
    if len(node.inputs) > 2:
        shape = np.asarray(constant_value(node.inputs[2])).shape
        if math.prod(shape) != 1 and not math.prod(shape) == shape[-1] == _shape(node)[1]:
            return "its bias is not one value per channel"
    return None


def _shape(node: gs.Node) -> tuple[int, ...]:
    """Return the shape of one value per channel that broadcasts to a layer's output."""
    weight = np.asarray(weight_of(node))
    if node.op == "Conv":
        return (1, weight.shape[0], *[1] * (weight.ndim - 2))
    return (1, weight.shape[0 if node.attrs.get("transB", 0) else 1])


def _insert(net: Net, conv: gs.Node, last: gs.Node, layer: str) -> Affine:
    shape = _shape(conv)
    channels = shape[1]
    bias = np.zeros(channels, dtype=np.float32)
    if len(conv.inputs) > 2:
        bias = bias + np.asarray(constant_value(conv.inputs[2]), dtype=np.float32).reshape(-1)
        del conv.inputs[2]
    roles = ("affine.mul", "affine.add", "gain", "shift", "bare", "scaled")
    names = [net.fresh_name(f"{layer}.{role}") for role in roles]
    affine = Affine(layer, *names[:4])
    output = last.outputs[0]
    bare, scaled = (gs.Variable(name, np.float32, output.shape) for name in names[4:])
    last.outputs = [bare]
    gain = gs.Constant(affine.gain, np.ones(shape, dtype=np.float32))
    shift = gs.Constant(affine.shift, bias.reshape(shape))
    net.graph.nodes += [
        gs.Node("Mul", affine.mul, {}, [bare, gain], [scaled]),
        gs.Node("Add", affine.add, {}, [scaled, shift], [output]),
    ]
    return affine
