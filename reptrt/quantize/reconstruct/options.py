"""Options of reconstruction and what it reports."""

from dataclasses import dataclass
from typing import Literal

from reptrt.core.errors import ConfigError

Kept = Literal["learned", "nearest"]


@dataclass(frozen=True, slots=True)
class LearnOptions:
    """What is learned, and for how long.

    Rounding has to settle within few iterations: at a rate of 0.01, as is usual with thousands of
    them, three quarters of the weights are still between two codes after 200, and hardening them
    undoes what was learned. Rates, iterations and regularizer were chosen on held-out calibration
    images. What brought nothing there is off: the stage term, larger units, the polish.
    """

    rounding: bool = True  # of weights: floor or ceiling
    affine: bool = True  # gain and shift of each layer (QPRep)
    steps: bool = True  # of activations
    loss: Literal["mae", "mse"] = "mae"
    iterations: int = 100  # of each unit
    polish: int = 0  # of the whole net afterwards, on its outputs; rounding stays
    stage_weight: float = 0.0  # of the stage term in the loss
    layers_per_unit: int = 1
    batch: int = 32
    rounding_rate: float = 0.3
    affine_rate: float = 1e-3
    step_rate: float = 1e-3  # of the logarithm of the step
    regularizer: float = 1.0  # of the mean over weights
    memory_budget: int = 4 << 30  # bytes; activations between units take what it leaves
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "batch", "layers_per_unit", "memory_budget"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.polish < 0 or not self.stage_weight >= 0:
            raise ConfigError("polish, stage_weight: expected 0 or more")


@dataclass(frozen=True, slots=True)
class UnitReport:
    """What became of one unit; errors are relative, on held-out calibration images."""

    unit: str
    layers: tuple[str, ...]
    nearest: float  # error before
    learned: float  # error after learning
    kept: Kept
    changed_codes: int  # weights that are not rounded to nearest
    seconds: float


@dataclass(frozen=True, slots=True)
class ReconstructReport:
    """What reconstruction did."""

    units: tuple[UnitReport, ...]
    storage: str  # of the activations between units: float32, float16 or disk
    held_out: int  # images that nothing was learned from
