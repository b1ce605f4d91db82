"""Which steps lie between two sets of tensors, and which tensors can be computed and compared."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from reptrt.core.errors import ConfigError, RewriteError
from reptrt.execute.torchops.program import Program, Step


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of one sub-graph, each with the tensors that nobody reads after it."""

    steps: tuple[tuple[Step, tuple[str, ...]], ...]
    given: tuple[str, ...]  # the given tensors that are read or wanted
    constants: tuple[str, ...]  # likewise the constants that were not given


def plan_of(
    program: Program, given: Collection[str], kept: Collection[str], seen: Collection[str]
) -> Plan:
    """Plan the run from ``given`` to the tensors that are ``kept`` or only ``seen``.

    Raises:
        ConfigError: something needs a graph input that is not given.
        RewriteError: steps that are needed have obstacles; all are named.
    """
    steps, needed = _needed(program, given, {*kept, *seen})
    _refuse_obstacles(program, steps)
    missing = [name for name in program.inputs if name in needed and name not in given]
    if missing:
        raise ConfigError(
            f"graph {program.name}: {', '.join(missing)} is not among the inputs, but "
            f"{', '.join(sorted({*kept, *seen}))} needs it; give it, or a tensor after it"
        )
    constants = needed & (program.constants.keys() | program.host_constants.keys())
    return Plan(
        steps=_with_last_reads(steps, {*kept, *constants, ""}),
        given=tuple(name for name in given if name in needed),
        constants=tuple(sorted(constants - set(given))),
    )


def runnable_steps(program: Program) -> tuple[Step, ...]:
    """Return the steps that have no obstacle and need no step that has one."""
    blocked: set[str] = set()
    runnable = []
    for step in program.steps:
        if step.obstacle is None and blocked.isdisjoint(step.inputs):
            runnable.append(step)
        else:
            blocked.update(step.outputs)
    return tuple(runnable)


def comparable_tensors(program: Program) -> tuple[str, ...]:
    """Return the graph's outputs, or what stands in for those that cannot be compared.

    An output cannot be compared if it cannot be run or holds indices or truth values. In its place
    stand the last real-valued tensors in front of the nodes that make it so: boxes and scores in
    front of an NMS, logits in front of an ArgMax.
    """
    runnable = {name for step in runnable_steps(program) for name in step.outputs}
    makers = {name: step for step in program.steps for name in step.outputs}
    comparable: dict[str, None] = {}
    visited: set[str] = set()
    pending = list(reversed(program.outputs))
    while pending:
        name = pending.pop()
        if name in visited or name not in makers:
            continue
        visited.add(name)
        if name in runnable and name not in program.discrete:
            comparable[name] = None
        elif makers[name].op not in ("Shape", "Size"):
            pending += reversed(makers[name].inputs)
    return tuple(comparable)


def _refuse_obstacles(program: Program, steps: Iterable[Step]) -> None:
    problems: dict[str, list[str]] = {}
    for step in steps:
        if step.obstacle is not None:
            problems.setdefault(step.obstacle, []).append(step.name)
    if not problems:
        return
    count = sum(len(names) for names in problems.values())
    listed = "; ".join(f"{what} ({', '.join(names)})" for what, names in problems.items())
    raise RewriteError(
        f"graph {program.name}: {count} nodes cannot be run: {listed}; "
        "expected standard ONNX operators of a float or Q/DQ convolutional network: replace "
        "these nodes, or cut the graph before them"
    )


def _needed(
    program: Program, given: Collection[str], wanted: Collection[str]
) -> tuple[list[Step], set[str]]:
    """Return the steps to run, in order, and every tensor they read or that is wanted."""
    known, needed = set(given), set(wanted)
    steps = []
    for step in reversed(program.steps):
        if any(name in needed and name not in known for name in step.outputs):
            steps.append(step)
            needed.update(step.inputs)
    return steps[::-1], needed


def _with_last_reads(
    steps: list[Step], kept: Collection[str]
) -> tuple[tuple[Step, tuple[str, ...]], ...]:
    read: set[str] = set(kept)
    planned = []
    for step in reversed(steps):
        touched = dict.fromkeys((*step.inputs, *step.outputs))
        planned.append((step, tuple(name for name in touched if name not in read)))
        read.update(touched)
    return tuple(reversed(planned))
