"""Merge the linear branches of a rep block into one convolution, in float64.

Wherever a sum (`reptrt.rewrite.sums`: Add, Sub, Sum, a stack that is reduced) adds up linear maps
of one tensor x - convolutions, batch norms, the identity, average pools, scalings, explicit zero
pads, or several of these in series - the sum is itself one convolution of x
(`reptrt.rewrite.linear`). Blocks are found by this algebra alone: no class or parameter name is
looked at.

1. Branches are followed upwards while a node is linear and nothing else reads the tensor.
2. Branches are grouped at the nearest tensor that two or more of them share; what starts
   elsewhere (a residual) stays a summand.
3. A group is merged if the result is exact at the borders and costs no more
   multiply-accumulates than its branches did.

Requires: constant weights. Ensures: every sum keeps its output tensor, name and value; the fused
convolution is named after the block. What looked like a block and was left alone is reported with
the reason. Provenance of each fused kernel goes to the net's metadata (`reptrt.graph.provenance`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.graph.net import Net, first_free, is_private, producer
from reptrt.graph.provenance import Branch, read_provenance, write_provenance
from reptrt.rewrite.contract import RewriteReport, Skipped
from reptrt.rewrite.layers import write_layer
from reptrt.rewrite.linear import LinearMap, add, compose, diagonal, identity
from reptrt.rewrite.linear_nodes import Layout, data_input, layout_behind, layout_of, linear_of
from reptrt.rewrite.naming import block_name, common_prefix, parameter_names
from reptrt.rewrite.sums import Summand, operands_of, sum_roots, write_sum

Branches = tuple[Branch, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One point on the way up a branch: leaf = linear(source)."""

    source: gs.Tensor
    linear: LinearMap | None = None  # None: the identity
    macs: float = 0  # per output position of the leaf, as written in the graph
    nodes: tuple[gs.Node, ...] = ()  # between source and leaf, top first
    branches: Branches = ()  # of an earlier fused convolution that it consists of


@dataclass(frozen=True, slots=True)
class Leaf:
    """One operand of a sum, with every tensor it is a linear map of, nearest first."""

    summand: Summand
    steps: tuple[Step, ...]
    stopped: str | None = None  # why the branch could not be followed past a linear node
    beyond: tuple[gs.Tensor, ...] = ()  # the tensors above the node that stopped it

    def step_at(self, source: gs.Tensor) -> Step | None:
        """Return the step whose source is the given tensor, the summand's factor included."""
        step = next((step for step in self.steps if step.source is source), None)
        factor = self.summand.factor
        if step is None or factor == 1.0:
            return step
        layout = layout_of(source) if step.linear is None else layout_behind(step.linear)
        if layout is None:
            return None
        linear = step.linear or identity(layout.channels, layout.axes)
        linear = replace(linear, kernel=linear.kernel * factor, bias=linear.bias * factor)
        branches = tuple(branch.scaled(np.array([factor])) for branch in step.branches)
        return replace(step, linear=linear, branches=branches)


@dataclass(slots=True)
class _Progress:
    """What one run has done so far."""

    net: Net
    order: Mapping[str, int]  # tensor -> place in the graph, before anything changed
    branches: dict[str, Branches]  # of every convolution that was fused, in earlier runs too
    fused: dict[str, None] = field(default_factory=dict)  # in this run
    skipped: dict[Skipped, None] = field(default_factory=dict)


def fuse_branches(net: Net) -> RewriteReport:
    """Replace each sum of linear branches of one tensor by one convolution."""
    net.graph.toposort()
    # Keyed by tensor, because a sum that is replaced by other nodes keeps its output.
    order = {t.name: i for i, node in enumerate(net.graph.nodes) for t in node.outputs}
    progress = _Progress(net, order, read_provenance(net))
    for root in sum_roots(net.graph):
        leaves = [
            _climb(net.graph, operand, progress.branches)
            for operand in operands_of(net.graph, root)
        ]
        _fuse_sum(progress, root, leaves)
    net.graph.cleanup(remove_unused_graph_inputs=False).toposort()
    present = {node.name for node in net.graph.nodes}
    fused = [name for name in progress.fused if name in present]
    branches = progress.branches
    write_provenance(net, {name: branches[name] for name in fused}, gone=branches.keys() - present)
    return RewriteReport("fuse_branches", tuple(fused), tuple(progress.skipped))


def _fuse_sum(progress: _Progress, root: gs.Node, leaves: list[Leaf]) -> None:
    """Merge every group of leaves of one sum that can be merged; rewrite the sum if any could."""
    net, convs = progress.net, []
    every = tuple(leaves)
    for source in _shared_sources(leaves, progress.order):
        group = [leaf for leaf in leaves if leaf.step_at(source)]
        if len(group) < 2:
            continue  # its leaves went into a nearer group
        steps = [step for leaf in group if (step := leaf.step_at(source))]
        nodes = [node for step in steps for node in step.nodes]
        taken = {node.name for node in net.graph.nodes} - {node.name for node in nodes}
        name = first_free(block_name(root, nodes), taken)
        merged = _merge(steps)
        if isinstance(merged, str):
            progress.skipped[Skipped(name, merged)] = None
            continue
        parts = tuple(branch for step in steps for branch in _branches(step, merged))
        progress.branches[name] = parts
        progress.fused[name] = None
        convs.append(write_layer(net, name, source, merged))
        leaves = [leaf for leaf in leaves if leaf not in group]
    progress.skipped |= dict.fromkeys(_stopped(every, leaves))
    if convs:
        write_sum(net, root, convs, [leaf.summand for leaf in leaves])


def _stopped(every: Sequence[Leaf], left: Sequence[Leaf]) -> list[Skipped]:
    """Return the branches that were not merged although another one starts at the same tensor."""
    return [
        Skipped(leaf.summand.tensor.name, leaf.stopped)
        for leaf in left
        for source in leaf.beyond
        if leaf.stopped and any(other.step_at(source) for other in every if other is not leaf)
    ]


def _climb(graph: gs.Graph, summand: Summand, known: Mapping[str, Branches]) -> Leaf:
    """Follow one operand upwards while it stays an exact linear map."""
    tensor = summand.tensor
    steps = [Step(tensor)]
    while (node := producer(tensor)) is not None and node.inputs:
        below = steps[-1]
        linear = linear_of(node, _layout(node, below))
        if linear is None:
            break
        if not is_private(graph, tensor):
            reason = f"the result of {node.name} is read elsewhere too"
            return Leaf(summand, tuple(steps), reason, _linear_sources(graph, node))
        whole = linear if below.linear is None else compose(linear, below.linear)
        if isinstance(whole, str):
            reason = f"{node.name}: {whole}"
            return Leaf(summand, tuple(steps), reason, _linear_sources(graph, node))
        tensor = data_input(node)
        steps.append(
            Step(
                tensor,
                whole,
                below.macs + _macs(node, linear, below),
                (node, *below.nodes),
                _inherited(node, below, known),
            )
        )
    return Leaf(summand, tuple(steps))


def _layout(node: gs.Node, below: Step) -> Layout | None:
    """Return the layout of a node's input; if the graph does not say, that of the step below it."""
    if below.linear is None:
        return layout_of(data_input(node))
    return layout_behind(below.linear)


def _macs(node: gs.Node, linear: LinearMap, below: Step) -> float:
    """Return what a node costs per output position of the leaf."""
    if linear.is_per_channel and node.op != "Conv":
        return 0  # goes into a neighbour's weight
    return linear.macs * (below.linear.inputs_per_output if below.linear else 1)


def _inherited(node: gs.Node, below: Step, known: Mapping[str, Branches]) -> Branches:
    """Return the branches of a convolution fused earlier, with the scaling behind it."""
    if below.linear is None:
        return known.get(node.name, ())
    if not below.linear.is_per_channel:
        return ()
    scale = below.linear.kernel.reshape(-1)
    return tuple(branch.scaled(scale) for branch in known.get(node.name, ()))


def _linear_sources(graph: gs.Graph, node: gs.Node) -> tuple[gs.Tensor, ...]:
    """Return the tensors before a linear node that only linear nodes separate from it."""
    tensors = [data_input(node)]
    while is_private(graph, tensors[-1]) and (above := producer(tensors[-1])) is not None:
        if not above.inputs or linear_of(above, layout_of(data_input(above))) is None:
            break
        tensors.append(data_input(above))
    return tuple(tensors)


def _shared_sources(leaves: Sequence[Leaf], order: Mapping[str, int]) -> list[gs.Tensor]:
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
    known = next((step.linear for step in steps if step.linear), None)
    if known is None:
        return "adds a tensor to itself: nothing to merge"
    maps = [step.linear or identity(known.in_channels, known.axes) for step in steps]
    merged = add(maps, equal_sizes=_equal_sizes(steps))
    if isinstance(merged, str):
        return merged
    before = sum(step.macs for step in steps)
    if merged.macs > before:
        return f"merged it would cost more: {merged.macs:g} instead of {before:g} MACs per position"
    return merged


def _equal_sizes(steps: Sequence[Step]) -> bool:
    """Whether the outputs of all branches are known to have the same height and width."""
    shapes: list[tuple[int | str, ...]] = [tuple(_leaf_shape(step)) for step in steps]
    sizes = [shape[2:] for shape in shapes]
    known = all(len(shape) > 2 for shape in shapes) and all(isinstance(n, int) for n in sizes[0])
    return known and all(size == sizes[0] for size in sizes)


def _leaf_shape(step: Step) -> Sequence[int | str]:
    """Return the shape of what a step leads to; () if unknown."""
    tensor = step.nodes[-1].outputs[0] if step.nodes else step.source
    return tensor.shape or ()


def _branches(step: Step, merged: LinearMap) -> Branches:
    if step.branches:
        return step.branches
    linear = step.linear or identity(merged.in_channels, merged.axes)
    values = diagonal(linear)
    taps = tuple(range(1, linear.kernel.ndim))
    kind = "x".join(map(str, linear.size)) or "1x1"
    return (
        Branch(
            kind="identity" if values is not None else kind,
            name=common_prefix(parameter_names(step.nodes)),
            amax=np.abs(linear.kernel).max(axis=taps).astype(np.float32),
            diagonal=None if values is None else values.astype(np.float32),
        ),
    )
