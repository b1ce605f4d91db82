"""Options of the choice of thresholds; importing this loads nothing heavy."""

from dataclasses import dataclass, replace
from typing import get_args

from reptrt.core.choices import Rule, Threshold
from reptrt.core.errors import ConfigError, option
from reptrt.core.option_fields import check_bounds, described

_CANDIDATES: tuple[Rule, ...] = ("max", "percentile", "mse", "kl")


@dataclass(frozen=True, slots=True)
class ThresholdOptions:
    """The rule that sets the thresholds of activations, and its parameter."""

    rule: Threshold | None = described(
        None,
        "Rule that sets the thresholds of activations; auto tries max, percentile, mse and kl, "
        "takes the rule whose outputs are closest on held-out images, and adds a margin; default: "
        "auto, kl for the recipe cfws, max for repapq.",
        flag="--threshold",
    )
    percentile: float = described(
        99.99, "Percentile of |x| for --threshold percentile.", minimum=50, maximum=100
    )

    def __post_init__(self) -> None:
        rules = get_args(Threshold)
        if self.rule is not None and self.rule not in rules:
            raise ConfigError(f"{option('threshold')}: got {self.rule!r}, expected one of {rules}")
        check_bounds(self)

    @property
    def is_auto(self) -> bool:
        """Whether the rule is chosen by its effect on the outputs."""
        return self.rule in (None, "auto")

    @property
    def candidates(self) -> tuple["ThresholdOptions", ...]:
        """The rules that ``auto`` compares by their effect on the outputs; else the one rule."""
        if not self.is_auto:
            return (self,)
        return tuple(replace(self, rule=rule) for rule in _CANDIDATES)
