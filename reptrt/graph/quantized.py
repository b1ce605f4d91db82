"""What a Q/DQ graph computes with: scales of activations, codes and scales of weights.

Any tool's file will do: INT8 codes with a DequantizeLinear, or float weights with a pair. A float
graph gives float weights.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from reptrt.graph.net import WEIGHTED_OPS, Net, constant_value, producer
from reptrt.graph.qdq import is_simulation
from reptrt.graph.queries import base, dequantize_before, given, is_quantize, value_of
from reptrt.graph.recentred import read_recentred

AnyArray = npt.NDArray[Any]
Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeight:
    """The weight of one layer."""

    values: AnyArray  # integer codes, or floats
    scale: Float64Array | None  # scalar or (channels,); None: floats that nobody quantizes
    axis: int  # of the channels
    bias: Float64Array | None

    @property
    def form(self) -> str:
        """Type and shape of the values: ``int8 64x64x3x3``."""
        return f"{self.values.dtype} {'x'.join(map(str, self.values.shape))}"

    def dequantized(self) -> Float64Array:
        """Return codes * scale; floats as they are. Zero points are taken to be 0."""
        values = np.asarray(self.values, dtype=np.float64)
        if self.scale is None or self.values.dtype.kind not in "iu":
            return values
        shape = [1] * values.ndim
        if self.scale.size > 1:
            shape[self.axis] = -1
        return values * self.scale.reshape(shape)


def activation_scales(net: Net) -> dict[str, Float64Array]:
    """Return tensor name -> scale, for every quantized activation whose scale is a constant."""
    found = {}
    recentred = {one.quantize: one.tensor for one in read_recentred(net)}  # their ReLU is gone
    for node in net.graph.nodes:
        if not is_quantize(node) or value_of(node.inputs[0]) is not None:
            continue
        scale = value_of(node.inputs[1])
        if scale is not None:
            name = recentred.get(node.name) or quantized_tensor(node).name
            found[name] = np.asarray(scale, dtype=np.float64)
    return found


def layer_weights(net: Net) -> dict[str, LayerWeight]:
    """Return layer name -> weight, for every layer with a constant one."""
    found = {}
    for node in net.graph.nodes:
        if node.op not in WEIGHTED_OPS:
            continue
        weight = _weight(node)
        if weight is not None:
            found[node.name] = weight
    return found


def quantized_tensor(quantize: gs.Node) -> gs.Tensor:
    """Return the tensor that a QuantizeLinear reads, before casts and the Clip of a simulation."""
    tensor = base(quantize.inputs[0])
    clip = producer(tensor)
    if clip is not None and is_simulation(clip):
        return base(clip.inputs[0])
    return tensor


def _weight(node: gs.Node) -> LayerWeight | None:
    bias = given(node, 2)
    bias_values = None if bias is None else constant_value(bias)
    known = None if bias_values is None else np.asarray(bias_values, dtype=np.float64)
    dequantize = dequantize_before(node.inputs[1])
    if dequantize is None:
        values = value_of(node.inputs[1])
        return None if values is None else LayerWeight(np.asarray(values), None, 0, known)
    scale, values = value_of(dequantize.inputs[1]), value_of(dequantize.inputs[0])
    quantize = producer(base(dequantize.inputs[0]))
    if values is None and quantize is not None and is_quantize(quantize):
        values = value_of(quantize.inputs[0])
    if values is None or scale is None:
        return None
    axis = int(dequantize.attrs.get("axis", 1))
    return LayerWeight(np.asarray(values), np.asarray(scale, dtype=np.float64), axis, known)
