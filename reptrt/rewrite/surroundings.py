"""The nodes around a tensor whose biases can absorb a constant that is taken from the tensor.

The constant c is the same for all channels and positions. So the producer of the tensor can
subtract it in its bias, nodes that move values and averages pass it on, and the layers that consume
the tensor add what they then lack to their own biases.
"""

from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from reptrt.graph.flow import moves_values
from reptrt.graph.layers import dequantized_weight, has_bias
from reptrt.graph.net import Net, constant_value, is_private, producer
from reptrt.graph.splits import Split, read_splits
from reptrt.rewrite.borders import pads_of

_AVERAGES = ("AveragePool", "GlobalAveragePool", "ReduceMean")


@dataclass(frozen=True, slots=True)
class Readers:
    """The consumers of x' = x - c, and the nodes whose biases compensate for c."""

    layers: list[gs.Node] = field(default_factory=list)  # Conv or Gemm: in its own bias
    factors: list[tuple[gs.Node, gs.Node]] = field(default_factory=list)  # Mul, node with a bias
    skips: list[gs.Node] = field(default_factory=list)  # nodes with a bias, for residual Adds
    averages: list[gs.Node] = field(default_factory=list)

    def extend(self, other: "Readers") -> None:
        """Add the consumers of another tensor."""
        self.layers.extend(other.layers)
        self.factors.extend(other.factors)
        self.skips.extend(other.skips)
        self.averages.extend(other.averages)


class Surroundings:
    """Finds the nodes that can absorb a constant, in one net.

    Args:
        net: a float net or a Q/DQ net.
        quantized: inputs (node name, index) that are going to get a Q/DQ pair; empty for a net
            that has its pairs already.
    """

    def __init__(self, net: Net, quantized: set[tuple[str, int]]) -> None:
        self.graph = net.graph
        self._quantized = quantized
        self._by_part: dict[str, Split] = {}
        for split in read_splits(net):
            self._by_part |= dict.fromkeys((split.sum, split.side, split.main), split)

    def holder(self, tensor: gs.Tensor) -> gs.Node | str:
        """Return the node whose bias adds to this tensor only, or why there is none."""
        node = producer(tensor)
        if node is None:
            return f"{tensor.name} is made by the caller"
        if not is_private(self.graph, tensor):
            return f"{tensor.name}, before it, is read by others too"
        if node.op in ("Conv", "ConvTranspose", "Gemm"):
            return node if _takes_bias(node) else f"the bias of {node.name} is not a constant"
        if node.op != "Add":
            return f"{node.op} {node.name} takes no constant"
        if any(constant_value(operand) is not None for operand in node.inputs):
            return node
        inputs = [(i, t) for i, t in enumerate(node.inputs) if not self._is_quantized(node, i)]
        split = self._by_part.get(node.name)
        if split is not None:
            inputs.sort(key=lambda item: _made_by(item[1]) != split.main)
        answers = [self.holder(operand) for _, operand in inputs]
        holders = [answer for answer in answers if not isinstance(answer, str)]
        return holders[0] if holders else f"no summand of {node.name} has a bias of its own"

    def readers(self, tensor: gs.Tensor, *, fixed: bool = True) -> Readers | str:
        """Return the consumers of a tensor, behind nodes that move values.

        Args:
            tensor: the output of the ReLU, or of the DQ.
            fixed: refuse a padded layer whose height and width are not fixed.

        Returns:
            The consumers, or why one of them cannot make up for the constant.
        """
        if any(tensor is output for output in self.graph.outputs):
            return f"{tensor.name} is an output of the graph"
        readers = Readers()
        for node in dict.fromkeys(ByIdentity(node) for node in tensor.outputs):
            more = self._reader(node.node, tensor, fixed)
            if isinstance(more, str):
                return more
            readers.extend(more)
        return readers

    def sum_behind(self, layer: gs.Node) -> gs.Node:
        """Return the sum of a split layer if the layer feeds only that sum, else the layer."""
        split = self._by_part.get(layer.name)
        if split is None or layer.name == split.sum:
            return layer
        after = layer.outputs[0].outputs
        direct = is_private(self.graph, layer.outputs[0]) and after[0].name == split.sum
        return after[0] if direct else layer

    def _is_quantized(self, node: gs.Node, index: int) -> bool:
        return (node.name, index) in self._quantized

    def _reader(self, node: gs.Node, tensor: gs.Tensor, fixed: bool) -> Readers | str:
        at = [index for index, operand in enumerate(node.inputs) if operand is tensor]
        if len(at) > 1:
            return f"{node.op} {node.name} reads it twice"
        if node.op == "Pad" and node.attrs.get("mode", "constant") == "constant":
            return f"Pad {node.name} puts zeros beside it"
        if moves_values(node) and at == [0] and not any(t.outputs for t in node.outputs[1:]):
            return self.readers(node.outputs[0], fixed=fixed)
        if node.op in ("Conv", "Gemm") and at == [0]:
            reason = _layer_obstacle(node, fixed)
            return reason if reason is not None else Readers(layers=[node])
        if node.op in _AVERAGES and at == [0]:
            reason = _average_obstacle(node)
            return reason if reason is not None else Readers(averages=[node])
        split = self._by_part.get(node.name)
        if node.op == "Mul" and split is not None and split.side == node.name:
            holder = self._beside(node.outputs[0], split.sum)
            return holder if isinstance(holder, str) else Readers(factors=[(node, holder)])
        if node.op == "Add" and not any(constant_value(t) is not None for t in node.inputs):
            holder = self._other(node, at[0])
            return holder if isinstance(holder, str) else Readers(skips=[holder])
        return f"{node.op} {node.name} reads it"

    def _beside(self, tensor: gs.Tensor, sum_name: str) -> gs.Node | str:
        """Return the node whose bias absorbs the constant that a summand of a split layer lacks."""
        after = tensor.outputs[0] if is_private(self.graph, tensor) else None
        if after is None or after.name != sum_name:
            return f"{tensor.name} is not added right away"
        index = next(i for i, operand in enumerate(after.inputs) if operand is tensor)
        if self._is_quantized(after, index):
            return f"the summands of {sum_name} are INT8"
        return self._other(after, index)

    def _other(self, node: gs.Node, index: int) -> gs.Node | str:
        """Return the node whose bias adds to the other summand of an Add."""
        if self._is_quantized(node, 1 - index):
            return f"the other summand of {node.name} is INT8"
        return self.holder(node.inputs[1 - index])


@dataclass(frozen=True, slots=True)
class ByIdentity:
    """A node as a key: equal to itself only. Graph-surgeon compares nodes by content."""

    node: gs.Node

    def __hash__(self) -> int:
        return id(self.node)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByIdentity) and other.node is self.node


def _takes_bias(node: gs.Node) -> bool:
    """Whether a layer has a constant bias with one value per output channel, or none."""
    if not has_bias(node):
        return True
    bias = constant_value(node.inputs[2])
    if bias is None or float(node.attrs.get("beta", 1.0)) == 0.0:
        return False
    return bias.ndim < 2 or bias.shape[0] == 1


def _made_by(tensor: gs.Tensor) -> str | None:
    node = producer(tensor)
    return None if node is None else str(node.name)


def _layer_obstacle(node: gs.Node, fixed: bool) -> str | None:
    weight = dequantized_weight(node)
    if weight is None:
        return f"the weight of {node.name} is not a constant"
    if not _takes_bias(node):
        return f"the bias of {node.name} is not a constant"
    if node.op == "Gemm":
        return f"{node.name} transposes it" if node.attrs.get("transA", 0) else None
    if fixed and (pads_of(node) is None or (weight.ndim != 4 and any(pads_of(node) or ()))):
        return f"{node.name} pads it with zeros, and its height and width are not fixed"
    return None


def _average_obstacle(node: gs.Node) -> str | None:
    padded = any(node.attrs.get("pads") or ()) or node.attrs.get("ceil_mode", 0)
    if padded or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return f"{node.op} {node.name} pads it"
    return None
