"""A piece of work, where it may run, and what came of it; the protocol of those who run it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from reptrt.core.errors import ConfigError, option
from reptrt.core.option_fields import check_bounds, described


@dataclass(frozen=True, slots=True)
class Placement:
    """What a machine has to have; Ray places tasks by it, processes of this machine ignore it."""

    cpus: float = described(1.0, "CPU cores.", minimum=0)
    gpus: float = described(0.0, "GPUs; a fraction shares one.", minimum=0)
    memory_gib: float = described(0.0, "Memory in GiB; 0: not asked for.", minimum=0)
    accelerator_type: str | None = described(None, "Type of the GPU, as Ray names it: A100.")
    resources: Mapping[str, float] = field(default_factory=dict)  # own resources of the cluster

    def __post_init__(self) -> None:
        check_bounds(self)
        for name, amount in self.resources.items():
            if not amount > 0:
                raise ConfigError(
                    f"{option('resources')}: {name}: got {amount}, expected a number above 0"
                )

    @property
    def key(self) -> str:
        """A text that is equal for equal placements."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True, slots=True)
class Task:
    """A call of a function with JSON values, which may run in another process or machine."""

    name: str  # for people
    work: str  # "module:function", from a mapping of JSON values to a JSON value
    payload: Mapping[str, Any]
    placement: Placement = field(default_factory=Placement)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a task: one of result, failure and death."""

    task: Task
    result: Any = None
    failure: str | None = None  # what the function raised, in one line
    death: str | None = None  # why the worker died
    attempts: int = 1  # how often it was started


class Executor(Protocol):
    """Runs tasks elsewhere, several at a time."""

    def slots(self, placement: Placement) -> int:
        """Return how many tasks with a placement are worth having started."""

    def start(self, task: Task) -> None:
        """Start a task, or queue it."""

    def wait(self) -> Outcome:
        """Return what came of one of the started tasks, as soon as one has ended."""

    def close(self) -> None:
        """End everything that was started."""
