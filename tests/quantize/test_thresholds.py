"""Threshold rules against brute force on the raw values."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reptrt.core.choices import Rule
from reptrt.core.errors import ConfigError
from reptrt.core.grid import Grid, dequantize, quantize
from reptrt.quantize.calib.histogram import Histogram, histogram_of
from reptrt.quantize.calib.options import ThresholdOptions
from reptrt.quantize.calib.thresholds import amax_from_histogram

INT8 = Grid.activation(8)
RULES: tuple[Rule, ...] = ("max", "percentile", "mse", "mae", "entropy", "kl")
N = 40_000


def spiked(rng: np.random.Generator) -> np.ndarray:
    values = rng.standard_normal(N)
    values[:3] = [40.0, -25.0, 30.0]
    return values


VALUES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "normal": lambda rng: rng.standard_normal(N),
    "relu": lambda rng: np.maximum(rng.standard_normal(N), 0),
    "sparse": lambda rng: np.maximum(rng.standard_normal(N) - 1.5, 0),
    "laplace": lambda rng: rng.laplace(size=N),
    "uniform": lambda rng: rng.uniform(-1, 1, N),
    "heavy tail": lambda rng: rng.standard_t(2, N),
    "lognormal": lambda rng: rng.lognormal(0, 1, N),
    "outliers": spiked,
    "two peaks": lambda rng: np.concatenate(
        [rng.normal(1, 0.05, N // 2), rng.normal(6, 0.05, N // 2)]
    ),
}
HEAVY = ("heavy tail", "lognormal", "outliers")


def values_of(name: str) -> np.ndarray:
    return VALUES[name](np.random.default_rng(7)).astype(np.float32)


def histogram(values: np.ndarray) -> Histogram:
    return histogram_of(torch.from_numpy(values))


def amax(values: np.ndarray, rule: Rule, grid: Grid = INT8, percentile: float = 99.99) -> float:
    return amax_from_histogram(histogram(values), ThresholdOptions(rule, percentile), grid)


def raw_loss(values: np.ndarray, threshold: float, grid: Grid, power: int) -> float:
    """Return sum |x - x_dq|^power, by quantizing every value."""
    scale = np.float32(threshold / grid.qmax)
    error = dequantize(quantize(values, scale, grid), scale).astype(np.float64) - values
    return float((np.abs(error) ** power).sum())


def candidates(values: np.ndarray, count: int = 250) -> np.ndarray:
    return float(np.abs(values).max()) * np.geomspace(2**-8, 1, count)


@pytest.mark.parametrize("name", list(VALUES))
def test_max_is_the_largest_magnitude(name: str) -> None:
    assert amax(values_of(name), "max") == float(np.abs(values_of(name)).max())


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize(("rule", "power"), [("mse", 2), ("mae", 1)])
@pytest.mark.parametrize("name", list(VALUES))
def test_the_least_error_of_all_thresholds(name: str, rule: Rule, power: int, bits: int) -> None:
    values = np.abs(values_of(name))  # one code more on the negative side is not in the model
    grid = Grid.activation(bits)
    best = min(raw_loss(values, t, grid, power) for t in candidates(values))
    found = raw_loss(values, amax(values, rule, grid), grid, power)
    # the rule sees 4096 bins or more instead of values, constant within each; the few thousand
    # values that are not zero do not fill them evenly
    assert found <= 1.03 * best


@pytest.mark.parametrize("percentile", [50, 75, 90, 99, 99.9, 99.99, 100])
@pytest.mark.parametrize("name", list(VALUES))
def test_percentile_is_that_of_numpy(name: str, percentile: float) -> None:
    values = values_of(name)
    below, above = (
        float(np.percentile(np.abs(values), percentile, method=m)) for m in ("lower", "higher")
    )
    found = amax(values, "percentile", percentile=percentile)
    if above == 0:  # no threshold: nothing would be left
        assert found == float(np.abs(values).max())
    else:
        width = histogram(values).width
        # ranks p n and p (n - 1), and the position within a bin: two values or two bins apart
        ranks = np.sort(np.abs(values))
        i, j = (int(np.searchsorted(ranks, v, "left")) for v in (below, above))
        low, high = ranks[max(i - 2, 0)], ranks[min(j + 2, N - 1)]
        assert low - 2 * width <= found <= high + 2 * width
    assert 0 < found <= float(np.abs(values).max())


def literal_entropy(values: np.ndarray, levels: int) -> float:
    """TensorRT's calibrator as it was described, with loops over about 2048 bins of |x| > 0."""
    magnitude = np.abs(values[values != 0]).astype(np.float64)
    width = histogram(values).width
    used = int(magnitude.max() // width) + 1
    merge = max(1, used // 2048)
    width *= merge
    bins = np.bincount((magnitude // width).astype(int), minlength=-(-used // merge)).astype(float)
    best, best_loss = 0, np.inf
    for kept in range(min(levels, len(bins)), len(bins) + 1):
        p = bins[:kept].copy()
        p[-1] += bins[kept:].sum()
        q = np.zeros(kept)
        for level in range(levels):
            members = bins[level * kept // levels : (level + 1) * kept // levels]
            filled = members > 0
            if filled.any():
                start = level * kept // levels
                q[start : start + len(members)] = filled * members.sum() / filled.sum()
        if p[-1] > 0 and q[-1] == 0:
            continue
        p, q = p / p.sum(), q / q.sum()
        loss = sum(p[p > 0] * np.log(p[p > 0] / q[p > 0]))
        if loss < best_loss:
            best, best_loss = kept, loss
    return float(min((best + 0.5) * width, magnitude.max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relu", "heavy tail", "outliers"])
def test_entropy_is_the_published_procedure(name: str) -> None:
    values = np.round(values_of(name)[:1500] * 8) / 8  # coarse: empty bins between
    values = values.astype(np.float32)
    grid = Grid.activation(5)
    small = histogram(values)
    assert amax(values, "entropy", grid) == pytest.approx(
        literal_entropy(values, grid.qmax + 1), rel=1e-12
    )
    assert small.counts.any()


def literal_kl(h: Histogram, threshold: float, qmax: int) -> float:
    """KL(p || q_t) as the module defines it, interval by interval between all borders."""
    step = threshold / qmax
    borders = [0.0, *((k + 0.5) * step for k in range(qmax))]
    points = np.unique(np.concatenate([np.arange(len(h.counts) + 1) * h.width, borders]))
    lengths, middles = np.diff(points), (points[1:] + points[:-1]) / 2
    p = h.counts[(middles / h.width).astype(int)] / h.counts.sum() / h.width  # densities
    cell = np.searchsorted(borders, middles, "right") - 1
    total = float((p[p > 0] * np.log(p[p > 0]) * lengths[p > 0]).sum())
    for k in range(qmax + 1):
        inside = cell == k
        mass = float((p * lengths)[inside].sum())
        if mass == 0:
            continue
        length = step if k == qmax else float(lengths[inside].sum())
        total -= mass * np.log(mass / length)
        if k == qmax:
            mean = float((p * lengths * middles)[inside].sum()) / mass
            total += 2 * mass * np.log(1 + (mean - borders[qmax]) / step)
    return total


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("name", list(VALUES))
def test_kl_is_the_least_divergence_by_its_definition(name: str, bits: int) -> None:
    values = values_of(name)
    grid, h = Grid.activation(bits), histogram(values_of(name))
    losses = [literal_kl(h, t, grid.qmax) for t in candidates(values, 60)]
    assert np.isfinite(losses).all()
    assert min(losses) >= -1e-12
    found = literal_kl(h, amax(values, "kl", grid), grid.qmax)
    assert found <= 1.01 * min(losses) + 1e-9  # of a curve with many shallow minima


@pytest.mark.parametrize("name", HEAVY)
def test_kl_clips_a_heavy_tail_below_half_of_its_maximum(name: str) -> None:
    values = values_of(name)
    found = amax(values, "kl")
    assert found < 0.5 * float(np.abs(values).max())
    # and the bulk of the values is closer for it than without clipping
    error = [raw_loss(values, t, INT8, 1) for t in (found, amax(values, "max"))]
    assert error[0] < 0.6 * error[1]


def test_kl_keeps_a_uniform_tensor() -> None:
    values = values_of("uniform")
    assert amax(values, "kl") > 0.95 * float(np.abs(values).max())


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", list(VALUES))
def test_a_threshold_is_positive_and_at_most_the_maximum(name: str, rule: Rule, bits: int) -> None:
    values = values_of(name)
    assert 0 < amax(values, rule, Grid.activation(bits)) <= float(np.abs(values).max())


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_doubling_the_values_doubles_the_threshold(rule: Rule) -> None:
    values = values_of("heavy tail")
    assert amax(2 * values, rule) == pytest.approx(2 * amax(values, rule), rel=1e-12)
    assert amax(-values, rule) == amax(values, rule)


@pytest.mark.parametrize("rule", ["max", "mse", "mae", "entropy", "kl"])
def test_zeros_carry_no_information(rule: Rule) -> None:
    values = values_of("laplace")
    padded = np.concatenate([values, np.zeros(10 * N, np.float32)])
    assert amax(padded, rule) == amax(values, rule)


@pytest.mark.parametrize("rule", RULES)
def test_a_dead_tensor_has_threshold_zero(rule: Rule) -> None:
    assert amax(np.zeros(100, np.float32), rule) == 0.0


tiny_samples = hnp.arrays(
    np.float32, st.integers(1, 8), elements=st.floats(-100, 100, width=32)
).filter(lambda values: bool(values.any()))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(values=tiny_samples, rule=st.sampled_from(RULES), bits=st.integers(2, 8))
def test_a_few_values_are_enough(values: np.ndarray, rule: Rule, bits: int) -> None:
    found = amax(values, rule, Grid.activation(bits), percentile=99.0)
    assert 0 < found <= float(np.abs(values).max())


def test_options_say_what_is_expected() -> None:
    with pytest.raises(ConfigError, match=r"percentile: got 101, expected 50 to 100"):
        ThresholdOptions("percentile", 101)
    with pytest.raises(ConfigError, match=r"threshold: got 'median', expected one of"):
        ThresholdOptions("median")  # type: ignore[arg-type]


def test_the_histogram_is_not_changed() -> None:
    h = histogram(values_of("normal"))
    before = h.counts.copy()
    for rule in RULES:
        amax_from_histogram(h, ThresholdOptions(rule), INT8)
    np.testing.assert_array_equal(h.counts, before)
