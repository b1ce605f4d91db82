"""Cut a graph into units that are learned one after the other, and units into stages.

A boundary lies where few tensors are alive: in a chain one, behind every activation function. In a
residual block two are alive inside, so the block is one unit. Where no single tensor passes for a
long way (the neck of a detector), a boundary takes all tensors that are alive, so any graph can be
cut. A boundary tensor is one that is quantized, as it is before its rounding: the unit that reads
it learns its step.

A stage is a run of units whose outputs have the same height and width.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from reptrt.execute.torchgraph import TorchGraph
from reptrt.execute.torchops.program import Step

MAX_LAYERS = 8  # of a unit, if no single tensor passes earlier


@dataclass(frozen=True, slots=True)
class Unit:
    """A run of nodes between two boundaries."""

    name: str  # of its last layer
    inputs: tuple[str, ...]  # the boundary's tensors that it reads
    outputs: tuple[str, ...]  # what later units, or the caller, read of it
    nodes: frozenset[str]
    layers: tuple[str, ...]  # weighted nodes, in order
    stage: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The units of a net and the tensors that pass between them."""

    units: tuple[Unit, ...]
    alive: tuple[tuple[str, ...], ...]  # after each unit: the tensors that are read later
    shapes: Mapping[str, tuple[int, ...]]  # of one image: boundary tensor -> shape without batch


def find_units(
    graph: TorchGraph,
    sample: torch.Tensor,
    layers: Collection[str],
    quantized: Collection[str],
    *,
    layers_per_unit: int = 1,
) -> Layout:
    """Return the units of a float graph.

    Args:
        graph: the float graph, with one input.
        sample: a few images, from which the shapes are learned.
        layers: weighted nodes that count; of a split layer one.
        quantized: tensors that have a Q/DQ pair in the quantized graph.
        layers_per_unit: how many layers a unit has at least, where the net is long enough.
    """
    shapes = _shapes(graph, sample)
    steps = [step for step in graph.steps if any(name in shapes for name in step.outputs)]
    alive = _alive_after(steps, graph)
    stops = _boundaries(steps, alive, layers, {*quantized}, layers_per_unit)
    units: list[Unit] = []
    start, stage, size = 0, 0, 0
    before: tuple[str, ...] = graph.input_names
    for stop in stops:
        part, after = steps[start : stop + 1], alive[stop]
        made = {name for step in part for name in step.outputs}
        read = {name for step in part for name in step.inputs}
        outputs = tuple(name for name in after if name in made)
        area = max(_area(shapes[name]) for name in outputs)
        stage += bool(units) and area != size
        size = area
        found = tuple(step.name for step in part if step.name in layers)
        units.append(
            Unit(
                found[-1] if found else part[-1].name,
                tuple(name for name in before if name in read),
                outputs,
                frozenset(step.name for step in part),
                found,
                stage,
            )
        )
        start, before = stop + 1, after
    return Layout(tuple(units), tuple(alive[stop] for stop in stops), shapes)


def stage_end(units: Sequence[Unit], index: int) -> int:
    """Return the unit whose output supervises unit ``index``: the last one of its stage.

    The last unit of a stage is supervised by the end of the next one, the last stage by the net's.
    """
    last = max(i for i, unit in enumerate(units) if unit.stage == units[index].stage)
    if last == index and last + 1 < len(units):
        return max(i for i, unit in enumerate(units) if unit.stage == units[last + 1].stage)
    return last


def _shapes(graph: TorchGraph, sample: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """Return the shape per image of every floating tensor that has the batch as first axis."""
    constants = graph.constants.keys()
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, value: torch.Tensor) -> None:
        if value.is_floating_point() and value.dim() > 1 and value.shape[0] == len(sample):
            shapes[name] = tuple(value.shape[1:])

    names = [name for step in graph.steps for name in step.outputs if name not in constants]
    observers = {name: functools.partial(note, name) for name in (*graph.input_names, *names)}
    with torch.inference_mode():
        graph.run({graph.input_names[0]: sample}, graph.output_names, observe=observers)
    return shapes


def _area(shape: tuple[int, ...]) -> int:
    """Return height times width of one image's tensor (C, H, W); 1 for a vector."""
    return shape[1] * shape[2] if len(shape) == 3 else 1


def _alive_after(steps: Sequence[Step], graph: TorchGraph) -> list[tuple[str, ...]]:
    """Return, for each step, the computed tensors that are read after it, in order of making."""
    order = list(dict.fromkeys([*graph.input_names, *(n for s in steps for n in s.outputs)]))
    known, wanted = set(order), set(graph.output_names)
    alive: list[tuple[str, ...]] = []
    for step in reversed(steps):
        alive.append(tuple(name for name in order if name in wanted))
        wanted -= set(step.outputs)
        wanted |= set(step.inputs) & known
    return alive[::-1]


def _boundaries(
    steps: Sequence[Step],
    alive: Sequence[tuple[str, ...]],
    layers: Collection[str],
    quantized: set[str],
    layers_per_unit: int,
) -> list[int]:
    """Return the index of the last step of each unit."""
    made = {name for step in steps for name in step.outputs}
    stops, count = [], 0
    for index, step in enumerate(steps):
        count += step.name in layers
        ready = quantized & set(step.outputs) and all(name in made for name in alive[index])
        single = len(alive[index]) == 1 and count >= layers_per_unit
        if count and ready and (single or count >= max(MAX_LAYERS, layers_per_unit)):
            stops.append(index)
            count = 0
    last = len(steps) - 1
    if count or not stops:
        return [*stops, last]
    return [*stops[:-1], last]  # what follows the last boundary holds no layer
