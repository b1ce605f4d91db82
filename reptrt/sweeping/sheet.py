"""What a sweep is to do, as values."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from reptrt.core.choices import Recipe, TargetName
from reptrt.core.option_fields import described, require_at_least
from reptrt.judge.options import TaskOptions
from reptrt.pipeline.options import CalibrateOptions, ExportOptions
from reptrt.sources.source import Source
from reptrt.sweeping.tasks import Placement
from reptrt.trt.options import BuildOptions

RecipeName = Literal["plain", Recipe]  # plain: PLAIN_INT8


@dataclass(frozen=True)  # no slots: as TaskOptions
class JudgingOptions(TaskOptions):
    """How the files of a net are judged."""

    limit: int | None = described(None, "Number of images, sampled from the data; default: all.")

    def __post_init__(self) -> None:
        TaskOptions.__post_init__(self)
        require_at_least(1, self, "limit")


@dataclass(frozen=True, slots=True)
class TrialPlan:
    """One way to calibrate a net."""

    name: str  # net/target/recipe, and /variant if it has one
    target: TargetName
    recipe: str  # of RecipeName
    variant: str | None
    options: CalibrateOptions


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """The engines that are built from every file that is made for TensorRT."""

    options: BuildOptions
    accelerators: tuple[str | None, ...]  # types of GPU as Ray names them; None: any
    placement: Placement


@dataclass(frozen=True, slots=True)
class NetPlan:
    """A net and its trials."""

    name: str
    source: Source
    export: ExportOptions
    data: Path
    eval_data: Path
    judging: JudgingOptions
    trials: tuple[TrialPlan, ...]
    engine: EnginePlan | None  # None: no engine is built
    placement: Placement = field(default_factory=Placement)


@dataclass(frozen=True, slots=True)
class Sheet:
    """A whole sweep."""

    nets: tuple[NetPlan, ...]
