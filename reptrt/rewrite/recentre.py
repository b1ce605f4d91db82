"""Give activations behind a ReLU all 256 codes under zero point 0.

Symmetric INT8 uses codes 0 to 127 of a tensor that is never negative. Here the pair carries

    x' = x - c        c = 128 s        s = amax / 255        (s 2^(b-1) for b simulated bits)

and everything around it makes up for c, exactly:

    maker    bias - c; the ReLU goes: the saturation of Q at code -128 is x = 0
    Conv     bias + c sum_{i,t} W[o,i,t], of the weights as they are deployed; with padding, where
             zeros stand for x' and should be -c, minus c times the sum of the taps that fall
             outside: a constant map (1, O, H, W), added behind the convolution or behind the sum
             of a split layer
    Gemm     bias + c sum_k W[o,k]
    d * x    of an identity split: d c goes into the bias of the convolution beside it
    skip     of a residual Add: c goes into the bias of the layer that makes the other summand
    MaxPool  and what else moves values: hands c on
    average  pools without padding: c is added to the result

It starts from UINT8 pairs with zero point 0, which `reptrt.graph.qdq` writes for ``full_range``.
The map needs the height and width of its layer to be fixed, nothing else depends on shapes.

FP16 rounds scales: then c and the sums of weights would no longer fit each other. So the scales
that enter here are rounded to FP16 first, which moves them by 2^-11 of themselves at most.

Requires: constant weights and biases. Ensures: outputs as before to float rounding (and that of
scales), INT8 with zero point 0, tensors other than those named keep name and value.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from reptrt.core.errors import RewriteError
from reptrt.graph.net import Net, constant_value, is_private, producer
from reptrt.graph.placement import Activation, Placement
from reptrt.graph.recentred import (
    Recentred,
    add_to_bias,
    dequantized_weight,
    move_bounds,
    offsets_of,
    record_recentred,
    set_codes,
)
from reptrt.rewrite.borders import output_size, outside_sums, pads_of
from reptrt.rewrite.contract import RewriteReport
from reptrt.rewrite.surroundings import ByIdentity, Readers, Surroundings

Float64Array = npt.NDArray[np.float64]

_HALF = np.finfo(np.float16)


@dataclass(frozen=True, slots=True)
class PaddedReader:
    """A convolution that would need a map of its border."""

    layer: str
    map_shape: tuple[int, int, int] | None  # (O, H, W) of the map; None: not fixed in the graph


def full_range_obstacle(net: Net, placement: Placement, tensor: str) -> str | None:
    """Return why a tensor cannot have full range, or None if it can.

    Args:
        net: the float net that ``placement`` was made for, splits done; not changed.
        placement: where pairs go.
        tensor: an activation of the placement.
    """
    activation = next((a for a in placement.activations if a.tensor == tensor), None)
    if activation is None:
        return "it gets no Q/DQ pair"
    if any(a.group == activation.group and a is not activation for a in placement.activations):
        return "a Concat gives it the scale of other tensors"
    source = net.graph.tensors()[tensor]
    relu = producer(source)
    if relu is None or relu.op != "Relu":
        return f"it is made by {'the caller' if relu is None else relu.op}, not by a ReLU"
    if not _only_pair_reads(net.graph, source, activation):
        return "it is read in float too"
    around = Surroundings(net, {reader for a in placement.activations for reader in a.readers})
    holder = around.holder(relu.inputs[0])
    if isinstance(holder, str):
        return holder
    readers = around.readers(source)
    return readers if isinstance(readers, str) else None


def padded_readers(net: Net, tensor: str) -> tuple[PaddedReader, ...]:
    """Return the convolutions that read a tensor of a float net and pad it with zeros."""
    readers = Surroundings(net, set()).readers(net.graph.tensors()[tensor], fixed=False)
    if isinstance(readers, str):
        return ()
    found = []
    for node in readers.layers:
        pads = pads_of(node)
        if pads is None:
            found.append(PaddedReader(node.name, None))
        elif any(pads):
            channels = np.asarray(dequantized_weight(node)).shape[0]
            found.append(PaddedReader(node.name, (channels, *output_size(node, pads))))
    return tuple(found)


def round_scales(net: Net) -> None:
    """Round the scales that `recentre` would round, in place: of UINT8 pairs and their readers."""
    around = Surroundings(net, set())
    for pair in [pair for node in net.graph.nodes if (pair := _pair(around, node)) is not None]:
        _round_scales(pair)


def recentre(net: Net, *, fp16_scales: bool = True) -> RewriteReport:
    """Turn every UINT8 pair with zero point 0 into an INT8 one that carries x - c, in place.

    Args:
        net: a Q/DQ net with FP32 scales.
        fp16_scales: round the scales that enter into biases to FP16 first.

    Raises:
        RewriteError: something around such a pair cannot make up for c; the net is unchanged.
    """
    around = Surroundings(net, set())
    pairs = [pair for node in net.graph.nodes if (pair := _pair(around, node)) is not None]
    if fp16_scales:
        for pair in pairs:
            _round_scales(pair)
    nodes = {node.name: node for node in net.graph.nodes}
    added = {pair.tensor: _add_behind(net, around, pair) for pair in pairs}
    records = [_record(pair, added[pair.tensor]) for pair in pairs]
    deltas: dict[str, Float64Array] = {}
    for one in records:
        for name, delta in offsets_of(nodes, one, one.offset).items():
            deltas[name] = deltas.get(name, np.zeros(())) + delta
    for name, delta in deltas.items():
        add_to_bias(net, nodes[name], delta)
    for pair in pairs:
        _shift_pair(net, pair)
    net.graph.cleanup(remove_unused_graph_inputs=False).toposort()
    record_recentred(net, records)
    return RewriteReport("recentre", tuple(pair.tensor for pair in pairs))


@dataclass(frozen=True, slots=True)
class _Pair:
    """One UINT8 pair and all that is to change."""

    tensor: str
    quantize: gs.Node
    dequantizes: list[gs.Node]
    code: int  # that stands for 0 in the end, times -1
    relu: gs.Node | None
    clips: list[gs.Node]
    producer: gs.Node
    readers: Readers

    @property
    def scale(self) -> float:
        return float(np.asarray(constant_value(self.quantize.inputs[1])).reshape(()))

    @property
    def offset(self) -> float:
        return self.code * self.scale


def _pair(around: Surroundings, quantize: gs.Node) -> _Pair | None:
    """Return the pair of a QuantizeLinear with UINT8 codes and zero point 0, else None."""
    if quantize.op != "QuantizeLinear" or not _is_unsigned(quantize):
        return None
    tensor, highest = quantize.inputs[0], np.inf
    clips: list[gs.Node] = []
    relu: gs.Node | None = None
    name = tensor.name
    while (node := producer(tensor)) is not None and node.op in ("Relu", "Clip"):
        if not is_private(around.graph, tensor):
            raise _refusal(name, f"{tensor.name} is read in float too")
        if node.op == "Relu":
            relu, name = node, tensor.name
        else:
            low, high = _bounds(node)
            if low != 0.0:
                raise _refusal(name, f"Clip {node.name} begins at {low}, not at 0")
            clips, highest = [*clips, node], min(highest, high)
        tensor = node.inputs[0]
    holder, readers = around.holder(tensor), Readers()
    dequantizes = list(quantize.outputs[0].outputs)
    if isinstance(holder, str):
        raise _refusal(name, holder)
    for node in dequantizes:
        found = around.readers(node.outputs[0]) if _is_unsigned(node) else f"{node.op} reads codes"
        if isinstance(found, str):
            raise _refusal(name, found)
        readers.extend(found)
    scale = np.asarray(constant_value(quantize.inputs[1]))
    code = 1 << (int(min(255.0, np.rint(highest / float(scale)))).bit_length() - 1)
    return _Pair(name, quantize, dequantizes, code, relu, clips, holder, readers)


def _refusal(tensor: str, reason: str) -> RewriteError:
    return RewriteError(
        f"{tensor}: cannot have all 256 codes under zero point 0 ({reason}); quantize it "
        "symmetrically"
    )


def _round_scales(pair: _Pair) -> None:
    """Round the scale of a pair, and of the weights that read it, to FP16 where it holds them."""
    weights = [producer(layer.inputs[1]) for layer in pair.readers.layers]
    for node in (pair.quantize, *pair.dequantizes, *weights):
        scale = node.inputs[1] if node is not None and node.op == "DequantizeLinear" else None
        if scale is None or not isinstance(scale, gs.Constant):
            continue
        before = np.asarray(scale.values)
        if (before >= _HALF.smallest_normal).all() and (before <= _HALF.max).all():
            scale.values = before.astype(np.float16).astype(np.float32)
        if scale is pair.dequantizes[0].inputs[1]:
            pair.quantize.inputs[1] = scale


def _add_behind(net: Net, around: Surroundings, pair: _Pair) -> list[str]:
    """Add maps of borders behind layers, and c behind averages; return the names of the Adds."""
    values: dict[ByIdentity, Float64Array] = {}
    for layer in pair.readers.layers:
        border = outside_sums(layer)
        if border is not None and border.any():
            spot = ByIdentity(around.sum_behind(layer))
            values[spot] = values.get(spot, np.zeros(())) - pair.offset * border[None]
    for node in pair.readers.averages:
        values[ByIdentity(node)] = np.array(pair.offset)
    added = []
    for spot, value in values.items():
        added.append(_append_add(net, spot.node, value))
    return added


def _append_add(net: Net, node: gs.Node, value: Float64Array) -> str:
    """Add a constant behind a node; the result takes over the name and the readers."""
    result = node.outputs[0]
    role = "border" if value.ndim else "offset"
    name = net.fresh_name(f"{node.name}.{role}")
    names = [net.fresh_name(f"{name}.{part}") for part in ("input", "value")]
    before = gs.Variable(names[0], result.dtype, result.shape)
    constant = gs.Constant(names[1], value.astype(np.float32))
    node.outputs[0] = before
    net.graph.nodes.append(gs.Node("Add", name, {}, [before, constant], [result]))
    return name


def _shift_pair(net: Net, pair: _Pair) -> None:
    set_codes(net, [pair.quantize, *pair.dequantizes], np.int8)
    for clip in pair.clips:
        move_bounds(net, clip, -pair.offset)
    if pair.relu is not None:
        result, source = pair.relu.outputs[0], pair.relu.inputs[0]
        reader = result.outputs[0]
        reader.inputs[0] = source
        pair.relu.inputs.clear()
        pair.relu.outputs.clear()


def _record(pair: _Pair, added: list[str]) -> Recentred:
    return Recentred(
        tensor=pair.tensor,
        offset=pair.offset,
        code=pair.code,
        quantize=pair.quantize.name,
        relu=None if pair.relu is None else pair.relu.name,
        clips=tuple(clip.name for clip in pair.clips),
        producer=pair.producer.name,
        layers=tuple(layer.name for layer in pair.readers.layers),
        factors=tuple((mul.name, holder.name) for mul, holder in pair.readers.factors),
        skips=tuple(holder.name for holder in pair.readers.skips),
        added=tuple(added),
    )


def _only_pair_reads(graph: gs.Graph, tensor: gs.Tensor, activation: Activation) -> bool:
    found = {
        (node.name, index)
        for node in tensor.outputs
        for index, operand in enumerate(node.inputs)
        if operand is tensor
    }
    is_output = any(tensor is output for output in graph.outputs)
    return found == set(activation.readers) and not is_output


def _is_unsigned(node: gs.Node) -> bool:
    """Whether a node is a Q or DQ of UINT8 codes with one constant scale and zero point 0."""
    if node.op not in ("QuantizeLinear", "DequantizeLinear") or len(node.inputs) < 3:
        return False
    scale, zero_point = (constant_value(tensor) for tensor in node.inputs[1:3])
    if scale is None or zero_point is None or scale.size != 1 or scale.dtype != np.float32:
        return False
    return bool(zero_point.dtype == np.uint8 and not zero_point.any())


def _bounds(clip: gs.Node) -> tuple[float, float]:
    bounds = [-np.inf, np.inf]
    for index, tensor in enumerate(clip.inputs[1:3]):
        value = None if tensor.is_empty() else constant_value(tensor)
        bounds[index] = bounds[index] if value is None else float(value)
    return bounds[0], bounds[1]
