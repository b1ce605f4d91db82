"""Select the steps of a run, and the tensors of a graph that can be computed and compared."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from reptrt.core.errors import ConfigError, RewriteError
from reptrt.execute.torchops.program import Program, Step


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of one sub-graph, each with the tensors that no later step reads."""

    steps: tuple[tuple[Step, tuple[str, ...]], ...]
    inputs: tuple[str, ...]  # the inputs of the run that are read or returned
    constants: tuple[str, ...]  # the constants that are read or returned and are not inputs


def plan_of(
    program: Program, inputs: Collection[str], outputs: Collection[str], observed: Collection[str]
) -> Plan:
    """Plan a run that computes outputs, which are kept, and observed tensors, which are not.

    Args:
        program: the compiled graph.
        inputs: tensors whose values the run gets.
        outputs: tensors that the run returns.
        observed: tensors that the run computes for their observers only.

    Raises:
        ConfigError: a needed graph input is not among ``inputs``.
        RewriteError: needed steps have obstacles; the message names all of them.
    """
    steps, needed = _needed(program, inputs, {*outputs, *observed})
    _refuse_obstacles(program, steps)
    missing = [name for name in program.inputs if name in needed and name not in inputs]
    if missing:
        raise ConfigError(
            f"graph {program.name}: {', '.join(missing)} is not among the inputs, but "
            f"{', '.join(sorted({*outputs, *observed}))} needs it; give it, or a tensor after it"
        )
    constants = needed & (program.constants.keys() | program.host_constants.keys())
    return Plan(
        steps=_with_last_reads(steps, {*outputs, *constants, ""}),
        inputs=tuple(name for name in inputs if name in needed),
        constants=tuple(sorted(constants - set(inputs))),
    )


def runnable_steps(program: Program) -> tuple[Step, ...]:
    """Return the steps that have no obstacle and do not depend on a step that has one."""
    blocked: set[str] = set()
    runnable = []
    for step in program.steps:
        if step.obstacle is None and blocked.isdisjoint(step.inputs):
            runnable.append(step)
        else:
            blocked.update(step.outputs)
    return tuple(runnable)


def comparable_tensors(program: Program) -> tuple[str, ...]:
    """Return the graph's outputs, with replacements for those that cannot be compared.

    An output cannot be compared if it cannot be computed, or if it holds indices or truth values.
    It is replaced by the last real-valued tensors before the nodes that cause this: by the boxes
    and scores before an NMS, by the logits before an ArgMax.
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
    listed = "; ".join(f"{obstacle} ({', '.join(names)})" for obstacle, names in problems.items())
    raise RewriteError(
        f"graph {program.name}: {count} nodes cannot be run: {listed}; "
        "expected standard ONNX operators of a float or Q/DQ convolutional network: replace "
        "these nodes, or cut the graph before them"
    )


def _needed(
    program: Program, inputs: Collection[str], results: Collection[str]
) -> tuple[list[Step], set[str]]:
    """Return the steps to run in order, and every tensor that they read or that is a result."""
    available, needed = set(inputs), set(results)
    steps = []
    for step in reversed(program.steps):
        if any(name in needed and name not in available for name in step.outputs):
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
