"""Choose layers that stay in float although they could be INT8: `--float auto:N`.

A layer in float takes about twice the time of its INT8 form, so it costs its share of the net's
time. That is at most the larger of two shares: of the multiply-accumulates, and of the bytes moved
(the roofline model, as if the whole net were bound by what this layer needs most). Rules (ours):

1. The layers are tried from the one that costs most alone (`quantize.calib.sensitivity`).
2. A layer pays if the error of the whole net's outputs falls by a larger share than its price, and
   by a twentieth or more, in both halves of the held-out images: a single image that is clipped
   can have most of the error of one half. A layer with a smaller share of all layers' errors alone
   cannot pay and is not tried.
3. A layer that pays stays in float, and the next one is tried with it, until N are kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_graphsurgeon as gs

from reptrt.graph.net import Net, constant_value, weighted_nodes
from reptrt.quantize.choose.cost import num_positions, num_values

LEAST_GAIN = 0.05  # of the error of the outputs


@dataclass(frozen=True, slots=True)
class Price:
    """What a layer costs in float, as fractions of the net's own layers."""

    macs: float  # multiply-accumulates
    moved: float  # values of weight, input and output

    @property
    def share(self) -> float:
        """The larger of the two."""
        return max(self.macs, self.moved)


@dataclass(frozen=True, slots=True)
class FloatDecision:
    """Whether one layer stays in float, and the numbers behind it."""

    layer: str
    kept: bool
    alone: float  # fraction of the summed errors of all layers alone
    # fraction of the net's error that goes if it is kept too, in the half of the images where that
    # is less; None: not tried
    gain: float | None
    price: Price
    reason: str


@dataclass(frozen=True, slots=True)
class FloatChoice:
    """The layers that were looked at, from the one that costs most alone."""

    most: int  # the number of layers that may be kept
    images: int  # held-out images that judged
    error_before: float  # of the outputs; its unit is that of `quantize.calib.outputs`
    error_after: float  # with the kept layers in float
    gain: float  # fraction of the error that they take away, in the half where that is less
    decisions: tuple[FloatDecision, ...]

    @property
    def kept(self) -> tuple[str, ...]:
        """The layers that stay in float."""
        return tuple(decision.layer for decision in self.decisions if decision.kept)

    @property
    def pays(self) -> bool:
        """Whether the kept layers together take away more than they cost."""
        prices = [decision.price for decision in self.decisions if decision.kept]
        macs, moved = (sum(p.macs for p in prices), sum(p.moved for p in prices))
        return self.gain > max(macs, moved, LEAST_GAIN)

    @property
    def summary(self) -> str:
        """The choice in a few words."""
        if not self.kept:
            worst = self.decisions[0] if self.decisions else None
            why = f"; {worst.layer}: {worst.reason}" if worst is not None else ""
            return f"none, no layer pays{why}"
        names = ", ".join(self.kept)
        return f"{names}; the error of the outputs falls by {100 * self.gain:.0f} % or more"

    def without_any(self) -> "FloatChoice":
        """Return the choice with no layer kept, since the net calibrated again does not pay."""
        reason = f"calibrated again, only {100 * max(self.gain, 0.0):.1f} % of the error go away"
        decisions = tuple(
            replace(decision, kept=False, reason=reason) if decision.kept else decision
            for decision in self.decisions
        )
        return replace(self, error_after=self.error_before, gain=0.0, decisions=decisions)


def keep_in_float(
    alone: Mapping[str, float],
    prices: Mapping[str, Price],
    most: int,
    error: Callable[[Sequence[str]], Sequence[float]],
    images: int,
) -> FloatChoice:
    """Return which layers stay in float, by the rules above.

    Args:
        alone: layer -> error of the outputs if only this layer is INT8.
        prices: layer -> what it costs in float.
        most: how many layers may be kept; one layer always stays INT8.
        error: returns the errors of the INT8 net's outputs with some layers in float, in each part
            of the images.
        images: how many images ``error`` looks at.
    """
    total = sum(alone.values()) or 1.0
    shares = {layer: alone[layer] / total for layer in sorted(alone, key=lambda n: -alone[n])}
    before = now = error(())
    kept: list[str] = []
    decisions: list[FloatDecision] = []
    for layer, share in list(shares.items())[: len(shares) - 1]:
        if len(kept) == most or (share < LEAST_GAIN and len(decisions) >= most):
            break
        price, gain, changed = prices[layer], None, now
        least = max(price.share, LEAST_GAIN)
        if share >= least:
            changed = error((*kept, layer))
            gain = least_fall(now, changed)
        pays = gain is not None and gain > least
        if pays:
            kept, now = [*kept, layer], changed
        reason = _reason(share if gain is None else gain, price, pays)
        decisions.append(FloatDecision(layer, pays, share, gain, price, reason))
    gain = least_fall(before, now)
    return FloatChoice(most, images, sum(before), sum(now), gain, tuple(decisions))


def least_fall(before: Sequence[float], after: Sequence[float]) -> float:
    """Return the fraction by which errors fall, in the part of the images where that is least."""
    falls = [1.0 - now / old if old else 0.0 for old, now in zip(before, after, strict=True)]
    return min(falls)


def prices_of(net: Net) -> dict[str, Price]:
    """Return the price of every layer, from the shapes of a float net before splits."""
    nodes = weighted_nodes(net.graph)
    macs = {node.name: _size(node) * num_positions(node.outputs[0]) for node in nodes}
    moved = {node.name: _size(node) + sum(map(num_values, _ends(node))) for node in nodes}
    sums = sum(macs.values()) or 1, sum(moved.values()) or 1
    return {name: Price(macs[name] / sums[0], moved[name] / sums[1]) for name in macs}


def _reason(gain: float, price: Price, pays: bool) -> str:
    work = f"{100 * price.macs:.1f} % of the work, {100 * price.moved:.1f} % of the bytes"
    if pays:
        return f"float takes {100 * gain:.0f} % of the error away, for {work}"
    if gain < LEAST_GAIN:
        return f"float takes only {100 * max(gain, 0.0):.1f} % of the error away"
    return f"float costs more than it brings: {100 * gain:.1f} % of the error, for {work}"


def _size(node: gs.Node) -> int:
    weight = constant_value(node.inputs[1])
    return 0 if weight is None else int(weight.size)


def _ends(node: gs.Node) -> tuple[gs.Tensor, gs.Tensor]:
    return node.inputs[0], node.outputs[0]
