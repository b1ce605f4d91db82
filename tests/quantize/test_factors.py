"""The factors that equalize a tensor: J, its derivative and its minimum against brute force."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from reptrt.core.grid import Grid
from reptrt.quantize.calib.channels import ChannelStats
from reptrt.quantize.choose import Reader, best_factors, noise_and_gradient, reader_of
from reptrt.rewrite.split_coarse_fine import coarse_and_fine

RNG = np.random.default_rng(0)


def conv(weight: np.ndarray, groups: int = 1) -> gs.Node:
    pads = [weight.shape[2] // 2] * 4
    inputs = [gs.Variable("x"), gs.Constant("w", weight.astype(np.float32))]
    return gs.Node("Conv", "conv", {"group": groups, "pads": pads}, inputs)


def stats_of(x: np.ndarray) -> ChannelStats:
    """Return the statistics of values (N, C)."""
    return ChannelStats(np.abs(x).max(0), np.square(x).mean(0), x.mean(0))


def readers(
    weights: list[np.ndarray], x: np.ndarray, groups: int = 1, form: str = "none"
) -> list[Reader]:
    return [
        reader_of(conv(w, groups), stats_of(x), form, input_levels=255, weight_levels=127)  # type: ignore[arg-type]
        for w in weights
    ]


def rayleigh(channels: int, spread: float = 1.0) -> np.ndarray:
    """Return values (N, C) of channels with different ranges."""
    return np.abs(RNG.normal(0, 1, (1000, channels))) * np.exp(RNG.normal(0, spread, channels))


def ranges_of(x: np.ndarray) -> np.ndarray:
    """Return the largest |x| of each channel, moved a little towards the largest of all."""
    largest = np.abs(x).max(0)
    return largest**0.94 * largest.max() ** 0.06


def by_formula(
    r: np.ndarray, weights: list[np.ndarray], x: np.ndarray, groups: int, form: str = "none"
) -> float:
    """J, with loops and from the definitions."""
    total = 0.0
    step_x = max(r * ranges_of(x)) / 255
    for weight in weights:
        outputs, inputs = weight.shape[:2]
        noise = signal = 0.0
        for o in range(outputs):
            channels = [o // (outputs // groups) * inputs + i for i in range(inputs)]
            row = weight[o] / r[channels][:, None, None]
            kept = row.copy()
            if form == "identity":
                kept[o % inputs, row.shape[1] // 2, row.shape[2] // 2] = 0
            if form == "coarse-fine":
                kept[:, row.shape[1] // 2, row.shape[2] // 2] /= 254
            step_o = np.abs(kept).max() / 127
            for i, c in enumerate(channels):
                noise += np.square(row[i]).sum() * step_x**2 / 12
                noise += row[i].size * step_o**2 / 12 * np.square(r[c]) * x[:, c].var()
                signal += np.square(weight[o, i]).sum() * np.square(x[:, c]).mean()
        total += noise / signal
    return total


@pytest.mark.parametrize(
    ("groups", "shape"), [(1, (5, 6, 3, 3)), (3, (6, 2, 3, 3)), (6, (6, 1, 3, 3))]
)
@pytest.mark.parametrize("form", ["none", "identity", "coarse-fine"])
def test_j_is_what_its_definition_says(groups: int, shape: tuple[int, ...], form: str) -> None:
    if form == "identity":
        shape = (6, *shape[1:])
    x = rayleigh(6)
    weights = [RNG.normal(0, 1, shape).astype(np.float32).astype(float) for _ in range(2)]
    logs = RNG.normal(0, 1, 6)
    found, _ = noise_and_gradient(logs, readers(weights, x, groups, form))
    assert found == pytest.approx(by_formula(np.exp(logs), weights, x, groups, form), rel=1e-6)


@pytest.mark.parametrize(
    ("groups", "shape"), [(1, (5, 6, 3, 3)), (3, (6, 2, 3, 3)), (6, (6, 1, 3, 3))]
)
def test_the_gradient_is_that_of_finite_differences(groups: int, shape: tuple[int, ...]) -> None:
    given = readers([RNG.normal(0, 1, shape) for _ in range(2)], rayleigh(6), groups)
    logs = RNG.normal(0, 1, 6)  # no two channels at a maximum: J is differentiable here
    _, gradient = noise_and_gradient(logs, given)
    for c in range(6):
        up, down = (
            noise_and_gradient(logs + sign * 1e-5 * np.eye(6)[c], given)[0] for sign in (1, -1)
        )
        assert gradient[c] == pytest.approx((up - down) / 2e-5, rel=1e-4, abs=1e-12)


def test_two_channels_get_the_best_factors_of_all_on_a_fine_grid() -> None:
    for spread in (0.3, 1.0, 2.0):
        x = rayleigh(2, spread)
        given = readers([RNG.normal(0, 1, (8, 2, 1, 1)) for _ in range(2)], x)
        grid = [np.array([t, -t]) for t in np.linspace(-4, 4, 4001)]
        least = min(noise_and_gradient(logs, given)[0] for logs in grid)
        found, _ = noise_and_gradient(np.log(best_factors(given)), given)
        assert found <= least * 1.002


def test_log_j_is_convex_in_log_r() -> None:
    given = readers([RNG.normal(0, 1, (7, 6, 3, 3))], rayleigh(6))

    def log_j(logs: np.ndarray) -> float:
        return float(np.log(noise_and_gradient(logs, given)[0]))

    for _ in range(100):
        a, b = RNG.normal(0, 2, (2, 6))
        assert log_j((a + b) / 2) <= (log_j(a) + log_j(b)) / 2 + 1e-12


def test_weights_count_where_equal_ranges_would_drown_them() -> None:
    """A channel that is rarely large: equal ranges let its column set all steps of the weights."""
    x = rayleigh(16, 0.1)
    x[0, 0] = 300
    given = readers([RNG.normal(0, 1, (16, 16, 1, 1))], x)
    equal = -given[0].log_range
    factors = best_factors(given)
    assert np.log(factors).mean() == pytest.approx(0, abs=1e-9)
    ratio = noise_and_gradient(np.log(factors), given)[0] / noise_and_gradient(equal, given)[0]
    assert ratio < 0.6
    spread = equal.max() - equal[0]
    assert np.log(np.median(factors) / factors[0]) < 0.9 * spread  # between no factors and 1 / R


def test_a_depthwise_layer_has_no_weight_noise_to_weigh() -> None:
    """Its steps follow the factors, so only the ranges of activations count: r R is constant."""
    x = rayleigh(8)
    factors = best_factors(readers([np.ones((8, 1, 3, 3))], x, groups=8))
    ranges = factors * ranges_of(x)
    assert ranges.min() > 0.9 * ranges.max()


@pytest.mark.parametrize("form", ["identity", "coarse-fine"])
def test_a_split_changes_what_a_step_has_to_cover(form: str) -> None:
    """Oracle: the largest value of the kernel that the split leaves."""
    weight = RNG.normal(0, 0.1, (6, 6, 3, 3))
    weight[range(6), range(6), 1, 1] += 3
    (reader,) = readers([weight], rayleigh(6), form=form)
    left = weight.copy()
    if form == "identity":
        left[range(6), range(6), 1, 1] = 0
    else:
        left = coarse_and_fine(weight, Grid.weight(8))[1]
    rows = np.exp(reader.log_largest[0]).max(axis=1)
    np.testing.assert_allclose(rows, np.abs(left).max((1, 2, 3)), rtol=0.05)


def test_dead_channels_and_dead_tensors_are_left_alone() -> None:
    x = rayleigh(4)
    x[:, 2] = 0
    factors = best_factors(readers([RNG.normal(0, 1, (3, 4, 1, 1))], x))
    assert np.isfinite(factors).all()
    assert factors.max() / factors.min() < 1e4
    dead = best_factors(readers([RNG.normal(0, 1, (3, 4, 1, 1))], 0 * x))
    np.testing.assert_array_equal(dead, np.ones(4))
