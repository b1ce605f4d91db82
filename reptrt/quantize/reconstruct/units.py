"""Cut a graph into units that are learned one after the other, and group units into stages.

A tensor is alive at a point of the graph if it is computed before and read after it. A boundary is
where a single quantized tensor is alive: in a chain, behind every activation function. Inside a
residual block two tensors are alive, so the whole block is one unit. If more than one tensor is
alive for a long way (as in the neck of a detector), a boundary is placed after `MAX_LAYERS` layers
and contains all tensors that are alive; so any graph can be cut. Boundary tensors are stored before
they are quantized: the unit that reads a tensor learns its step.

A stage is a sequence of units whose outputs have the same height and width.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from reptrt.execute.torchgraph import TorchGraph
from reptrt.execute.torchops.program import Step
from reptrt.graph.queries import POINTWISE

MAX_LAYERS = 8  # layers after which a unit ends even if more than one tensor is alive


@dataclass(frozen=True, slots=True)
class Unit:
    """The nodes between two boundaries."""

    name: str  # the name of its last layer
    inputs: tuple[str, ...]  # the tensors of the boundary before it that it reads
    outputs: tuple[str, ...]  # its tensors that later units read, or that are outputs of the net
    nodes: frozenset[str]
    layers: tuple[str, ...]  # weighted nodes in topological order
    stage: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The units of a net and the tensors that pass between them."""

    units: tuple[Unit, ...]
    alive: tuple[tuple[str, ...], ...]  # for each unit: the tensors alive after it
    shapes: Mapping[str, tuple[int, ...]]  # tensor -> shape without the batch axis


def find_units(
    graph: TorchGraph,
    sample: torch.Tensor,
    layers: Collection[str],
    quantized: Collection[str],
    outputs: Sequence[str],
) -> Layout:
    """Return the units of a float graph.

    Args:
        graph: the float graph, with one input.
        sample: a few images; the graph is run on them to get the shapes.
        layers: weighted nodes; only one node of a split layer.
        quantized: tensors that have a Q/DQ pair in the quantized graph.
        outputs: tensors that the last units are to make; what lies behind them is in no unit.
    """
    needed = _steps_to(graph, outputs)
    shapes = _shapes(graph, sample, needed)
    steps = [step for step in needed if any(name in shapes for name in step.outputs)]
    alive = _alive_after(steps, graph, outputs)
    stops = _boundaries(steps, alive, layers, {*quantized})
    units: list[Unit] = []
    start, stage, size = 0, 0, 0
    before: tuple[str, ...] = graph.input_names
    for stop in stops:
        unit_steps, after = steps[start : stop + 1], alive[stop]
        made = {name for step in unit_steps for name in step.outputs}
        read = {name for step in unit_steps for name in step.inputs}
        outputs = tuple(name for name in after if name in made)
        area = max(_area(shapes[name]) for name in outputs)
        stage += bool(units) and area != size
        size = area
        unit_layers = tuple(step.name for step in unit_steps if step.name in layers)
        units.append(
            Unit(
                name=unit_layers[-1] if unit_layers else unit_steps[-1].name,
                inputs=tuple(name for name in before if name in read),
                outputs=outputs,
                nodes=frozenset(step.name for step in unit_steps),
                layers=unit_layers,
                stage=stage,
            )
        )
        start, before = stop + 1, after
    return Layout(tuple(units), tuple(alive[stop] for stop in stops), shapes)


def stage_end(units: Sequence[Unit], index: int) -> int:
    """Return the index of the unit whose output supervises unit ``index``.

    That is the last unit of its stage. The last unit of a stage is supervised by the last unit of
    the next stage, the last unit of the net by itself.
    """
    last = max(i for i, unit in enumerate(units) if unit.stage == units[index].stage)
    if last == index and last + 1 < len(units):
        return max(i for i, unit in enumerate(units) if unit.stage == units[last + 1].stage)
    return last


def _steps_to(graph: TorchGraph, outputs: Sequence[str]) -> list[Step]:
    """Return the nodes that tensors are computed from, in order."""
    needed, steps = set(outputs), []
    for step in reversed(graph.steps):
        if not needed.isdisjoint(step.outputs):
            needed.update(step.inputs)
            steps.append(step)
    return _pointwise_first(steps[::-1])


def _pointwise_first(steps: Sequence[Step]) -> list[Step]:
    """Return nodes in an order in which pointwise ones run as soon as they can.

    So no boundary lies between a layer and its activation function: what the function takes away
    would be learned too.
    """
    made = {name for step in steps for name in step.outputs}
    missing = {id(step): {name for name in step.inputs if name in made} for step in steps}
    readers: dict[str, list[Step]] = {}
    for step in steps:
        for name in missing[id(step)]:
            readers.setdefault(name, []).append(step)
    order: dict[int, Step] = {}
    for first in steps:
        pending = [first]
        while pending:
            step = pending.pop()
            if id(step) in order:
                continue
            order[id(step)] = step
            ready = []
            for name in step.outputs:
                for reader in readers.get(name, []):
                    missing[id(reader)].discard(name)
                    if not missing[id(reader)] and reader.op in POINTWISE:
                        ready.append(reader)
            pending += reversed(ready)
    return list(order.values())


def _shapes(
    graph: TorchGraph, sample: torch.Tensor, steps: Sequence[Step]
) -> dict[str, tuple[int, ...]]:
    """Return the shape without the batch axis of every floating tensor that has one.

    Args:
        graph: is run.
        sample: a few images.
        steps: nodes whose outputs are looked at.
    """
    constants = graph.constants.keys()
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str, value: torch.Tensor) -> None:
        if value.is_floating_point() and value.dim() > 1 and value.shape[0] == len(sample):
            shapes[name] = tuple(value.shape[1:])

    names = [name for step in steps for name in step.outputs if name not in constants]
    observers = {name: functools.partial(record, name) for name in (*graph.input_names, *names)}
    with torch.inference_mode():
        graph.run({graph.input_names[0]: sample}, [], observe=observers)
    return shapes


def _area(shape: tuple[int, ...]) -> int:
    """Return height times width of a shape (C, H, W); 1 for a vector."""
    return shape[1] * shape[2] if len(shape) == 3 else 1


def _alive_after(
    steps: Sequence[Step], graph: TorchGraph, outputs: Sequence[str]
) -> list[tuple[str, ...]]:
    """Return, for each step, the tensors alive after it in the order of computation."""
    order = list(dict.fromkeys([*graph.input_names, *(n for s in steps for n in s.outputs)]))
    computed, read_later = set(order), set(outputs)
    alive: list[tuple[str, ...]] = []
    for step in reversed(steps):
        alive.append(tuple(name for name in order if name in read_later))
        read_later -= set(step.outputs)
        read_later |= set(step.inputs) & computed
    return alive[::-1]


def _boundaries(
    steps: Sequence[Step],
    alive: Sequence[tuple[str, ...]],
    layers: Collection[str],
    quantized: set[str],
) -> list[int]:
    """Return the index of the last step of each unit."""
    made = {name for step in steps for name in step.outputs}
    stops, count = [], 0
    for index, step in enumerate(steps):
        count += step.name in layers
        ready = quantized & set(step.outputs) and all(name in made for name in alive[index])
        if count and ready and (len(alive[index]) == 1 or count >= MAX_LAYERS):
            stops.append(index)
            count = 0
    last = len(steps) - 1
    if count or not stops:
        return [*stops, last]
    return [*stops[:-1], last]  # no layer follows the last boundary: its nodes join the last unit
