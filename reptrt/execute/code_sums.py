"""Let layers sum integer codes in float operators: the results of an INT8 kernel, to the bit.

    DQ(x), DQ(W), b -> y        becomes        y = s_x s_W[o] (sum_k q_W[o,k] (q_x[k] - z)) + b[o]

A bias that is a multiple of s_x s_W (`reptrt.rewrite.round_biases`) is added to the sum as a code.

Where a Q with scale s_y follows, an INT8 kernel computes both in one step: Q gets scale 1 and

    y = s_x s_W[o] / s_y (sum_k q_W[o,k] (q_x[k] - z) + b_q[o]),   b_q = round(b / (s_x s_W))

Every product and every sum of codes is an integer. Float32 represents integers below 2^24 exactly,
so the order of summation, which differs between runtimes and batch sizes, does not matter. The
remaining product and sum of two float32 numbers are defined by IEEE 754. Ours.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from reptrt.core.arrays import AnyArray, Float64Array
from reptrt.core.grid import Grid, along_axis
from reptrt.graph.layers import output_axis
from reptrt.graph.net import constant_of, constant_value, producer
from reptrt.graph.queries import given, is_dequantize, quantization_of

SUMS = ".int8_sums"  # suffix of the name of a layer's sums
_EXACT = 2**24  # integers up to here are float32 numbers
_FLOAT_ROUNDING = 1 / 8  # of a step: a bias this near to a code was rounded to it
_PLAIN_GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0}


@dataclass(frozen=True, slots=True)
class _Codes:
    """The codes that a DequantizeLinear reads."""

    tensor: gs.Tensor
    scale: npt.NDArray[np.float32]  # one value, or one per index of ``axis``
    axis: int
    zero_point: gs.Tensor | None
    grid: Grid  # codes less zero point


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """A Conv or Gemm of two dequantized operands."""

    x: _Codes
    weight: AnyArray  # codes
    axis: int  # of its output channels
    step: npt.NDArray[np.float32]  # s_x s_W, (O,)
    bias_codes: Float64Array  # to be added to the sum, (O,)
    bias: Float64Array  # to be added to the scaled sum, (O,)
    quantize: gs.Node | None  # the Q that follows

    @property
    def is_exact(self) -> bool:
        """Whether no partial sum, in any order, can exceed 2^24."""
        rows = np.moveaxis(self.weight, self.axis, 0).reshape(len(self.step), -1)
        low, high = rows * float(self.x.grid.qmin), rows * float(self.x.grid.qmax)
        above = np.maximum(low, high).sum(axis=1) + np.maximum(self.bias_codes, 0)
        below = np.minimum(low, high).sum(axis=1) + np.minimum(self.bias_codes, 0)
        return bool(max(above.max(), -below.min()) < _EXACT)


def sum_codes(graph: gs.Graph, node: gs.Node) -> bool:
    """Rewrite a Conv or Gemm so that it sums codes; return whether it was rewritten.

    The node is not changed if an operand is not dequantized, or if a sum could exceed 2^24.

    Args:
        graph: the graph of ``node``.
        node: any node.
    """
    layer = _layer(graph, node)
    if layer is None or not layer.is_exact:
        return False
    name, step, (result,) = node.name or node.outputs[0].name, layer.step, node.outputs
    unit = gs.Constant(f"{name}{SUMS}.one", np.array(1, np.float32))
    if layer.quantize is not None:
        step = (step / constant_of(layer.quantize.inputs[1]).reshape(())).astype(np.float32)
        layer.quantize.inputs = [result, unit, *layer.quantize.inputs[2:]]
    codes = gs.Variable(f"{name}{SUMS}.codes", dtype=np.float32)
    zero_points = [] if layer.x.zero_point is None else [layer.x.zero_point]
    operands = [layer.x.tensor, unit, *zero_points]
    graph.nodes.append(gs.Node("DequantizeLinear", codes.name, {}, operands, [codes]))
    node.inputs = [
        codes,
        gs.Constant(f"{name}{SUMS}.weight", layer.weight.astype(np.float32)),
        gs.Constant(f"{name}{SUMS}.bias", layer.bias_codes.astype(np.float32)),
    ]
    last = _append(graph, node, "Mul", f"{name}{SUMS}", step)
    if layer.bias.any():
        last = _append(graph, last, "Add", f"{name}{SUMS}.scaled", layer.bias)
    return True


def _append(graph: gs.Graph, node: gs.Node, op: str, before: str, values: AnyArray) -> gs.Node:
    """Insert an operator with one value per channel behind a node; return the operator."""
    (result,) = node.outputs
    source = gs.Variable(before, dtype=np.float32, shape=result.shape)
    node.outputs = [source]
    rank = node.inputs[1].values.ndim
    constant = gs.Constant(f"{before}.{op}", along_axis(values, rank, 1))
    made = gs.Node(op, f"{before}.{op}", {}, [source, constant], [result])
    graph.nodes.append(made)
    return made


def quantize_behind(graph: gs.Graph, node: gs.Node) -> gs.Node | None:
    """Return the per-tensor Q that is the only consumer of a node's output; else None."""
    (result,) = node.outputs
    if len(result.outputs) != 1 or any(result is output for output in graph.outputs):
        return None
    (reader,) = result.outputs
    scale = constant_value(reader.inputs[1]) if reader.op == "QuantizeLinear" else None
    return reader if scale is not None and scale.size == 1 else None


def _codes(tensor: gs.Tensor) -> _Codes | None:
    """Return the codes behind a dequantized tensor with one zero point; else None."""
    node = producer(tensor)
    parameters = None if node is None or not is_dequantize(node) else quantization_of(node)
    if node is None or parameters is None or parameters.grid is None:
        return None
    if parameters.scale.dtype != np.float32 or not (parameters.scale > 0).all():
        return None
    return _Codes(
        tensor=node.inputs[0],
        scale=parameters.scale.reshape(()) if parameters.scale.size == 1 else parameters.scale,
        axis=parameters.axis,
        zero_point=given(node, 2),
        grid=parameters.grid,
    )


def _layer(graph: gs.Graph, node: gs.Node) -> _Layer | None:
    """Return the operands of a layer; None if it cannot sum codes."""
    if node.op not in ("Conv", "Gemm") or any(
        node.attrs.get(name, value) != value for name, value in _PLAIN_GEMM.items()
    ):
        return None
    x, w = (_codes(tensor) for tensor in node.inputs[:2])
    weight = None if w is None else constant_value(w.tensor)
    if x is None or w is None or weight is None or x.scale.size != 1:
        return None
    if weight.dtype != np.int8 or w.grid != Grid.activation(8):
        return None
    axis = output_axis(node)
    if w.scale.size != 1 and w.axis != axis:
        return None
    step = np.broadcast_to(x.scale * w.scale, weight.shape[axis]).astype(np.float32)
    quantize = quantize_behind(graph, node)
    biases = _biases(node, step, in_codes=quantize is not None) if (step > 0).all() else None
    return None if biases is None else _Layer(x, weight, axis, step, *biases, quantize)


def _biases(
    node: gs.Node, step: npt.NDArray[np.float32], *, in_codes: bool
) -> tuple[Float64Array, Float64Array] | None:
    """Return the bias in two parts: to add to the sum of codes, and to the scaled sum; each (O,).

    None: the bias is computed.

    Args:
        node: the layer.
        step: s_x s_W, (O,).
        in_codes: round the bias to codes.
    """
    zeros = np.zeros(len(step))
    if len(node.inputs) < 3 or not node.inputs[2].name:
        return zeros, zeros
    tensor, maker = node.inputs[2], producer(node.inputs[2])
    has_codes = maker is not None and maker.op == "DequantizeLinear"
    values = constant_value(maker.inputs[0] if maker is not None and has_codes else tensor)
    if values is None or values.shape != step.shape:
        return None
    bias = values.astype(np.float64)
    if has_codes:
        return bias, zeros
    codes = np.rint(bias / step)
    is_code = np.abs(bias / step - codes).max() <= _FLOAT_ROUNDING
    return (codes, zeros) if in_codes or is_code else (zeros, bias)
