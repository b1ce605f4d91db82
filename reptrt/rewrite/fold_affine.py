"""Fold the affine (QPRep) of every layer into the layer: exact, and free in the deployed graph.

    gain[c] * conv(x, scale[c] codes) + shift[c]
        = conv(x, (|gain[c]| scale[c]) (sign(gain[c]) codes)) + shift[c] + gain[c] bias[c]

A quantized weight keeps its codes, apart from the sign: quantizing the folded float weight anew
would discard learned rounding. A float weight is multiplied, and so is the diagonal of an identity
split. A channel whose gain is 0 gets codes 0.

Requires: affines that `insert_affine` made. Ensures: no affine is left; the output tensor of every
layer keeps its name and, to float rounding, its value.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from reptrt.core.arrays import Float32Array
from reptrt.core.grid import along_axis
from reptrt.graph.affines import Affine, read_affines, record_affines
from reptrt.graph.layers import output_axis
from reptrt.graph.net import Net, constant_of, constant_value, producer_of
from reptrt.graph.plan import QuantizedWeight, QuantPlan
from reptrt.graph.splits import Split, read_splits
from reptrt.rewrite.contract import RewriteReport


def fold_affine(net: Net, plan: QuantPlan) -> tuple[RewriteReport, QuantPlan]:
    """Fold all affines of a Q/DQ net, in place; return the plan with the folded weights too.

    Args:
        net: the Q/DQ net that the plan was written into, with affines.
        plan: the codes and scales that the net has now.
    """
    affines = read_affines(net)
    splits = {split.layer: split for split in read_splits(net)}
    folding = _Folding(net, plan)
    for affine in affines:
        folding.fold(affine, splits.get(affine.layer))
    record_affines(net, ())
    net.graph.cleanup(remove_unused_graph_inputs=False).toposort()
    report = RewriteReport("fold_affine", tuple(affine.layer for affine in affines))
    return report, plan.with_weights(folding.weights)


class _Folding:
    """Folds affines one by one and collects the weights that change."""

    def __init__(self, net: Net, plan: QuantPlan) -> None:
        self.weights: dict[str, QuantizedWeight] = {}
        self._net, self._plan = net, plan
        self._nodes = {node.name: node for node in net.graph.nodes}

    def fold(self, affine: Affine, split: Split | None) -> None:
        """Fold the affine of a layer, which may be split."""
        mul, add = self._nodes[affine.mul], self._nodes[affine.add]
        gain = np.asarray(constant_of(mul.inputs[1]), dtype=np.float32).reshape(-1)
        shift = np.asarray(constant_of(add.inputs[1]), dtype=np.float32).reshape(-1)
        last = producer_of(mul.inputs[0])
        layer = self._nodes[split.main] if split else last
        if split is not None and last.name == split.sum:
            self._scale_side(self._nodes[split.side], gain, affine.layer)
        self._scale_weight(layer, gain, affine.layer)
        if len(layer.inputs) > 2:
            bias = np.asarray(constant_of(layer.inputs[2]), dtype=np.float32).reshape(-1)
            shift = shift + gain * bias
            del layer.inputs[2]
        layer.inputs.append(self._constant(f"{affine.layer}.bias", shift))
        last.outputs = [add.outputs[0]]
        mul.outputs, add.outputs = [], []

    def _scale_side(self, side: gs.Node, gain: Float32Array, layer: str) -> None:
        if side.op != "Mul":
            self._scale_weight(side, gain, f"{layer}.side")
            return
        index = next(i for i, t in enumerate(side.inputs) if constant_value(t) is not None)
        factor = np.asarray(constant_of(side.inputs[index]), dtype=np.float32)
        scaled = factor * gain.reshape(1, -1, 1, 1)
        side.inputs[index] = self._constant(f"{layer}.diagonal.folded", scaled)

    def _scale_weight(self, node: gs.Node, gain: Float32Array, prefix: str) -> None:
        weight = self._plan.weights.get(node.name)
        if weight is None:
            values = constant_of(node.inputs[1])
            factor = along_axis(gain, values.ndim, output_axis(node))
            folded = (values * factor).astype(values.dtype)
            node.inputs[1] = self._constant(f"{prefix}.folded", folded)
            return
        scaled = _scaled(weight, gain)
        self.weights[node.name] = scaled
        zero_point = np.zeros(scaled.scale.shape, dtype=scaled.codes.dtype)
        producer_of(node.inputs[1]).inputs = [
            self._constant(f"{prefix}.folded.codes", scaled.codes),
            self._constant(f"{prefix}.folded.scale", scaled.scale),
            self._constant(f"{prefix}.folded.zero_point", zero_point),
        ]

    def _constant(self, name: str, value: npt.NDArray[np.generic]) -> gs.Constant:
        return gs.Constant(self._net.fresh_name(name), value)


def _scaled(weight: QuantizedWeight, gain: Float32Array) -> QuantizedWeight:
    """Return a quantized weight times one factor per output channel."""
    sign = along_axis(np.sign(gain), weight.codes.ndim, weight.axis).astype(weight.codes.dtype)
    scale = np.where(gain == 0, weight.scale, np.abs(gain) * weight.scale).astype(np.float32)
    return replace(weight, codes=weight.codes * sign, scale=scale)
