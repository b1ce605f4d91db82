"""The factors by which the channels of an activation are equalized, against both noises (ours).

Scaling channel c of a tensor by r[c] and the weights that read it by 1 / r[c] changes no value of
the float net, but it changes both noises at the outputs of a reader:

    N_a(r) = s_x^2 / 12  sum over o, c, t of (W[o,c,t] / r[c])^2
    N_w(r) = sum over o of s_o^2 / 12  sum over c, t of r[c]^2 V[c]

    s_x = max over c of r[c] R[c] / q_x          s_o = max over c, t of |W[o,c,t]| / r[c] / q_w

R is the range of a channel, V its variance, q the largest code. r = 1 / R makes all ranges
equal, which is good for N_a. But it divides the columns of W by very different numbers: the steps
of the weights grow, and N_w with them. So the factors minimise

    J(r) = sum over readers of (N_a + N_w) / signal              signal = sum W^2 E[x^2]

s_o is that of the form which the reader takes: an identity split takes the diagonal out of the
maximum; a coarse-fine split leaves the taps around the centre, and half a coarse step in it. Sums,
products, powers and maxima of functions that are log-convex in log r are log-convex: log J is
convex in log r and has one minimum, which descent finds. J does not depend on a common factor of
all channels; r has a geometric mean of 1.

The largest |x| on a few hundred images understates what other images hold, most of all where a
channel is rarely active. So R is moved a little towards the range of the whole tensor:

    log R[c] = (1 - p) log max |x_c| + p log max |x|
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.core.arrays import Float64Array, FloatArray
from reptrt.core.choices import SplitForm
from reptrt.graph.net import constant_value
from reptrt.quantize.calib.channels import ChannelStats
from reptrt.rewrite import split_coarse_fine as coarse_fine
from reptrt.rewrite import split_identity as identity

_SMALLEST = 1e-3  # of the largest channel range: a smaller range counts as this, to bound factors
_PRIOR = 0.06  # by which log R is moved towards that of the channel with the largest values
_STEPS = 60
_RATE = (0.3, 0.005)  # of Adam on log r, first and last
_POWER = (16.0, 256.0)  # of the norms that stand for the two maxima, first and last


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """What J needs to know of one layer that reads the tensor."""

    log_largest: FloatArray  # log max over t of |W|, (groups, O / groups, C / groups)
    squares: Float64Array  # sum of W^2 over outputs and taps, (C,)
    variance: Float64Array  # V times the number of taps, (C,)
    log_range: Float64Array  # log R after the prior, (C,)
    signal: float
    input_levels: int  # q_x
    weight_levels: int  # q_w


def range_of_channels(maximum: Float64Array) -> Float64Array:
    """Return the range that counts for each channel, (C,), at least `_SMALLEST` of the largest."""
    return np.maximum(maximum.astype(np.float64), _SMALLEST * float(maximum.max()))


def reader_of(
    node: gs.Node,
    stats: ChannelStats,
    form: SplitForm,
    *,
    input_levels: int,
    weight_levels: int,
) -> Reader:
    """Return a layer as J sees it.

    Args:
        node: a Conv, or a Gemm with transB, with a constant weight.
        stats: of its input.
        form: that it will take.
        input_levels: q_x.
        weight_levels: q_w.
    """
    weight = np.asarray(constant_value(node.inputs[1]), dtype=np.float64)
    outputs, inputs = weight.shape[:2]
    groups = int(node.attrs.get("group", 1))
    taps = int(np.prod(weight.shape[2:]))
    largest = _step_setting(node, weight, form, weight_levels).reshape(groups, -1, inputs)
    squares = np.square(weight).reshape(groups, outputs // groups, inputs, taps).sum((1, 3))
    tiny = np.finfo(np.float64).tiny
    logs = np.log(np.maximum(range_of_channels(stats.maximum), tiny))
    return Reader(
        np.log(np.maximum(largest, tiny)),
        squares.reshape(-1),
        stats.variance * taps,
        (1 - _PRIOR) * logs + _PRIOR * logs.max(),
        float((squares.reshape(-1) * stats.mean_square).sum()),
        input_levels,
        weight_levels,
    )


def _step_setting(
    node: gs.Node, weight: Float64Array, form: SplitForm, levels: int
) -> Float64Array:
    """Return the largest |W| that a step has to cover, (O, C / groups)."""
    magnitudes = np.abs(weight)
    if form.startswith("identity") and identity.reason_against(node) is None:
        magnitudes = np.abs(identity.without_diagonal(weight, identity.diagonal_of(weight)))
    if form == "coarse-fine" and coarse_fine.reason_against(node) is None:
        row, column = coarse_fine.centre_of(weight)
        magnitudes[..., row, column] /= 2 * levels
    return np.asarray(magnitudes.reshape(*weight.shape[:2], -1).max(axis=2))


def best_factors(readers: Sequence[Reader]) -> Float64Array:
    """Return the factors (C,) with the least J, by Adam on log J with smooth maxima.

    Args:
        readers: of one tensor, at least one.
    """
    alive = [
        replace(reader, log_largest=reader.log_largest.astype(np.float32))  # four times as fast
        for reader in readers
        if reader.signal > 0
    ]
    logs = -np.mean([reader.log_range for reader in readers], axis=0)
    if not alive:
        return np.ones(len(logs))
    best, least = logs, np.inf
    mean, square = np.zeros_like(logs), np.zeros_like(logs)
    for step in range(_STEPS):
        done = step / (_STEPS - 1)
        noise, gradient = noise_and_gradient(logs, alive, _between(_POWER, done))
        if noise < least:
            best, least = logs, noise
        gradient = gradient / noise
        mean += 0.1 * (gradient - mean)
        square += 0.01 * (np.square(gradient) - square)
        left = 1 - 0.9 ** (step + 1), 1 - 0.99 ** (step + 1)
        move = mean / left[0] / (np.sqrt(square / left[1]) + 1e-12)
        logs = logs - _between(_RATE, done) * move
    return np.asarray(np.exp(best - best.mean()))


def _between(ends: tuple[float, float], done: float) -> float:
    return float(ends[0] * (ends[1] / ends[0]) ** done)


def noise_and_gradient(
    logs: Float64Array, readers: Sequence[Reader], power: float = np.inf
) -> tuple[float, Float64Array]:
    """Return J, and the gradient with respect to log r of J with smooth maxima, (C,).

    Args:
        logs: log r, (C,).
        readers: of the tensor.
        power: p of the norms that stand for the maxima in the gradient.
    """
    total, gradient = 0.0, np.zeros_like(logs)
    for reader in readers:
        for noise, slope in (
            _activation_noise(logs, reader, power),
            _weight_noise(logs, reader, power),
        ):
            total += noise / reader.signal
            gradient += slope / reader.signal
    return total, gradient


def _activation_noise(
    logs: Float64Array, reader: Reader, power: float
) -> tuple[float, Float64Array]:
    top, share, total = _log_maximum(logs + reader.log_range, power)
    passed = reader.squares * np.exp(-2 * logs)
    noise = float(passed.sum() * np.exp(2 * top) / reader.input_levels**2 / 12)
    return noise, 2 * noise * (share / total - passed / (passed.sum() or 1.0))


def _weight_noise(logs: Float64Array, reader: Reader, power: float) -> tuple[float, Float64Array]:
    groups = len(reader.log_largest)
    by_group = logs.reshape(groups, 1, -1)
    below = reader.log_largest - by_group.astype(reader.log_largest.dtype)
    top, share, total = _log_maximum(below, power)
    squares = np.exp(2.0 * top) / reader.weight_levels**2 / 12  # step_o^2 / 12, (groups, O/groups)
    spread = np.exp(2 * by_group[:, 0]) * reader.variance.reshape(groups, -1)
    rows = squares * spread.sum(axis=1, keepdims=True)
    pulled = ((rows / total)[:, None].astype(share.dtype) @ share)[:, 0]
    slope = 2 * (squares.sum(axis=1, keepdims=True) * spread - pulled)
    return float(rows.sum()), slope.reshape(-1)


def _log_maximum(values: FloatArray, power: float) -> tuple[Float64Array, FloatArray, Float64Array]:
    """Return the maximum along the last axis, and the gradient of the p-norm in its place.

    The gradient is the second result over the third, its sum. ``values`` is overwritten with the
    second: this is where the time goes.
    """
    top = values.max(axis=-1, keepdims=True)
    if np.isinf(power):
        np.equal(values, top, out=values)
    else:
        np.subtract(values, top, out=values)
        np.multiply(values, power, out=values)
        np.exp(values, out=values)
    return top[..., 0].astype(np.float64), values, values.sum(axis=-1, dtype=np.float64)
