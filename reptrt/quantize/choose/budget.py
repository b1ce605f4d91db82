"""Spend a budget on splits and full ranges, first on those that remove most noise per cost."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from reptrt.core.choices import SplitForm
from reptrt.quantize.choose.decisions import Choice, Decision, RangeDecision

_Bought = set[tuple[str, SplitForm | None]]  # (layer, form) of splits, (tensor, None) of ranges


@dataclass(frozen=True, slots=True)
class _Move:
    """One step that costs something: another form of a layer, or full range of a tensor."""

    name: str  # of the layer or tensor
    form: SplitForm | None  # None: full range
    gain: float  # noise that it removes, over the signal
    extra_macs: int  # cost beyond that of the step before it

    @property
    def rate(self) -> float:
        """Gain per cost."""
        return self.gain / self.extra_macs if self.extra_macs else float("inf")


def within_budget(
    splits: Collection[Decision],
    ranges: Collection[RangeDecision],
    budget: float,
    *,
    remaining: float,
) -> Choice:
    """Return the decisions that the budget allows.

    Args:
        splits: the form that each layer should take.
        ranges: the activations that can have full range.
        budget: multiply-accumulates per image.
        remaining: the part of the weight noise that is left when the weights are rounded.
    """
    moves = [
        replace(move, gain=remaining * move.gain)
        for decision in splits
        for move in _upgrades(decision)
    ]
    moves += [_Move(d.tensor, None, d.gain, d.extra_macs) for d in ranges]
    bought = _buy(moves, budget)
    return Choice(
        tuple(_affordable(decision, bought) for decision in splits),
        tuple(replace(d, full=(d.tensor, None) in bought) for d in ranges),
    )


def _upgrades(decision: Decision) -> list[_Move]:
    """Return the steps from the whole layer to its desired form, in order of falling rate.

    The steps follow the lower convex hull of noise over cost, so the steps that a small budget
    leaves out are those that gain least per cost.
    """
    current, moves = decision.option("none"), []
    target = decision.option(decision.form)
    while current.form != target.form:
        ahead = [
            option
            for option in decision.options
            if current.extra_macs < option.extra_macs < target.extra_macs or option is target
        ]
        steps = [
            _Move(
                decision.layer,
                option.form,
                (current.weight_noise - option.weight_noise) / (decision.signal or 1.0),
                option.extra_macs - current.extra_macs,
            )
            for option in ahead
        ]
        best = max(steps, key=lambda move: move.rate)
        moves.append(best)
        current = decision.option(best.form or "none")
    return moves


def _buy(moves: Collection[_Move], budget: float) -> _Bought:
    """Return the moves that the budget allows, the best rate first.

    A layer's later steps are not bought once one of its steps does not fit.
    """
    bought: _Bought = set()
    closed: set[str] = set()
    for move in sorted(moves, key=lambda move: move.rate, reverse=True):
        if move.extra_macs > budget or move.name in closed:
            closed.add(move.name)
            continue
        budget -= move.extra_macs
        bought.add((move.name, move.form))
    return bought


def _affordable(decision: Decision, bought: _Bought) -> Decision:
    """Return the decision with the last form that was bought on the way to the desired one."""
    final: SplitForm = "none"
    for move in _upgrades(decision):
        if (move.name, move.form) in bought and move.form is not None:
            final = move.form
    if final == decision.form:
        return decision
    reason = f"{decision.reason}; {decision.form} is beyond the budget"
    return replace(decision, form=final, reason=reason)
