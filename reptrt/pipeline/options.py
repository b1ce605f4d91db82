"""Options of export and calibrate."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reptrt.core.choices import (
    HighPrecision,
    Recipe,
    Resize,
    Rounding,
    SplitForm,
    SplitMode,
    SplitPrecision,
)
from reptrt.core.errors import ConfigError
from reptrt.quantize.calib.options import ThresholdOptions
from reptrt.quantize.reconstruct.options import LearnOptions

if TYPE_CHECKING:
    from reptrt.core.grid import Grid

_RECIPES: Mapping[Recipe, LearnOptions | None] = {
    "fast": None,
    "balanced": LearnOptions(iterations=40),
    "accurate": LearnOptions(),
}


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Options of `export`; None means what the source implies."""

    input_size: tuple[int, int, int] | None = None  # C, H, W
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: Resize | None = None
    opset: int = 19
    tolerance: float = 1e-4  # of the largest value, per block and overall


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """Options of `calibrate`."""

    images: int = 512
    recipe: Recipe = "fast"
    threshold: ThresholdOptions = field(default_factory=ThresholdOptions)
    equalize: bool = True
    split: SplitMode = "auto"
    split_precision: SplitPrecision = "float"
    max_overhead: float = 0.10  # extra multiply-accumulates that auto may spend, of the net's own
    full_range: bool = True  # activations after a ReLU may take all 256 codes
    correct_bias: bool = True  # take the mean error of quantized weights out of the biases
    rounding: Rounding | None = None  # of weights; None: what the recipe says
    qprep: bool | None = None  # learn a gain and shift per channel; None: what the recipe says
    keep_affine: bool = False  # leave them in the graph as Mul and Add, to look at
    iterations: int | None = None  # of each unit; None: what the recipe says
    memory_budget: float = 4.0  # GiB, of a process that learns
    learn: LearnOptions | None = None  # in place of all that the recipe says; for experiments
    weight_bits: int = 8
    activation_bits: int = 8
    exclude: tuple[str, ...] = ()  # regular expressions over layer names
    high_precision: HighPrecision = "fp32"  # of what is not INT8; fp16 for engines
    device: str = "cpu"
    seed: int = 0  # of the sample of images and of what is learned

    def __post_init__(self) -> None:
        for name, bits in (("weight", self.weight_bits), ("activation", self.activation_bits)):
            if not 2 <= bits <= 8:
                raise ConfigError(f"--{name}-bits: got {bits}, expected 2..8 (simulated in INT8)")
        if self.equalize and self.split_precision == "int8" and self.split == "coarse-fine":
            raise ConfigError(
                "--split coarse-fine --split-precision int8: the summands lie before the ReLU, "
                "where equalized channels have no common range; give --no-equalize too, or "
                "--split-precision float"
            )
        if self.keep_affine and (self.learning is None or not self.learning.affine):
            raise ConfigError(
                "--keep-affine: no gains and shifts are learned; give --qprep too, or a recipe"
            )
        if not 0 < self.memory_budget < float("inf"):
            raise ConfigError(f"--memory-budget: got {self.memory_budget}, expected GiB above 0")
        if not self.max_overhead >= 0:
            raise ConfigError(f"--max-overhead: got {self.max_overhead}, expected 0 or more")

    @property
    def split_form(self) -> SplitForm:
        """What every layer is split into that can be, if not chosen one by one.

        Of INT8 summands the identity has one factor a layer: then it is not rounded again.
        """
        if self.split == "auto":
            return "none"
        if self.split == "identity" and self.split_precision == "int8":
            return "identity-scalar"
        return self.split

    @property
    def learning(self) -> LearnOptions | None:
        """What is learned after nearest rounding; None: nothing."""
        if self.learn is not None:
            return self.learn
        base = _RECIPES[self.recipe]
        rounding = base is not None if self.rounding is None else self.rounding == "learned"
        affine = base is not None if self.qprep is None else self.qprep
        if not (rounding or affine):
            return None
        base = base or LearnOptions()
        return replace(
            base,
            rounding=rounding,
            affine=affine,
            iterations=base.iterations if self.iterations is None else self.iterations,
            memory_budget=int(self.memory_budget * 2**30),
            seed=self.seed,
        )

    @property
    def grids(self) -> "tuple[Grid, Grid]":
        """The codes of activations and of weights."""
        from reptrt.core.grid import Grid  # loads numpy, which the options themselves do without

        return Grid.activation(self.activation_bits), Grid.weight(self.weight_bits)

    @property
    def is_auto(self) -> bool:
        """Whether the outputs choose thresholds."""
        return self.threshold.rule == "auto"

    @property
    def simulation(self) -> str | None:
        """Why the result is a simulation that no engine can run; None if it is not."""
        if self.weight_bits == self.activation_bits == 8:
            return None
        return f"{self.weight_bits}-bit weights, {self.activation_bits}-bit activations inside INT8"


PLAIN_INT8 = CalibrateOptions(
    threshold=ThresholdOptions("max"),
    equalize=False,
    split="none",
    full_range=False,
    correct_bias=False,
)
"""What a quantizer does that knows nothing of branches: each tensor's maximum, nearest codes."""


def recorded_options(options: Any) -> dict[str, Any]:
    """Return an options dataclass as JSON values."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(options).items()
    }
