"""Which steps lie between given and wanted tensors, and who reads each tensor last."""

from collections.abc import Collection
from dataclasses import dataclass

from reptrt.core.errors import ConfigError
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
    """
    steps, needed = _needed(program, given, {*kept, *seen})
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
