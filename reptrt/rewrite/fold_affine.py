"""Fold the affine (QPRep) of every layer into the layer: exact, and free in the deployed graph.

    gain[c] * conv(x, scale[c] codes) + shift[c]
        = conv(x, (|gain[c]| scale[c]) (sign(gain[c]) codes)) + shift[c] + gain[c] bias[c]

A quantized weight keeps its codes, but for the sign; a scale derived anew from the folded float
weight would discard learned rounding. A float weight, and the diagonal of an identity split, is
multiplied. A channel whose gain is 0 gets codes 0.

Requires: affines that `insert_affine` made. Ensures: no affine is left; every layer's output tensor
keeps its name and, to float rounding, its value.
"""

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from reptrt.core.grid import along_axis
from reptrt.graph.affines import Affine, read_affines, record_affines
from reptrt.graph.net import Net, constant_of, constant_value, maker_of
from reptrt.graph.splits import Split, read_splits
from reptrt.rewrite.contract import RewriteReport

FloatArray = npt.NDArray[np.float32]


def fold_affine(net: Net) -> RewriteReport:
    """Fold all affines of a net, in place."""
    affines = read_affines(net)
    nodes = {node.name: node for node in net.graph.nodes}
    splits = {split.layer: split for split in read_splits(net)}
    for affine in affines:
        _fold(net, nodes, affine, splits.get(affine.layer))
    record_affines(net, ())
    net.graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return RewriteReport("fold_affine", tuple(affine.layer for affine in affines))


def _fold(net: Net, nodes: dict[str, gs.Node], affine: Affine, split: Split | None) -> None:
    mul, add = nodes[affine.mul], nodes[affine.add]
    gain = np.asarray(constant_of(mul.inputs[1]), dtype=np.float32).reshape(-1)
    shift = np.asarray(constant_of(add.inputs[1]), dtype=np.float32).reshape(-1)
    last = maker_of(mul.inputs[0])
    conv = nodes[split.main] if split else last
    if split is not None and last.name == split.sum:
        _scale_side(net, nodes[split.side], gain, affine.layer)
    _scale_weight(net, conv, gain, affine.layer)
    if len(conv.inputs) > 2:
        bias = np.asarray(constant_of(conv.inputs[2]), dtype=np.float32).reshape(-1)
        shift = shift + gain * bias
        del conv.inputs[2]
    conv.inputs.append(gs.Constant(net.fresh_name(f"{affine.layer}.bias"), shift))
    last.outputs = [add.outputs[0]]
    mul.outputs, add.outputs = [], []


def _scale_side(net: Net, side: gs.Node, gain: FloatArray, layer: str) -> None:
    if side.op != "Mul":
        _scale_weight(net, side, gain, f"{layer}.side")
        return
    index = next(i for i, tensor in enumerate(side.inputs) if constant_value(tensor) is not None)
    factor = np.asarray(constant_of(side.inputs[index]), dtype=np.float32)
    scaled = factor * gain.reshape(1, -1, 1, 1)
    side.inputs[index] = gs.Constant(net.fresh_name(f"{layer}.diagonal.folded"), scaled)


def _scale_weight(net: Net, node: gs.Node, gain: FloatArray, prefix: str) -> None:
    axis = 1 if node.op == "Gemm" and not node.attrs.get("transB", 0) else 0
    weight = constant_value(node.inputs[1])
    if weight is not None:
        folded = (weight * along_axis(gain, weight.ndim, axis)).astype(weight.dtype)
        node.inputs[1] = gs.Constant(net.fresh_name(f"{prefix}.folded"), folded)
        return
    dequantize = maker_of(node.inputs[1])
    codes = np.asarray(constant_of(dequantize.inputs[0]))
    scale = np.asarray(constant_of(dequantize.inputs[1]), dtype=np.float32)
    sign = along_axis(np.sign(gain), codes.ndim, axis).astype(codes.dtype)
    folded_scale = np.where(gain == 0, scale, np.abs(gain) * scale).astype(np.float32)
    zero_point = np.zeros(folded_scale.shape, dtype=codes.dtype)
    constants = {"codes": codes * sign, "scale": folded_scale, "zero_point": zero_point}
    for index, (role, value) in enumerate(constants.items()):
        name = net.fresh_name(f"{prefix}.folded.{role}")
        dequantize.inputs[index] = gs.Constant(name, value)
