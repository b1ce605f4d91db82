"""What `reptrt.rewrite.to_fp16` leaves in FP32: what FP16 cannot hold, and the decoding of boxes.

1. Scales outside FP16's normal range [6.1e-5, 65504] and constants beyond 65504 stay in FP32,
   together with their layer, so that the layer still fuses into one INT8 kernel.
2. Behind the raw heads of a detector (`reptrt.graph.heads`) everything stays in FP32: FP16 holds
   pixels above 512 to half a pixel only, which moves the sides of small boxes.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from reptrt.graph.heads import decoding_of
from reptrt.graph.net import WEIGHTED_OPS, Net, is_private, producer
from reptrt.graph.queries import is_dequantize, is_quantize

_SMALLEST = float(np.finfo(np.float16).smallest_normal)  # 6.1e-5
_LARGEST = float(np.finfo(np.float16).max)  # 65504
DECODES = "it computes boxes: FP16 holds pixels above 512 to half a pixel only"
_POINTWISE = ("Relu", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "HardSwish", "HardSigmoid", "Tanh")


class Scales:
    """The scales that a graph will have: rounded to FP16 where it can hold them.

    Attributes:
        values: name of a constant -> its values.
        unfit: name of a constant -> why FP16 cannot hold it.
    """

    def __init__(self) -> None:
        self.values: dict[str, npt.NDArray[np.float32]] = {}
        self.unfit: dict[str, str] = {}

    def add(self, constant: gs.Constant) -> None:
        """Add a constant."""
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


def scales_of(graph: gs.Graph) -> Scales:
    """Return the scales of all pairs of a graph."""
    scales = Scales()
    for node in graph.nodes:
        if is_pair(node) and is_float_constant(node.inputs[1]):
            scales.add(node.inputs[1])
    return scales


def reasons_to_stay(net: Net, scales: Scales) -> dict[str, str]:
    """Return the nodes that stay in FP32 for their own sake: name -> reason.

    Args:
        net: with the type of every tensor.
        scales: of its pairs.
    """
    decoding = {name: DECODES for name in sorted(decoding_of(net))}
    return {**decoding, **_unfit(net.graph, scales)}


def _unfit(graph: gs.Graph, scales: Scales) -> dict[str, str]:
    """Return the nodes with constants that FP16 cannot hold: name -> reason."""
    reasons: dict[str, str] = {}
    for node in graph.nodes:
        if is_pair(node):
            if node.inputs[1].name in scales.unfit:
                reasons[node.name] = scales.unfit[node.inputs[1].name]
            continue
        for tensor in node.inputs:
            if node.op != "Clip" and is_float_constant(tensor):  # a bound may become infinite
                value = np.abs(tensor.values)
                largest = float(np.max(value, where=np.isfinite(value), initial=0.0))
                if largest > _LARGEST:
                    reasons[node.name] = (
                        f"{tensor.name} holds {largest:.3g}, beyond FP16's {_LARGEST:.0f}"
                    )
    return reasons


def with_neighbours(graph: gs.Graph, scales: Scales, kept: set[str]) -> set[str]:
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
            maker.name in kept and not is_pair(maker) and is_private(graph, tensor)
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


def is_pair(node: gs.Node) -> bool:
    """Whether a node is a QuantizeLinear or a DequantizeLinear."""
    return is_quantize(node) or is_dequantize(node)


def is_float_constant(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a constant of type FP32."""
    return isinstance(tensor, gs.Constant) and tensor.dtype == np.float32
