"""Signal and noises at the output of one convolution, for each form that it can take."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.core.arrays import FloatArray
from reptrt.core.choices import SplitForm
from reptrt.core.grid import Grid, channel_amax
from reptrt.graph.net import constant_value
from reptrt.graph.qdq import quantize_weight
from reptrt.quantize.calib.channels import ChannelStats
from reptrt.quantize.choose.cost import split_macs
from reptrt.quantize.choose.decisions import Option
from reptrt.quantize.targets import Costs
from reptrt.rewrite import split_coarse_fine as coarse_fine
from reptrt.rewrite import split_identity as identity
from reptrt.rewrite.linear import spread_over_kernel


@dataclass(frozen=True, slots=True)
class LayerNoise:
    """Powers at a layer's output, per position, summed over output channels."""

    signal: float  # sum W^2 E[x^2]
    activation_noise: float  # sum W^2 step_x^2 / 12
    options: tuple[Option, ...]  # the whole layer first, then the splits that it can take


Noises: TypeAlias = dict[tuple[str, Grid], LayerNoise]  # by layer and codes of its input


def layer_noise(
    node: gs.Node, stats: ChannelStats, activations: Grid, weights: Grid, costs: Costs
) -> LayerNoise:
    """Return the noises of a convolution.

    Args:
        node: the convolution, with a constant weight.
        stats: of its input.
        activations: codes of the input.
        weights: codes of the weight.
        costs: of passes.
    """
    weight = np.asarray(constant_value(node.inputs[1]), dtype=np.float64)
    groups = int(node.attrs.get("group", 1))
    step = float(stats.maximum.max()) / activations.qmax
    mean_square = spread_over_kernel(stats.mean_square, weight, groups)
    variance = spread_over_kernel(stats.variance, weight, groups)
    return LayerNoise(
        signal=float((np.square(weight) * mean_square).sum()),
        activation_noise=float(np.square(weight).sum()) * step**2 / 12.0,
        options=tuple(_options(node, weight, variance, weights, costs)),
    )


def _options(
    node: gs.Node, weight: FloatArray, variance: FloatArray, grid: Grid, costs: Costs
) -> list[Option]:
    parts: list[tuple[SplitForm, FloatArray]] = [("none", weight)]
    if identity.reason_against(node) is None:
        forms: tuple[SplitForm, ...] = ("identity-scalar", "identity")
        factors = ((form, identity.factor_of(weight, grid, form)) for form in forms)
        parts += [
            (form, identity.without_diagonal(weight, factor))
            for form, factor in factors
            if factor is not None
        ]
    if coarse_fine.reason_against(node) is None:
        parts.append(("coarse-fine", coarse_fine.coarse_and_fine(weight, grid)[1]))
    return [
        Option(form, _weight_noise(part, variance, grid), split_macs(node, form, costs))
        for form, part in parts
    ]


def rounding_of_rest(
    node: gs.Node, stats: ChannelStats, output: float, activations: Grid, weights: Grid
) -> float:
    """Return the noise of rounding the rest of a scalar identity split to INT8, as of a layer.

    Of y = relu(rest + d0 x) the rest represents y - d0 x, between -d0 x and y. Its threshold is the
    one with the least error and covers about the larger of both ranges:

        O step^2 / 12        step = max(largest y, |d0| largest |x|) / q        for O outputs

    Args:
        node: a convolution.
        stats: of its input.
        output: largest y.
        activations: codes of the rest.
        weights: codes of the weight.
    """
    weight = np.asarray(constant_value(node.inputs[1]))
    factor = identity.factor_of(weight, weights, "identity-scalar")
    skip = 0.0 if factor is None else float(np.abs(factor).max()) * float(stats.maximum.max())
    step = max(output, skip) / activations.full_range.qmax
    return len(weight) * step**2 / 12.0


def _weight_noise(weight: FloatArray, variance: FloatArray, grid: Grid) -> float:
    """Return sum (W - Q(W))^2 Var[x]; ``variance`` broadcasts over the weight."""
    quantized = quantize_weight(weight.astype(np.float32), 0, grid)
    error = weight - quantized.dequantized()
    return float((np.square(error) * variance).sum())


def int8_obstacle(node: gs.Node, form: SplitForm, grid: Grid) -> str | None:
    """Return why a split into INT8 summands does not pay for a layer, or None if it does.

    Rounding a summand adds noise, so each rounded summand has to bring 3 dB: sum_o step_o^2 of the
    rest must be at most half of the whole kernel's in the identity form, whose skip is not rounded,
    and at most a quarter in the coarse-fine form. The rule looks at weights only. Ours.
    """
    weight = constant_value(node.inputs[1])
    if form == "coarse-fine":
        reason = coarse_fine.reason_against(node)
        if reason is not None or weight is None:
            return reason
        rest, limit = coarse_fine.coarse_and_fine(weight, grid)[1], 1 / 4
    else:
        reason = identity.reason_against(node)
        if reason is not None or weight is None:
            return reason
        factor = identity.factor_of(weight, grid, "identity-scalar")
        if factor is None:
            return identity.NO_FACTOR
        rest, limit = identity.without_diagonal(weight, factor), 1 / 2
    before, after = (np.square(channel_amax(part, 0)).sum() for part in (weight, rest))
    if after <= limit * before:
        return None
    return (
        "rounding the INT8 summands would add more noise than the split removes (squared steps "
        f"fall to {after / before:.2g} of the whole kernel's, expected at most {limit:g})"
    )
