"""The learnable constants of a Q/DQ graph: where they are, and their values.

`Sites` is the structure. `State` holds the values as they are deployed: the integer codes of each
weight, the gain and shift of each affine, the step of each activation. `find_sites` returns both
for a plan and the graph that it was written into, `simulation` lets torch run a state, `write`
writes a state into plan and graph.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from reptrt.core.grid import Grid, along_axis
from reptrt.graph.affines import read_affines
from reptrt.graph.net import Net, constant_of
from reptrt.graph.plan import QuantPlan
from reptrt.graph.qdq import inserted_pairs, update_qdq
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
    net: Net, reference: Net, plan: QuantPlan, grid: Grid, device: torch.device
) -> tuple[Sites, State]:
    """Return the learnable constants of a Q/DQ graph and their present values.

    Args:
        net: the Q/DQ graph, with affines.
        reference: the float graph that it was made from.
        plan: the codes and scales that it has.
        grid: codes of weights.
        device: where the tensors go.
    """
    nodes = {node.name: node for node in net.graph.nodes}
    originals = {node.name: node for node in reference.graph.nodes}
    affines = {affine.layer: (affine.gain, affine.shift) for affine in read_affines(net)}
    layers = _layer_of_nodes(net)
    weights, codes = {}, {}
    for node, weight in plan.weights.items():
        original = np.asarray(constant_of(originals[node].inputs[1]), np.float32)
        scale = along_axis(weight.scale, original.ndim, weight.axis)
        nearest = weight.codes.astype(np.float32)
        exact = bool((np.abs(original / scale - nearest) <= _SAME_CODE).all())
        codes[node] = torch.tensor(nearest, device=device)
        weights[node] = WeightSite(
            node=node,
            weight=torch.tensor(original, device=device),
            scale=torch.tensor(scale, device=device),
            dequantized=nodes[node].inputs[1].name,
            layer=layers.get(node, node),
            exact=exact,
        )
    steps = {
        activation.group: torch.tensor(np.float32(activation.scale), device=device)
        for activation in plan.activations.values()
    }
    constants = _float_constants(net, affines, device)
    state = State(
        codes,
        {layer: constants[gain] for layer, (gain, _) in affines.items()},
        {layer: constants[shift] for layer, (_, shift) in affines.items()},
        steps,
    )
    return Sites(weights, _pairs(net, plan), affines, grid), state


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


def dequantized_weights(sites: Sites, state: State, nodes: Collection[str]) -> dict[str, Tensor]:
    """Return node -> codes * scale, for those of the nodes that have a quantized weight."""
    return {
        node: state.codes[node] * sites.weights[node].scale
        for node in nodes
        if node in sites.weights
    }


def write(net: Net, plan: QuantPlan, sites: Sites, state: State) -> QuantPlan:
    """Write a state into the Q/DQ graph that `find_sites` read; return the changed plan."""
    weights = {
        node: replace(weight, codes=state.codes[node].to("cpu", torch.int8).numpy())
        for node, weight in plan.weights.items()
    }
    scales = {
        tensor: state.step[activation.group].item()
        for tensor, activation in plan.activations.items()
    }
    learned = plan.with_scales(scales).with_weights(weights)
    update_qdq(net, learned)
    tensors = net.graph.tensors()
    for layer, names in sites.affines.items():
        for name, value in zip(names, (state.gain[layer], state.shift[layer]), strict=True):
            tensors[name].values = value.to("cpu", torch.float32).numpy()
    return learned


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


def _pairs(net: Net, plan: QuantPlan) -> dict[str, Pair]:
    pairs: dict[str, Pair] = {}
    for tensor, inserted in inserted_pairs(net, plan).items():
        activation = plan.activations[tensor]
        pairs[tensor] = Pair(
            tensor=tensor,
            readers=frozenset(reader for reader, _ in activation.readers),
            nodes=tuple(node.name for node in inserted.before),
            dequantize=inserted.dequantizes[0].name,
            group=activation.group,
            grid=activation.grid,
        )
    return pairs
