"""Options of learned calibration, and its report."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from reptrt.core.errors import ConfigError

Kept = Literal["learned", "corrected", "start"]


@dataclass(frozen=True, slots=True)
class LearnOptions:
    """What is learned, and for how long.

    Rounding must settle within few iterations. At the usual rate of 0.01, three quarters of the
    weights are still between two codes after 200 iterations, and hardening them undoes what was
    learned; hence the high rate. Rates, iterations and regularizer were chosen on held-out
    calibration images. The stage term brought nothing there and is off by default.
    """

    correct: bool = False  # start from codes that make up for the errors of the layers before
    weighted: bool = False  # errors of units and layers count as they do at the outputs of the net
    rounding: bool = True  # learn whether each weight is rounded down or up
    affine: bool = True  # learn a gain and a shift per channel of each layer (QPRep)
    steps: bool = True  # learn the steps of activations
    loss: Literal["mae", "mse"] = "mae"
    iterations: int = 100  # per unit
    stage_weight: float = 0.0  # weight of the stage term in the loss
    batch: int = 32  # images per iteration
    rounding_rate: float = 0.3
    affine_rate: float = 1e-3
    step_rate: float = 1e-3  # learning rate of the logarithm of the step
    regularizer: float = 1.0  # weight of the rounding regularizer, a mean over weights
    memory_budget: int = 4 << 30  # bytes for the process; decides where activations are stored
    seed: int = 0  # draws the held-out images and the batches

    def __post_init__(self) -> None:
        for name in ("iterations", "batch", "memory_budget"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if not self.stage_weight >= 0:
            raise ConfigError(f"stage_weight: got {self.stage_weight}, expected 0 or more")


@dataclass(frozen=True, slots=True)
class UnitReport:
    """The result for one unit; errors are relative and measured on held-out images."""

    unit: str
    layers: tuple[str, ...]
    start: float  # error before learning
    learned: float  # error after learning
    kept: Kept
    changed_codes: int  # codes that learning changed
    seconds: float


@dataclass(frozen=True, slots=True)
class ReconstructReport:
    """The results for all units."""

    units: tuple[UnitReport, ...]
    storage: str  # of the activations between units: float32, float16 or disk
    held_out: int  # number of images that judge units and are never learned from


def progress_of(reports: Sequence[UnitReport]) -> str:
    """Return the label of the progress bar: the last unit, its error before and after."""
    if not reports:
        return "learn"
    last = reports[-1]
    return f"learn, {last.unit}: {last.start:.2%} -> {last.learned:.2%}, {last.kept} kept"
