"""Give activations behind a ReLU all 256 INT8 codes, with zero point 0.

With symmetric INT8, a tensor that is never negative uses only the codes 0 to 127. Here its Q/DQ
pair carries

    x' = x - c        c = 128 s        s = amax / 255        (c = s 2^(b-1) for b simulated bits)

and the nodes around the pair make up for c, exactly:

    producer  bias - c. The ReLU is removed: Q saturates at code -128, which is x = 0.
    Conv      bias + c sum_{i,t} W[o,i,t], with the weights as they are deployed. Padding writes
              x' = 0 where it should write -c, so c times the sum of the taps that fall outside is
              subtracted: a constant map (1, O, H, W), added behind the convolution, or behind the
              sum of a split layer.
    Gemm      bias + c sum_k W[o,k]
    d * x     of an identity split: d c is added to the bias of the convolution beside it
    skip      of a residual Add: c is added to the bias of the layer that makes the other summand
    MaxPool   and other nodes that move values pass c on
    average   pools without padding: c is added to their output

The pairs are those of a plan's activations with full range, which `reptrt.graph.qdq` writes with
UINT8 codes. Only the border map depends on shapes: height and width of its layer have to be fixed.

FP16 rounds scales. So that c and the sums of weights still fit each other then, `round_scales`
rounds the scales that enter into biases to FP16 beforehand, by at most 2^-11 of their value.

Requires: constant weights and biases. Ensures: outputs as before, to float rounding; INT8 codes
with zero point 0; all other tensors keep name and value.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from reptrt.core.arrays import Float64Array
from reptrt.core.errors import RewriteError
from reptrt.graph.layers import add_to_bias, dequantized_weight
from reptrt.graph.net import Net, producer, producer_of
from reptrt.graph.placement import Activation, Placement
from reptrt.graph.plan import QuantizedActivation, QuantizedWeight, QuantPlan
from reptrt.graph.qdq import Pair, inserted_pairs, update_qdq
from reptrt.graph.recentred import Recentred, read_recentred, record_recentred
from reptrt.rewrite.borders import output_size, outside_sums, pads_of
from reptrt.rewrite.contract import RewriteReport
from reptrt.rewrite.offsets import move_pair, offsets_of, total
from reptrt.rewrite.surroundings import ByIdentity, Readers, Surroundings

_HALF = np.finfo(np.float16)


@dataclass(frozen=True, slots=True)
class PaddedReader:
    """A convolution that would need a border map."""

    layer: str
    map_shape: tuple[int, int, int] | None  # (O, H, W); None: height and width are not fixed


def full_range_obstacle(net: Net, placement: Placement, tensor: str) -> str | None:
    """Return why a tensor cannot have full range, or None if it can.

    Args:
        net: the float net that ``placement`` was made for; not changed.
        placement: where pairs go.
        tensor: an activation of the placement.
    """
    reason = unsigned_obstacle(net, placement, tensor)
    if reason is not None:
        return reason
    activation = next(a for a in placement.activations if a.tensor == tensor)
    source = net.graph.tensors()[tensor]
    relu = producer_of(source)
    if not _only_pair_reads(net.graph, source, activation):
        return "it is read in float too"
    around = Surroundings(net, {reader for a in placement.activations for reader in a.readers})
    holder = around.holder(relu.inputs[0])
    if isinstance(holder, str):
        return holder
    readers = around.readers(source)
    return readers if isinstance(readers, str) else None


def unsigned_obstacle(net: Net, placement: Placement, tensor: str) -> str | None:
    """Return why a tensor cannot have UINT8 codes with zero point 0, or None if it can.

    Args:
        net: the float net that ``placement`` was made for; not changed.
        placement: where pairs go.
        tensor: an activation of the placement.
    """
    activation = next((a for a in placement.activations if a.tensor == tensor), None)
    if activation is None:
        return "it gets no Q/DQ pair"
    if any(a.group == activation.group and a is not activation for a in placement.activations):
        return "a Concat gives it the scale of other tensors"
    relu = producer(net.graph.tensors()[tensor])
    if relu is None or relu.op != "Relu":
        return f"it is made by {'the caller' if relu is None else relu.op}, not by a ReLU"
    return None


def padded_readers(net: Net, tensor: str) -> tuple[PaddedReader, ...]:
    """Return the convolutions that consume a tensor of a float net and pad it with zeros."""
    readers = Surroundings(net, set()).readers(net.graph.tensors()[tensor], fixed=False)
    if isinstance(readers, str):
        return ()
    padded = []
    for node in readers.layers:
        pads = pads_of(node)
        if pads is None:
            padded.append(PaddedReader(node.name, None))
        elif any(pads):
            channels = np.asarray(dequantized_weight(node)).shape[0]
            padded.append(PaddedReader(node.name, (channels, *output_size(node, pads))))
    return tuple(padded)


def round_scales(net: Net, plan: QuantPlan) -> QuantPlan:
    """Round the scales that enter into biases to FP16, where it holds them; return the new plan.

    These are the scales of activations with full range and of the weights that read them.

    Args:
        net: the Q/DQ net that the plan was written into; its scales change in place.
        plan: the scales so far.
    """
    scales: dict[str, float] = {}
    weights: dict[str, QuantizedWeight] = {}
    for shifted in _shifted_pairs(net, plan):
        scales[shifted.tensor] = float(_rounded(np.float32(shifted.activation.scale)))
        for layer in shifted.readers.layers:
            if (weight := plan.weights.get(layer.name)) is not None:
                weights[layer.name] = replace(weight, scale=_rounded(weight.scale))
    rounded = plan.with_scales(scales).with_weights(weights)
    update_qdq(net, rounded)
    return rounded


def recentre(net: Net, plan: QuantPlan) -> RewriteReport:
    """Give every activation with full range INT8 codes: its pair carries x - c, in place.

    Args:
        net: the Q/DQ net that the plan was written into, with FP32 scales.
        plan: the scales and codes that the net has now.

    Raises:
        RewriteError: something around such a pair cannot make up for c; the net is unchanged.
    """
    around = Surroundings(net, set())
    pairs = _shifted_pairs(net, plan)
    added = [_add_behind(net, around, pair) for pair in pairs]
    records = [pair.record(names) for pair, names in zip(pairs, added, strict=True)]
    nodes = {node.name: node for node in net.graph.nodes}
    deltas = total(offsets_of(nodes, record, record.offset) for record in records)
    for name, delta in deltas.items():
        add_to_bias(net, nodes[name], delta)
    for pair in pairs:
        clips = [] if pair.pair.clip is None else [pair.pair.clip]
        move_pair(net, pair.pair, clips, np.int8, -pair.offset)
        _remove_relu(pair.relu)
    net.graph.cleanup(remove_unused_graph_inputs=False).toposort()
    record_recentred(net, (*read_recentred(net), *records))
    return RewriteReport("recentre", tuple(pair.tensor for pair in pairs))


@dataclass(frozen=True, slots=True)
class _ShiftedPair:
    """One UINT8 pair, and the nodes around it that change with it."""

    tensor: str
    activation: QuantizedActivation
    pair: Pair
    relu: gs.Node
    producer: gs.Node  # takes -c into its bias
    readers: Readers

    @property
    def code(self) -> int:
        """The code of c, half the number of codes."""
        return (self.activation.grid.qmax + 1) // 2

    @property
    def offset(self) -> float:
        """The constant c."""
        return self.code * self.activation.scale

    def record(self, added: list[str]) -> Recentred:
        """Return the record of what recentring changes, with the names of the Adds it made."""
        return Recentred(
            tensor=self.tensor,
            offset=self.offset,
            code=self.code,
            quantize=self.pair.quantize.name,
            relu=self.relu.name,
            clips=() if self.pair.clip is None else (self.pair.clip.name,),
            producer=self.producer.name,
            layers=tuple(layer.name for layer in self.readers.layers),
            factors=tuple((mul.name, holder.name) for mul, holder in self.readers.factors),
            skips=tuple(holder.name for holder in self.readers.skips),
            added=tuple(added),
        )


def _shifted_pairs(net: Net, plan: QuantPlan) -> list[_ShiftedPair]:
    """Return the pairs with full range, in execution order."""
    around = Surroundings(net, set())
    position = {node.name: index for index, node in enumerate(net.graph.nodes)}
    pairs = [
        (tensor, pair)
        for tensor, pair in inserted_pairs(net, plan).items()
        if plan.activations[tensor].has_full_range
    ]
    pairs.sort(key=lambda item: position[item[1].quantize.name])
    return [_shifted_pair(around, name, plan.activations[name], pair) for name, pair in pairs]


def _shifted_pair(
    around: Surroundings, tensor: str, activation: QuantizedActivation, pair: Pair
) -> _ShiftedPair:
    relu = producer(pair.source)
    if relu is None or relu.op != "Relu" or len(pair.source.outputs) != 1:
        raise _refusal(tensor, "it is not the output of a ReLU that the pair alone reads")
    holder, readers = around.holder(relu.inputs[0]), Readers()
    if isinstance(holder, str):
        raise _refusal(tensor, holder)
    for node in pair.dequantizes:
        more = around.readers(node.outputs[0])
        if isinstance(more, str):
            raise _refusal(tensor, more)
        readers.extend(more)
    return _ShiftedPair(tensor, activation, pair, relu, holder, readers)


def _refusal(tensor: str, reason: str) -> RewriteError:
    return RewriteError(
        f"{tensor}: cannot have all 256 codes under zero point 0 ({reason}); quantize it "
        "symmetrically"
    )


def _rounded(scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return scales rounded to FP16; unchanged where one is outside its normal range."""
    if (scale >= _HALF.smallest_normal).all() and (scale <= _HALF.max).all():
        return scale.astype(np.float16).astype(np.float32)
    return scale


def _add_behind(net: Net, around: Surroundings, pair: _ShiftedPair) -> list[str]:
    """Add border maps behind layers, and c behind averages; return the names of the Adds."""
    values: dict[ByIdentity, Float64Array] = {}
    for layer in pair.readers.layers:
        border = outside_sums(layer)
        if border is not None and border.any():
            spot = ByIdentity(around.sum_behind(layer))
            values[spot] = values.get(spot, np.zeros(())) - pair.offset * border[None]
    for node in pair.readers.averages:
        values[ByIdentity(node)] = np.array(pair.offset)
    return [_append_add(net, spot.node, value) for spot, value in values.items()]


def _append_add(net: Net, node: gs.Node, value: Float64Array) -> str:
    """Add a constant behind a node; the Add's result gets the old name and consumers."""
    result = node.outputs[0]
    role = "border" if value.ndim else "offset"
    name = net.fresh_name(f"{node.name}.{role}")
    names = [net.fresh_name(f"{name}.{part}") for part in ("input", "value")]
    before = gs.Variable(names[0], result.dtype, result.shape)
    constant = gs.Constant(names[1], value.astype(np.float32))
    node.outputs[0] = before
    net.graph.nodes.append(gs.Node("Add", name, {}, [before, constant], [result]))
    return name


def _remove_relu(relu: gs.Node) -> None:
    """Let the one reader of a ReLU read its input."""
    (reader,) = relu.outputs[0].outputs
    reader.inputs[0] = relu.inputs[0]
    relu.inputs.clear()
    relu.outputs.clear()


def _only_pair_reads(graph: gs.Graph, tensor: gs.Tensor, activation: Activation) -> bool:
    readers = {
        (node.name, index)
        for node in tensor.outputs
        for index, operand in enumerate(node.inputs)
        if operand is tensor
    }
    is_output = any(tensor is output for output in graph.outputs)
    return readers == set(activation.readers) and not is_output
