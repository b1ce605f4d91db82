"""The learnable constants of a Q/DQ graph: where they are, and their values.

`Sites` is the structure. `State` holds the values as they are deployed: the integer codes of each
weight, the gain and shift of each affine, the step of each activation. `find_sites` reads both from
a Q/DQ graph, `simulation` lets torch run a state, `write` writes a state into the graph.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from reptrt.core.grid import Grid, along_axis
from reptrt.graph.affines import read_affines
from reptrt.graph.net import Net, constant_of, maker_of, producer
from reptrt.graph.placement import Placement
from reptrt.graph.qdq import is_simulation
from reptrt.graph.splits import read_splits
from reptrt.quantize.reconstruct.fake_quantize import fake_quantize

_SAME_CODE = 1e-3  # of a step: a weight this close to its code needs no rounding


@dataclass(frozen=True, slots=True, eq=False)
class WeightSite:
    """The quantized weight of one node."""

    node: str
    weight: Tensor  # the float weight
    scale: Tensor  # shaped to broadcast over the weight
    dequantized: str  # name of the tensor that the node reads
    codes: str  # name of the initializer that holds the codes
    layer: str  # the layer whose affine scales it; the node's name for a layer that is not split
    exact: bool  # the codes represent the weight exactly: its rounding is not learned


@dataclass(frozen=True, slots=True)
class Pair:
    """The Q/DQ pair of one activation."""

    tensor: str  # input of the pair, or of the Clip before it that simulates fewer bits
    readers: frozenset[str]  # names of the nodes that read the tensor
    nodes: tuple[str, ...]  # names of the Clip, if there is one, and the QuantizeLinear
    dequantize: str  # name of the DequantizeLinear
    group: int  # the pairs of a group share one step
    grid: Grid


@dataclass(frozen=True, slots=True, eq=False)
class Sites:
    """Everything in a Q/DQ graph that can be learned."""

    weights: Mapping[str, WeightSite]  # by node
    pairs: Mapping[str, Pair]  # by tensor
    affines: Mapping[str, tuple[str, str]]  # layer -> names of its gain and shift constants
    grid: Grid  # codes of weights


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """Values of learnable constants, as deployed; of all sites, or of those that were learned."""

    codes: Mapping[str, Tensor] = field(default_factory=dict)  # node -> codes, the weight's shape
    gain: Mapping[str, Tensor] = field(default_factory=dict)  # layer -> gain, shaped to broadcast
    shift: Mapping[str, Tensor] = field(default_factory=dict)  # layer -> shift, likewise
    step: Mapping[int, Tensor] = field(default_factory=dict)  # group -> scalar

    def updated(self, other: "State") -> "State":
        """Return this state with its values replaced where ``other`` has one."""
        return State(
            {**self.codes, **other.codes},
            {**self.gain, **other.gain},
            {**self.shift, **other.shift},
            {**self.step, **other.step},
        )


def find_sites(
    net: Net, reference: Net, placement: Placement, grid: Grid, device: torch.device
) -> tuple[Sites, State]:
    """Return the learnable constants of a Q/DQ graph and their present values.

    Args:
        net: the Q/DQ graph, with affines.
        reference: the float graph that it was made from.
        placement: the plan it was made by.
        grid: codes of weights.
        device: where the tensors go.
    """
    nodes = {node.name: node for node in net.graph.nodes}
    originals = {node.name: node for node in reference.graph.nodes}
    affines = {affine.layer: (affine.gain, affine.shift) for affine in read_affines(net)}
    layers = _layer_of_nodes(net)
    weights, codes = {}, {}
    for weight in placement.weights:
        original = np.asarray(constant_of(originals[weight.node].inputs[1]), np.float32)
        dequantize = maker_of(nodes[weight.node].inputs[1])
        scale = along_axis(constant_of(dequantize.inputs[1]), original.ndim, weight.axis)
        nearest = np.asarray(constant_of(dequantize.inputs[0]), np.float32)
        exact = bool((np.abs(original / scale - nearest) <= _SAME_CODE).all())
        codes[weight.node] = torch.tensor(nearest, device=device)
        weights[weight.node] = WeightSite(
            weight.node,
            torch.tensor(original, device=device),
            torch.tensor(scale, device=device),
            nodes[weight.node].inputs[1].name,
            dequantize.inputs[0].name,
            layers.get(weight.node, weight.node),
            exact,
        )
    pairs, steps = _pairs(net, placement, device)
    constants = _float_constants(net, affines, device)
    state = State(
        codes,
        {layer: constants[gain] for layer, (gain, _) in affines.items()},
        {layer: constants[shift] for layer, (_, shift) in affines.items()},
        steps,
    )
    return Sites(weights, pairs, affines, grid), state


def simulation(
    sites: Sites, weights: Mapping[str, Tensor], state: State
) -> tuple[dict[str, Tensor], dict[str, Callable[..., Tensor]]]:
    """Return the ``inputs`` and ``replace`` with which TorchGraph runs a state, differentiably.

    Args:
        sites: the structure.
        weights: node -> dequantized weight without the gain, for the nodes that will run.
        state: gains, shifts and steps; its codes are not used.
    """
    inputs = {sites.weights[node].dequantized: value for node, value in weights.items()}
    for layer, (gain, shift) in sites.affines.items():
        inputs[gain], inputs[shift] = state.gain[layer], state.shift[layer]
    hooks: dict[str, Callable[..., Tensor]] = {}
    for pair in sites.pairs.values():
        hooks |= dict.fromkeys(pair.nodes, _unchanged)
        hooks[pair.dequantize] = _quantizer(state.step[pair.group], pair.grid)
    return inputs, hooks


def deployed_weights(sites: Sites, state: State, nodes: Collection[str]) -> dict[str, Tensor]:
    """Return node -> codes * scale."""
    return {
        node: state.codes[node] * sites.weights[node].scale
        for node in nodes
        if node in sites.weights
    }


def write(net: Net, sites: Sites, state: State) -> None:
    """Write a state into the Q/DQ graph that `find_sites` read."""
    nodes = {node.name: node for node in net.graph.nodes}
    for node, site in sites.weights.items():
        dequantize = maker_of(nodes[node].inputs[1])
        values = state.codes[node].to("cpu", torch.int8).numpy()
        dequantize.inputs[0] = gs.Constant(site.codes, values)
    tensors = net.graph.tensors()
    for layer, names in sites.affines.items():
        for name, value in zip(names, (state.gain[layer], state.shift[layer]), strict=True):
            tensors[name].values = value.to("cpu", torch.float32).numpy()
    for pair in sites.pairs.values():
        _write_step(nodes, pair, np.float32(state.step[pair.group].item()))


def _write_step(nodes: Mapping[str, gs.Node], pair: Pair, step: np.float32) -> None:
    for name in (pair.nodes[-1], pair.dequantize):
        nodes[name].inputs[1].values = np.array(step, dtype=np.float32)
    if len(pair.nodes) == 2:
        for tensor, code in zip(
            nodes[pair.nodes[0]].inputs[1:], (pair.grid.qmin, pair.grid.qmax), strict=True
        ):
            tensor.values = np.array(np.float32(code) * step, dtype=np.float32)


def _unchanged(x: Tensor, *_: Tensor) -> Tensor:
    return x


def _quantizer(step: Tensor, grid: Grid) -> Callable[..., Tensor]:
    return lambda x, *_: fake_quantize(x, step, grid)


def _layer_of_nodes(net: Net) -> dict[str, str]:
    layers: dict[str, str] = {}
    for split in read_splits(net):
        layers |= {split.main: split.layer, split.side: split.layer}
    return layers


def _float_constants(
    net: Net, affines: Mapping[str, tuple[str, str]], device: torch.device
) -> dict[str, Tensor]:
    tensors = net.graph.tensors()
    return {
        name: torch.tensor(np.asarray(tensors[name].values, np.float32), device=device)
        for names in affines.values()
        for name in names
    }


def _pairs(
    net: Net, placement: Placement, device: torch.device
) -> tuple[dict[str, Pair], dict[int, Tensor]]:
    nodes = {node.name: node for node in net.graph.nodes}
    pairs: dict[str, Pair] = {}
    steps: dict[int, Tensor] = {}
    for activation in placement.activations:
        name, index = activation.readers[0]
        dequantize = maker_of(nodes[name].inputs[index])
        quantize = maker_of(dequantize.inputs[0])
        clip = producer(quantize.inputs[0])
        step = np.float32(constant_of(quantize.inputs[1]))
        unsigned = constant_of(quantize.inputs[2]).dtype == np.uint8
        grid = Grid(0, 255) if unsigned else Grid.activation(8)
        inserted = [quantize.name]
        if clip is not None and is_simulation(clip):
            inserted = [clip.name, quantize.name]
            low, high = (float(constant_of(tensor)) for tensor in clip.inputs[1:])
            grid = Grid(round(low / float(step)), round(high / float(step)))
        pairs[activation.tensor] = Pair(
            activation.tensor,
            frozenset(reader for reader, _ in activation.readers),
            tuple(inserted),
            dequantize.name,
            activation.group,
            grid,
        )
        steps[activation.group] = torch.tensor(step, device=device)
    return pairs, steps
