"""Options of the choice, and its results."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from reptrt.core.choices import SplitForm, SplitPrecision
from reptrt.core.grid import Grid
from reptrt.quantize.targets import TARGETS, Costs

# whole: no layer is split; identity: every layer where that form halves the weight noise;
# balance: layers whose weight noise exceeds the activation noise, in the cheapest form that helps
Policy = Literal["whole", "identity", "balance"]


@dataclass(frozen=True, slots=True)
class ChooseOptions:
    """What may be chosen, and what it may cost."""

    activations: Grid  # codes of activations
    weights: Grid  # codes of weights
    max_overhead: float  # extra multiply-accumulates allowed, as a fraction of the net's own
    policy: Policy = "balance"  # which layers are to be split
    # precision of a split layer's two summands; with INT8 summands only the scalar identity split
    # is considered, because its skip is not rounded and its other summand has known bounds
    precision: SplitPrecision = "float"
    # the part of the weight noise that is left when the weights are rounded: less than 1 where
    # rounding will be learned; then full range goes before splits
    remaining: float = 1.0
    costs: Costs = TARGETS["tensorrt"].costs


@dataclass(frozen=True, slots=True)
class Option:
    """One form that a layer can take."""

    form: SplitForm
    weight_noise: float  # with INT8 summands also that of rounding one of them
    extra_macs: int  # per image


@dataclass(frozen=True, slots=True)
class Decision:
    """The form chosen for one layer, and the numbers behind the choice."""

    layer: str
    form: SplitForm
    signal: float  # sum W^2 E[x^2], in the unit of the noises
    activation_noise: float
    options: tuple[Option, ...]
    reason: str

    def option(self, form: SplitForm) -> Option:
        """Return the numbers of one form."""
        return next(option for option in self.options if option.form == form)


@dataclass(frozen=True, slots=True)
class RangeDecision:
    """Whether one activation uses the full range of codes."""

    tensor: str
    full: bool
    gain: float  # activation noise that full range removes, over the signal, summed over readers
    extra_macs: int  # per image


def full_range_of(ranges: Collection[RangeDecision]) -> tuple[str, ...]:
    """Return the activations that use the full range of codes."""
    return tuple(decision.tensor for decision in ranges if decision.full)


@dataclass(frozen=True, slots=True)
class Choice:
    """All decisions for one net."""

    splits: tuple[Decision, ...]
    ranges: tuple[RangeDecision, ...]

    @property
    def extra_macs(self) -> int:
        """Multiply-accumulates per image that the choice adds to the net."""
        splits = sum(decision.option(decision.form).extra_macs for decision in self.splits)
        return splits + sum(decision.extra_macs for decision in self.ranges if decision.full)
