"""Sums of tensors, in every form that an exporter writes them.

1. Add, Sub, and Sum of any number of tensors.
2. ``torch.stack(branches).sum(axis)``: Unsqueeze each -> Concat -> ReduceSum on the same axis; with
   ReduceMean the mean. So is Concat of channels -> Reshape to (N, branches, C, ...) -> ReduceSum.
3. A tree of these, whose inner sums nothing else reads, is one sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.graph.net import Net, constant_value, is_private, producer


@dataclass(frozen=True, slots=True, eq=False)
class Summand:
    """One operand of a sum, which adds ``factor * tensor``."""

    tensor: gs.Tensor
    factor: float = 1.0


def summands_of(node: gs.Node) -> tuple[Summand, ...]:
    """Return the operands of a sum of computed tensors; () if the node is anything else."""
    if node.op in ("ReduceSum", "ReduceMean"):
        return _stacked(node)
    if node.op not in ("Add", "Sub", "Sum"):
        return ()
    computed = [tensor for tensor in node.inputs if constant_value(tensor) is None]
    if len(computed) < 2:
        return ()  # adding constants is a linear map of one tensor
    first, *rest = node.inputs
    factor = -1.0 if node.op == "Sub" else 1.0
    return (Summand(first), *(Summand(tensor, factor) for tensor in rest))


def sum_roots(graph: gs.Graph) -> list[gs.Node]:
    """Return the sums of a graph that are not operands of other sums, in execution order."""
    sums = {id(node): node for node in graph.nodes if summands_of(node)}
    inner = {
        id(below)
        for node in sums.values()
        for summand in summands_of(node)
        if (below := _inner_sum(graph, summand.tensor)) is not None
    }
    return [node for key, node in sums.items() if key not in inner]


def operands_of(graph: gs.Graph, root: gs.Node) -> list[Summand]:
    """Return what a tree of sums adds up, left to right."""
    operands = []
    for summand in summands_of(root):
        below = _inner_sum(graph, summand.tensor)
        if below is None:
            operands.append(summand)
        else:
            operands += [
                Summand(inner.tensor, summand.factor * inner.factor)
                for inner in operands_of(graph, below)
            ]
    return operands


def write_sum(net: Net, root: gs.Node, convs: list[gs.Node], rest: Sequence[Summand]) -> None:
    """Make a root's output tensor the sum of new convolutions and of operands that remain."""
    output = root.outputs[0]
    net.graph.nodes.remove(root)
    root.inputs.clear()
    root.outputs.clear()
    if not rest and len(convs) == 1:
        convs[0].outputs = [output]
        return
    terms = [Summand(conv.outputs[0]) for conv in convs]
    terms += [_signed(net, root.name, summand) for summand in rest]
    total = terms[0].tensor
    for left, term in zip(range(len(terms) - 2, -1, -1), terms[1:], strict=True):
        name = f"{root.name}.{left}" if left else root.name
        op = "Sub" if term.factor < 0 else "Add"
        result = _like(output, f"{name}.output") if left else output
        net.graph.nodes.append(gs.Node(op, name, inputs=[total, term.tensor], outputs=[result]))
        total = result


def _signed(net: Net, name: str, summand: Summand) -> Summand:
    """Return the same value with factor 1 or -1; any other factor becomes a Mul."""
    if abs(summand.factor) == 1.0:
        return summand
    name = net.fresh_name(f"{name}.scaled")
    factor = gs.Constant(f"{name}.factor", np.array(summand.factor, dtype=np.float32))
    result = _like(summand.tensor, f"{name}.output")
    net.graph.nodes.append(gs.Node("Mul", name, {}, [summand.tensor, factor], [result]))
    return Summand(result)


def _like(tensor: gs.Tensor, name: str) -> gs.Variable:
    return gs.Variable(name, dtype=np.float32, shape=tensor.shape)


def _inner_sum(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node | None:
    """Return the sum that makes a tensor which nothing but one other sum reads."""
    node = producer(tensor)
    return node if node is not None and is_private(graph, tensor) and summands_of(node) else None


def _stacked(node: gs.Node) -> tuple[Summand, ...]:
    """Return the tensors that a reduction over the axis they were stacked on adds up."""
    above = producer(node.inputs[0])
    if above is None or node.attrs.get("keepdims", 1) or len(above.outputs[0].outputs) > 1:
        return ()
    concat = producer(above.inputs[0]) if above.op == "Reshape" else above
    if concat is None or concat.op != "Concat" or len(concat.outputs[0].outputs) > 1:
        return ()
    if above.op == "Reshape":
        return _reshaped(node, above, concat)
    parts = [producer(tensor) for tensor in concat.inputs]
    if len(parts) < 2:
        return ()
    tensors = []
    for part in parts:
        if part is None or part.op != "Unsqueeze" or len(part.outputs[0].outputs) > 1:
            return ()
        rank = len(part.inputs[0].shape or ()) + 1
        where = {_only_axis(part, rank), _only_axis(node, rank), concat.attrs["axis"] % rank}
        if len(where) > 1 or rank == 1:
            return ()
        tensors.append(part.inputs[0])
    return _equally(node, tensors)


def _reshaped(node: gs.Node, reshape: gs.Node, concat: gs.Node) -> tuple[Summand, ...]:
    """Return the tensors whose channels a Concat joins, where a Reshape takes them apart again."""
    shapes = [tuple(tensor.shape or ()) for tensor in concat.inputs]
    apart = tuple(reshape.outputs[0].shape or ())
    rank = len(shapes[0])
    if rank < 2 or concat.attrs["axis"] % rank != 1 or _only_axis(node, rank + 1) != 1:
        return ()
    is_stack = len(apart) == rank + 1 and apart[1] == len(shapes) and isinstance(apart[2], int)
    alike = all(len(s) == rank and s[1:] == apart[2:] for s in shapes)
    return _equally(node, concat.inputs) if is_stack and alike and len(shapes) > 1 else ()


def _equally(node: gs.Node, tensors: Sequence[gs.Tensor]) -> tuple[Summand, ...]:
    factor = 1.0 if node.op == "ReduceSum" else 1.0 / len(tensors)
    return tuple(Summand(tensor, factor) for tensor in tensors)


def _only_axis(node: gs.Node, rank: int) -> int | None:
    """Return the single axis of an Unsqueeze or a reduction; None if it has several."""
    value = constant_value(node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("axes")
    axes = np.asarray([] if value is None else value).reshape(-1)
    return int(axes[0]) % rank if axes.size == 1 else None
