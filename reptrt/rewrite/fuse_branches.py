"""Merge the linear branches of a rep block into one convolution, in float64.

Wherever an Add (or a tree of Adds) sums linear maps of one tensor x - convolutions, batch norms,
the identity, average pools, scalings, explicit zero pads, or several of these in series - the sum
is itself one convolution of x (`reptrt.rewrite.linear`). Blocks are found by this algebra alone:
no class or parameter name is looked at.

1. Branches are followed upwards while a node is linear and nobody else reads the tensor.
2. Branches are grouped at the nearest tensor that two or more of them share; what starts
   elsewhere (a residual) stays an Add.
3. A group is merged if the result is exact at the borders and costs no more
   multiply-accumulates than its branches did.

Requires: constant weights. Ensures: every Add keeps its output tensor, name and value; the fused
convolution is named after the block. What looked like a block and was left alone is reported with
the reason. Provenance of each fused kernel goes to the net's metadata (`reptrt.graph.provenance`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.graph.net import Net, constant_value, first_free, is_private, producer
from reptrt.graph.provenance import Branch, write_provenance
from reptrt.rewrite.contract import RewriteReport, Skipped
from reptrt.rewrite.fold_batchnorm import refuse_training_mode
from reptrt.rewrite.linear import LinearMap, add, compose, diagonal, identity
from reptrt.rewrite.linear_nodes import linear_of
from reptrt.rewrite.naming import block_name, common_prefix, parameter_names


@dataclass(frozen=True, slots=True)
class Step:
    """One point on the way up a branch: leaf = linear(source)."""

    source: gs.Tensor
    linear: LinearMap | None = None  # None: the identity
    macs: int = 0  # per output position of the leaf, as written in the graph
    nodes: tuple[gs.Node, ...] = ()  # between source and leaf, top first


@dataclass(frozen=True, slots=True)
class Leaf:
    """One operand of a sum, with every tensor it is a linear map of, nearest first."""

    steps: tuple[Step, ...]
    stopped: str | None = None  # why the way up ended at a linear node
    beyond: tuple[gs.Tensor, ...] = ()  # what it would have reached had it not

    @property
    def tensor(self) -> gs.Tensor:
        """The operand itself."""
        return self.steps[0].source

    def step_at(self, source: gs.Tensor) -> Step | None:
        """Return the step whose source is the given tensor."""
        return next((step for step in self.steps if step.source is source), None)


def fuse_branches(net: Net) -> RewriteReport:
    """Replace each sum of linear branches of one tensor by one convolution."""
    refuse_training_mode(net)
    net.graph.toposort()
    # By tensor: a sum is replaced by other nodes and keeps its output.
    order = {t.name: i for i, node in enumerate(net.graph.nodes) for t in node.outputs}
    fused: dict[str, tuple[Branch, ...]] = {}
    skipped: list[Skipped] = []
    for root in [node for node in net.graph.nodes if _is_sum(node)]:
        if not root.outputs or _is_inner(net.graph, root):
            continue
        leaves = [_climb(net.graph, tensor) for tensor in _operands(net.graph, root)]
        _fuse_sum(net.graph, root, leaves, order, fused, skipped)
    net.graph.cleanup(remove_unused_graph_inputs=False).toposort()
    write_provenance(net, fused)
    return RewriteReport("fuse_branches", tuple(fused), tuple(skipped))


def _fuse_sum(
    graph: gs.Graph,
    root: gs.Node,
    leaves: list[Leaf],
    order: dict[str, int],
    fused: dict[str, tuple[Branch, ...]],
    skipped: list[Skipped],
) -> None:
    """Merge every group of leaves of one sum that can be merged; rewrite the sum if any could."""
    convs = []
    every = tuple(leaves)
    for source in _shared_sources(leaves, order):
        group = [leaf for leaf in leaves if leaf.step_at(source)]
        if len(group) < 2:
            continue  # its leaves went into a nearer group
        steps = [step for leaf in group if (step := leaf.step_at(source))]
        nodes = [node for step in steps for node in step.nodes]
        name = first_free(block_name(root, nodes), {node.name for node in graph.nodes})
        merged = _merge(steps)
        if isinstance(merged, str):
            skipped.append(Skipped(name, merged))
            continue
        fused[name] = tuple(_branch(step, merged) for step in steps)
        convs.append(_conv(graph, name, source, merged))
        leaves = [leaf for leaf in leaves if leaf not in group]
    skipped += _stopped(every, leaves)
    if convs:
        _rewrite_sum(graph, root, convs, [leaf.tensor for leaf in leaves])


def _stopped(every: Sequence[Leaf], left: Sequence[Leaf]) -> list[Skipped]:
    """Return the leaves that stayed behind though they start where another leaf does."""
    return [
        Skipped(leaf.tensor.name, leaf.stopped)
        for leaf in left
        for source in leaf.beyond
        if leaf.stopped and any(other.step_at(source) for other in every if other is not leaf)
    ]


def _is_sum(node: gs.Node) -> bool:
    """Whether a node adds two computed tensors (adding a constant is a linear map instead)."""
    return node.op == "Add" and all(constant_value(tensor) is None for tensor in node.inputs)


def _is_inner(graph: gs.Graph, node: gs.Node) -> bool:
    """Whether a sum is only an operand of another sum."""
    result = node.outputs[0]
    return is_private(graph, result) and _is_sum(result.outputs[0])


def _operands(graph: gs.Graph, root: gs.Node) -> list[gs.Tensor]:
    """Return what a tree of sums adds up, left to right."""
    operands = []
    for tensor in root.inputs:
        node = producer(tensor)
        if node is not None and _is_sum(node) and _is_inner(graph, node):
            operands += _operands(graph, node)
        else:
            operands.append(tensor)
    return operands


def _climb(graph: gs.Graph, tensor: gs.Tensor) -> Leaf:
    """Follow one operand upwards while it stays an exact linear map."""
    steps = [Step(tensor)]
    while is_private(graph, tensor) and (node := producer(tensor)) is not None:
        below = steps[-1]
        shape = tuple(node.inputs[0].shape or ())
        channels = shape[1] if len(shape) == 4 and isinstance(shape[1], int) else None
        linear = linear_of(node, below.linear.in_channels if below.linear else channels)
        if linear is None:
            break
        whole = linear if below.linear is None else compose(linear, below.linear)
        if isinstance(whole, str):
            return Leaf(tuple(steps), f"{node.name}: {whole}", _linear_sources(graph, node))
        stride = below.linear.stride if below.linear else (1, 1)
        is_scaling = linear.is_per_channel and node.op != "Conv"  # goes into a neighbour's weight
        macs = below.macs + (0 if is_scaling else linear.macs * stride[0] * stride[1])
        tensor = _data_input(node)
        steps.append(Step(tensor, whole, macs, (node, *below.nodes)))
    return Leaf(tuple(steps))


def _linear_sources(graph: gs.Graph, node: gs.Node) -> tuple[gs.Tensor, ...]:
    """Return the tensors above a linear node, as far as the way up is linear."""
    tensors = [_data_input(node)]
    while is_private(graph, tensors[-1]) and (above := producer(tensors[-1])) is not None:
        if linear_of(above, None) is None:
            break
        tensors.append(_data_input(above))
    return tuple(tensors)


def _data_input(node: gs.Node) -> gs.Tensor:
    """Return the input that is not a parameter (Mul and Add may have it second)."""
    return node.inputs[1 if constant_value(node.inputs[0]) is not None else 0]


def _shared_sources(leaves: Sequence[Leaf], order: dict[str, int]) -> list[gs.Tensor]:
    """Return the tensors that two or more leaves are linear maps of, latest in the graph first."""
    count: dict[int, int] = {}
    tensors: dict[int, gs.Tensor] = {}
    for leaf in leaves:
        for step in leaf.steps:
            count[id(step.source)] = count.get(id(step.source), 0) + 1
            tensors[id(step.source)] = step.source
    shared = [tensors[key] for key, uses in count.items() if uses > 1]
    return sorted(shared, key=lambda t: -order.get(t.name, -1))


def _merge(steps: Sequence[Step]) -> LinearMap | str:
    channels = next((step.linear.in_channels for step in steps if step.linear), None)
    if channels is None:
        return "adds a tensor to itself: nothing to merge"
    maps = [step.linear or identity(channels) for step in steps]
    merged = add(maps, equal_sizes=_equal_sizes(steps))
    if isinstance(merged, str):
        return merged
    before = sum(step.macs for step in steps)
    if merged.macs > before:
        return f"merged it would cost more: {merged.macs} instead of {before} MACs per position"
    return merged


def _equal_sizes(steps: Sequence[Step]) -> bool:
    """Whether the outputs of all branches are known to have the same height and width."""
    sizes: list[tuple[int | str, ...]] = [tuple(_leaf_shape(step)[2:]) for step in steps]
    known = all(isinstance(length, int) for length in sizes[0])
    return known and all(len(size) == 2 and size == sizes[0] for size in sizes)


def _leaf_shape(step: Step) -> Sequence[int | str]:
    """Return the shape of what a step leads to; () if unknown."""
    tensor = step.nodes[-1].outputs[0] if step.nodes else step.source
    return tensor.shape or ()


def _branch(step: Step, merged: LinearMap) -> Branch:
    linear = step.linear or identity(merged.in_channels)
    values = diagonal(linear)
    return Branch(
        kind="identity" if values is not None else "x".join(map(str, linear.size)),
        name=common_prefix(parameter_names(step.nodes)),
        amax=np.abs(linear.kernel).max(axis=(1, 2, 3)).astype(np.float32),
        diagonal=None if values is None else values.astype(np.float32),
    )


def _conv(graph: gs.Graph, name: str, source: gs.Tensor, linear: LinearMap) -> gs.Node:
    node = gs.Node(
        "Conv",
        name,
        attrs={
            "kernel_shape": list(linear.size),
            "strides": list(linear.stride),
            "pads": [*linear.begin, *linear.end],
            "dilations": list(linear.dilation),
            "group": linear.groups,
        },
        inputs=[
            source,
            gs.Constant(f"{name}.weight.folded", linear.kernel),
            gs.Constant(f"{name}.bias.folded", linear.bias),
        ],
        outputs=[gs.Variable(f"{name}.output", dtype=np.float32)],
    )
    graph.nodes.append(node)
    return node


def _rewrite_sum(
    graph: gs.Graph, root: gs.Node, convs: list[gs.Node], rest: list[gs.Tensor]
) -> None:
    """Make the sum's output tensor the sum of the new convolutions and the remaining operands."""
    output = root.outputs[0]
    graph.nodes.remove(root)
    root.inputs.clear()
    root.outputs.clear()
    terms = [conv.outputs[0] for conv in convs] + rest
    while len(terms) > 1:
        name = root.name if len(terms) == 2 else f"{root.name}.{len(terms) - 2}"
        total = output if len(terms) == 2 else gs.Variable(f"{name}.output", dtype=np.float32)
        graph.nodes.append(gs.Node("Add", name, inputs=terms[:2], outputs=[total]))
        terms[:2] = [total]
    if not rest and len(convs) == 1:
        convs[0].outputs = [output]
