"""Absorb batch norms and other per-channel affines into the layers around them, in float64.

An affine y[c] = scale[c] x[c] + shift[c] is a BatchNormalization in inference mode,

    scale = gamma / std,   shift = beta - mean scale,      std = sqrt(var + epsilon)

or an Add, Sub, Mul, Div, Neg or Sum of one tensor and constants. It is absorbed by

1. the layer before it (Conv, ConvTranspose, Gemm, matrix product), if nothing else reads that
   layer's output:     W' = scale W,   b' = scale b + shift           per output channel
2. all layers before it, if it lies behind a sum of them: each is scaled, the first takes the shift;
   if it lies behind a Concat of channels, each layer takes its part;
3. the layers behind it, if nothing else reads it:
                       W' = W scale,   b' = b + sum over taps and inputs of W shift
   A layer that pads with zeros would need the shift in its border, and a transposed convolution
   spreads it unevenly: they absorb a scale only. The last factor of an activation function such
   as GELU stays: engines know the function by it.

On the way it passes pools, means over height and width, and Flatten, where they commute with it
(`reptrt.rewrite.commute`).

Requires: constant parameters. Ensures: every tensor that is left keeps its name and value. Each
affine that stays is reported with the reason, but for the arithmetic of activation functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.core.arrays import Float64Array
from reptrt.core.errors import RewriteError
from reptrt.graph.net import (
    WEIGHTED_OPS,
    Net,
    constant_value,
    is_private,
    producer,
    producer_of,
)
from reptrt.graph.provenance import read_provenance, write_provenance
from reptrt.rewrite.activations import nodes_in_activations
from reptrt.rewrite.commute import POOLS, commuted
from reptrt.rewrite.contract import RewriteReport, Skipped
from reptrt.rewrite.layers import layer_of, set_parameters
from reptrt.rewrite.linear import LinearMap, compose
from reptrt.rewrite.linear_nodes import affine_of, data_input, layout_of, linear_of
from reptrt.rewrite.sums import summands_of

_NO_LAYER = "no layer next to it"


def absorb_affines(net: Net) -> RewriteReport:
    """Absorb every per-channel affine that a layer can take; new constants are float64.

    Raises:
        RewriteError: a BatchNormalization is in training mode: the net was exported without eval().
    """
    refuse_training_mode(net)
    changed: dict[str, None] = {}
    while True:
        reasons: dict[str, str] = {}
        absorbed: dict[str, None] = {}
        for node in list(net.graph.nodes):
            outcome = _absorb(net, node)
            if isinstance(outcome, str):
                reasons[node.name] = outcome
            else:
                absorbed |= dict.fromkeys(outcome)
        changed |= absorbed
        if not absorbed:
            inside = nodes_in_activations(net.graph)
            skipped = (Skipped(n, reason) for n, reason in reasons.items() if n not in inside)
            return RewriteReport("absorb_affines", tuple(changed), tuple(skipped))


def refuse_training_mode(net: Net) -> None:
    """Raise if any node is exported in training mode."""
    training = [
        node.name
        for node in net.graph.nodes
        if node.op == "BatchNormalization"
        and (node.attrs.get("training_mode", 0) or len(node.outputs) > 1)
    ]
    if training:
        raise RewriteError(
            f"{training[0]} (and {len(training) - 1} more): batch norm is in training mode, so its "
            "output depends on the batch; export the net after net.eval()"
        )


def _absorb(net: Net, node: gs.Node) -> Sequence[str] | str:
    """Absorb one node; return the names of the layers that took it, or why it stays."""
    affine = affine_of(node)
    if affine is None:
        stays = node.op == "BatchNormalization" and node.outputs
        return "its statistics are not constant" if stays else ()
    before = _layers_before(net.graph, data_input(node), affine)
    if not isinstance(before, str):
        _absorb_before(net, node, before)
        return [part.layer.name for part in before]
    behind = _layers_behind(net.graph, node, affine)
    if not isinstance(behind, str):
        _absorb_behind(net, node, behind)
        return [layer.name for layer in behind.layers]
    reasons = [reason for reason in (before, behind) if reason != _NO_LAYER]
    return "; ".join(reasons) or _NO_LAYER


@dataclass(frozen=True, slots=True)
class _Part:
    """A layer before an affine, and what it takes of it."""

    layer: gs.Node
    affine: LinearMap


def _layers_before(graph: gs.Graph, tensor: gs.Tensor, affine: LinearMap) -> list[_Part] | str:
    """Return the layers that an affine of a tensor can go into, with their parts; or why not."""
    node = producer(tensor)
    if node is None:
        return _NO_LAYER
    if node.op in WEIGHTED_OPS:
        layer = layer_of(node)
        if isinstance(layer, str):
            return f"the layer before it: {layer}"
        if not is_private(graph, tensor):
            return "the output of the layer before it is used elsewhere too"
        fits = layer.out_channels == affine.out_channels
        return [_Part(node, affine)] if fits else "the layer before it is broadcast"
    if node.op in POOLS and commuted(affine, node) is not None and is_private(graph, tensor):
        return _layers_before(graph, node.inputs[0], affine)
    if node.op == "Concat":
        return _layers_of_concat(graph, node, affine)
    if node.op not in ("Add", "Sub", "Sum") or not (parts := summands_of(node)):
        return _NO_LAYER
    if not is_private(graph, tensor):
        return "the sum before it is used elsewhere too"
    scaling = replace(affine, bias=np.zeros_like(affine.bias))
    found: list[_Part] = []
    for part in parts:
        below = _layers_before(graph, part.tensor, scaling if found else affine)
        if isinstance(below, str):
            return "a summand before it is more than the output of a layer"
        found += below
    return found


def _layers_of_concat(graph: gs.Graph, concat: gs.Node, affine: LinearMap) -> list[_Part] | str:
    """Return the layers whose outputs a Concat of channels joins, each with its channels."""
    layouts = [layout_of(tensor) for tensor in concat.inputs]
    sizes = [layout.channels for layout in layouts if layout is not None]
    axis = int(concat.attrs["axis"]) % (affine.axes + 2)
    if axis != 1 or len(sizes) < len(layouts) or sum(sizes) != affine.out_channels:
        return _NO_LAYER
    if not is_private(graph, concat.outputs[0]):
        return "the Concat before it is used elsewhere too"
    found: list[_Part] = []
    ends = np.cumsum(sizes).tolist()
    for tensor, size, end in zip(concat.inputs, sizes, ends, strict=True):
        taken = slice(end - size, end)
        kernel, bias = affine.kernel[taken], affine.bias[taken]
        below = _layers_before(
            graph, tensor, replace(affine, kernel=kernel, bias=bias, groups=size)
        )
        if isinstance(below, str):
            return "an input of the Concat before it is more than the output of a layer"
        found += below
    return found


def _absorb_before(net: Net, node: gs.Node, parts: list[_Part]) -> None:
    result, source = node.outputs[0], data_input(node)
    layers = [part.layer for part in parts]
    for part in parts:
        is_first = part is parts[0]
        shift_from = node if is_first and node.op == "BatchNormalization" else None
        _set(net, part.layer, compose(_known(layer_of(part.layer)), part.affine), shift_from)
    for tensor in _tensors_between(source, layers):
        tensor.name = net.fresh_name(f"{tensor.name}.scaled")
    last = producer_of(source)
    _detach(node)
    last.outputs = [result]
    for part in parts:
        _scale_provenance(net, [part.layer], part.affine.kernel.reshape(-1))


def _tensors_between(tensor: gs.Tensor, layers: list[gs.Node]) -> list[gs.Tensor]:
    """Return what nodes read on the way down from layers to a tensor: its values change."""
    node = producer_of(tensor)
    if any(node is layer for layer in layers):
        return []
    inner = [below for part in node.inputs for below in _tensors_between(part, layers)]
    return [*node.inputs, *inner]


@dataclass(frozen=True, slots=True)
class _Behind:
    """The layers behind an affine, and what lies between."""

    passed: list[gs.Node]  # nodes that commute with it, in order
    affine: LinearMap  # as it is behind them
    layers: list[gs.Node]


def _layers_behind(graph: gs.Graph, node: gs.Node, affine: LinearMap) -> _Behind | str:
    """Return the layers that read an affine, if each can absorb it; or why not."""
    if node.op != "BatchNormalization" and _is_product(producer(data_input(node))):
        return "it ends a product of tensors, as in GELU"
    result, passed = node.outputs[0], []
    while (
        is_private(graph, result)
        and (moved := commuted(affine, reader := result.outputs[0])) is not None
    ):
        passed.append(reader)
        affine, result = moved, reader.outputs[0]
    readers = list(result.outputs)
    if not any(_reads(reader, result) for reader in readers):
        return _NO_LAYER
    if any(result is output for output in graph.outputs):
        return "its result is an output of the net"
    if not all(_reads(reader, result) for reader in readers):
        return "its result is read by more than layers"
    for reader in readers:
        whole = _composed(affine, reader)
        if isinstance(whole, str):
            return whole
    return _Behind(passed, affine, readers)


def _reads(reader: gs.Node, tensor: gs.Tensor) -> bool:
    """Whether a node is a layer whose data, and nothing else, is the tensor."""
    data, *others = reader.inputs
    return reader.op in WEIGHTED_OPS and data is tensor and all(t is not tensor for t in others)


def _is_product(node: gs.Node | None) -> bool:
    computed = [] if node is None else [t for t in node.inputs if constant_value(t) is None]
    return node is not None and node.op in ("Mul", "Div") and len(computed) > 1


def _composed(affine: LinearMap, reader: gs.Node) -> LinearMap | str:
    """Return a layer with an affine before it, its window where only a shift has to know it."""
    layer = layer_of(reader)
    if isinstance(layer, str):
        return f"the layer behind it: {layer}"
    if not np.any(affine.bias):
        return compose(affine, layer)
    exact = linear_of(reader, None)
    if exact is None:
        return "the padding of the layer behind it is not known"
    return compose(affine, exact)


def _absorb_behind(net: Net, node: gs.Node, behind: _Behind) -> None:
    source = data_input(node)
    for reader in behind.layers:
        _set(net, reader, _composed(behind.affine, reader), None)
    for reader in behind.passed[:1] or behind.layers:
        reader.inputs[0] = source
    for reader in behind.passed:
        tensor = reader.outputs[0]
        tensor.name = net.fresh_name(f"{tensor.name}.unscaled")
    _detach(node)
    scale = behind.affine.kernel.reshape(-1)
    uniform = scale[:1] if np.all(scale == scale[0]) else None
    _scale_provenance(net, behind.layers, uniform)


def _detach(node: gs.Node) -> None:
    node.inputs.clear()
    node.outputs.clear()


def _set(net: Net, layer: gs.Node, linear: LinearMap | str, norm: gs.Node | None) -> None:
    """Give a layer new parameters, named after the old ones or the norm whose shift it takes."""
    weight = layer.inputs[1].name
    if norm is not None:
        bias = norm.inputs[2].name
    elif len(layer.inputs) > 2 and not layer.inputs[2].is_empty():
        bias = layer.inputs[2].name
    else:
        bias = f"{weight.removesuffix('.weight')}.bias"
    set_parameters(net, layer, _known(linear), weight, bias)


def _known(linear: LinearMap | str) -> LinearMap:
    assert isinstance(linear, LinearMap)  # `_layers_before` and `_layers_behind` have looked
    return linear


def _scale_provenance(net: Net, layers: list[gs.Node], scale: Float64Array | None) -> None:
    """Scale the records of fused layers; drop them if each input channel has another scale."""
    records = read_provenance(net)
    names = [layer.name for layer in layers if layer.name in records]
    if names and scale is not None:
        scaled = {name: tuple(b.scaled(scale) for b in records[name]) for name in names}
        write_provenance(net, scaled)
    elif names:
        write_provenance(net, {}, gone=names)
