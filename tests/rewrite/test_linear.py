"""The algebra of linear maps against torch's convolution in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from reptrt.rewrite.linear import (
    LinearMap,
    add,
    average_pool,
    compose,
    diagonal,
    identity,
    per_channel,
    regroup,
    undilate,
)


def apply(linear: LinearMap, x: torch.Tensor) -> torch.Tensor:
    """What the class says it computes, by torch."""
    if linear.transposed:
        return apply_transposed(linear, x)
    (top, left), (bottom, right) = linear.begin, linear.end
    return F.conv2d(
        F.pad(x, (left, right, top, bottom)),
        torch.from_numpy(np.ascontiguousarray(linear.kernel)),
        torch.from_numpy(np.ascontiguousarray(linear.bias)),
        linear.stride,
        dilation=linear.dilation,
        groups=linear.groups,
    )


def apply_transposed(linear: LinearMap, x: torch.Tensor) -> torch.Tensor:
    parts = linear.kernel.reshape(linear.groups, -1, *linear.kernel.shape[1:]).swapaxes(1, 2)
    weight = torch.from_numpy(np.ascontiguousarray(parts.reshape(-1, *parts.shape[2:])))
    y = F.conv_transpose2d(
        x, weight, None, linear.stride, groups=linear.groups, dilation=linear.dilation
    )
    (top, left), (bottom, right) = linear.begin, linear.end
    y = F.pad(y, (-left, -right, -top, -bottom))  # a negative end is output padding
    return y + torch.from_numpy(np.asarray(linear.bias)).reshape(-1, 1, 1)


def image(channels: int, size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, *size, generator=generator, dtype=torch.float64)


def assert_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    # sums of at most a few hundred float64 products in another order
    scale = max(1.0, float(expected.abs().max()))
    assert float((got - expected).abs().max()) <= 1e-12 * scale


def random_map(
    rng: np.random.Generator, inputs: int = 4, outputs: int = 4, **fixed: tuple[int, int]
) -> LinearMap:
    """Any grouped, strided, dilated, asymmetrically padded convolution, with or without bias."""
    groups = int(rng.choice([g for g in (1, 2, 4) if inputs % g == outputs % g == 0]))
    size = rng.integers(1, 4, 2)
    linear = LinearMap(
        rng.standard_normal((outputs, inputs // groups, *size)),
        rng.standard_normal(outputs) * rng.integers(2),
        stride=pair(rng, 1, 2),
        begin=pair(rng, 0, 2),
        end=pair(rng, 0, 2),
        dilation=pair(rng, 1, 2),
        groups=groups,
    )
    return replace(linear, **fixed)


def pair(rng: np.random.Generator, low: int, high: int) -> tuple[int, int]:
    first, second = rng.integers(low, high + 1, 2)
    return int(first), int(second)


def random_size(rng: np.random.Generator, least: int = 14) -> tuple[int, int]:
    """No map here, nor two of them in series, has a window of more than 13 values."""
    return pair(rng, least, least + 4)


SEEDS = st.integers(0, 2**32 - 1)
UNPADDED = {"begin": (0, 0), "end": (0, 0)}


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(seed=SEEDS)
def test_a_composition_is_one_after_the_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    both: LinearMap | str = ""
    while isinstance(both, str):
        first, second = random_map(rng, 4, 4), random_map(rng, 4, 8)
        both = compose(first, second)
    x = image(4, random_size(rng))
    assert_equal(apply(both, x), apply(second, apply(first, x)))


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_without_padding_in_the_second_there_is_always_a_composition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = random_map(rng, 4, 4), random_map(rng, 4, 8, **UNPADDED)
    both = compose(first, second)
    assert isinstance(both, LinearMap)
    x = image(4, random_size(rng))
    assert_equal(apply(both, x), apply(second, apply(first, x)))


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_a_pointwise_convolution_without_bias_goes_before_any_padding(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((8, 4, 1, 1))
    first, second = LinearMap(kernel, np.zeros(8), stride=pair(rng, 1, 2)), random_map(rng, 8, 4)
    both = compose(first, second)
    assert isinstance(both, LinearMap)
    x = image(4, random_size(rng))
    assert_equal(apply(both, x), apply(second, apply(first, x)))


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, where=st.sampled_from(["before", "after"]))
def test_scalings_compose_on_either_side(seed: int, where: str) -> None:
    rng = np.random.default_rng(seed)
    linear = random_map(rng)
    shift = rng.standard_normal(4) if where == "after" else np.zeros(4)
    scaling = per_channel(rng.standard_normal(4), shift)
    order = (scaling, linear) if where == "before" else (linear, scaling)
    both = compose(*order)
    assert isinstance(both, LinearMap)
    assert both.kernel.shape == linear.kernel.shape  # costs nothing
    assert (both.groups, both.dilation) == (linear.groups, linear.dilation)
    x = image(4, random_size(rng))
    assert_equal(apply(both, x), apply(order[1], apply(order[0], x)))


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_a_bias_under_padding_is_never_merged(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first = LinearMap(rng.standard_normal((4, 4, 1, 1)), np.ones(4))
    reason = compose(first, random_map(rng, begin=(1, 0)))
    assert reason == "a convolution pads with zeros where the bias before it would have to continue"


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(seed=SEEDS)
def test_a_sum_of_maps_is_one_map(seed: int) -> None:
    rng = np.random.default_rng(seed)
    stride, end = pair(rng, 1, 2), pair(rng, 0, 2)
    size = random_size(rng)
    maps: list[LinearMap] = []
    count = int(rng.integers(2, 5))
    while len(maps) < count:
        found = random_map(rng, 4, 8, stride=stride, end=end)
        if not maps or apply(found, image(4, size)).shape == apply(maps[0], image(4, size)).shape:
            maps.append(found)
    total = add(maps, equal_sizes=True)
    assert isinstance(total, LinearMap)
    assert_equal(apply(total, image(4, size)), sum(apply(m, image(4, size)) for m in maps))
    for_any_size = add(maps)
    if isinstance(for_any_size, LinearMap):
        x = image(4, (size[0] + 1, size[1] + 2))
        assert_equal(apply(for_any_size, x), sum(apply(m, x) for m in maps))
    else:
        assert for_any_size == "the branches differ in output size"


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, sizes=st.lists(st.sampled_from([1, 3, 5]), min_size=1, max_size=4))
def test_centred_kernels_always_sum(seed: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    stride = pair(rng, 1, 2)
    maps = [
        random_map(rng, stride=stride, begin=(k // 2,) * 2, end=(k // 2,) * 2, dilation=(1, 1))
        for k in sizes
    ]
    maps = [
        replace(m, kernel=rng.standard_normal((*m.kernel.shape[:2], k, k)))
        for m, k in zip(maps, sizes, strict=True)
    ]
    if stride == (1, 1):
        maps.append(identity(4))
    total = add(maps)
    assert isinstance(total, LinearMap)
    assert total.size == (max(sizes), max(sizes))
    for height in (6, 7):
        x = image(4, (height, 9))
        assert_equal(apply(total, x), sum(apply(m, x) for m in maps))


def random_transposed(rng: np.random.Generator, inputs: int = 4, outputs: int = 8) -> LinearMap:
    groups = int(rng.choice([1, 2, 4]))
    return LinearMap(
        rng.standard_normal((outputs, inputs // groups, *rng.integers(1, 5, 2))),
        rng.standard_normal(outputs) * rng.integers(2),
        stride=pair(rng, 1, 3),
        begin=pair(rng, 0, 2),
        end=pair(rng, -1, 2),
        dilation=pair(rng, 1, 2),
        groups=groups,
        transposed=True,
    )


@settings(max_examples=80, deadline=None)
@given(seed=SEEDS)
def test_a_sum_of_transposed_maps_is_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = image(4, random_size(rng, 5))
    head = random_transposed(rng)
    maps = [head]
    for _ in range(int(rng.integers(1, 4))):
        other = replace(random_transposed(rng), stride=head.stride)
        reach = [
            (m.size[a] - 1) * m.dilation[a] - m.begin[a] for m in (head, other) for a in (0, 1)
        ]
        end = tuple(head.end[a] + reach[2 + a] - reach[a] for a in (0, 1))  # the same output size
        maps.append(replace(other, end=end))
    total = add(maps)
    assert isinstance(total, LinearMap)
    assert_equal(apply(total, x), sum(apply(m, x) for m in maps))


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, where=st.sampled_from(["before", "after"]), mixing=st.booleans())
def test_pointwise_maps_compose_with_transposed_ones(seed: int, where: str, mixing: bool) -> None:
    rng = np.random.default_rng(seed)
    transposed, shift = random_transposed(rng), rng.standard_normal(8)
    if where == "before":
        shift = np.zeros(4)
    pointwise = per_channel(rng.standard_normal(shift.size), shift)
    if mixing:
        pointwise = LinearMap(rng.standard_normal((shift.size, shift.size, 1, 1)), shift)
    order = (pointwise, transposed) if where == "before" else (transposed, pointwise)
    both = compose(*order)
    assert isinstance(both, LinearMap)
    x = image(4, random_size(rng, 5))
    assert_equal(apply(both, x), apply(order[1], apply(order[0], x)))


def test_what_does_not_compose_with_a_transposed_map_says_why() -> None:
    transposed = LinearMap(np.ones((4, 4, 2, 2)), np.zeros(4), stride=(2, 2), transposed=True)
    shift = per_channel(np.ones(4), np.ones(4))
    assert compose(shift, transposed) == (
        "a transposed convolution spreads the shift before it unevenly"
    )
    conv = LinearMap(np.ones((4, 4, 3, 3)), np.zeros(4))
    for order in ((conv, transposed), (transposed, conv)):
        assert compose(*order) == "a transposed convolution in series with another convolution"
    assert add([transposed, replace(transposed, transposed=False)]) == (
        "the branches differ in stride"
    )


@pytest.mark.parametrize("axes", [0, 1, 3])
def test_any_number_of_spatial_axes(axes: int) -> None:
    """Against the same map over two axes, where that exists, and by torch for three."""
    rng = np.random.default_rng(axes)
    taps = (3, 1, 2)[:axes]
    first = LinearMap(rng.standard_normal((4, 2, *taps)), rng.standard_normal(4), groups=2)
    second = LinearMap(rng.standard_normal((6, 4, *taps)), rng.standard_normal(6))
    x = torch.randn(2, 4, *(9, 8, 7)[:axes], dtype=torch.float64)
    forward = {0: dense, 1: F.conv1d, 3: F.conv3d}[axes]

    def run(linear: LinearMap, value: torch.Tensor) -> torch.Tensor:
        kernel = torch.from_numpy(np.ascontiguousarray(linear.kernel))
        return forward(value, kernel, torch.from_numpy(linear.bias), groups=linear.groups)

    both, total = compose(first, second), add([second, replace(second, bias=second.bias + 1)])
    assert isinstance(both, LinearMap)
    assert isinstance(total, LinearMap)
    assert_equal(run(both, x), run(second, run(first, x)))
    assert_equal(run(total, x), 2 * run(second, x) + 1)
    scaling = per_channel(rng.standard_normal(4), rng.standard_normal(4), axes)
    scaled = compose(scaling, second)
    assert isinstance(scaled, LinearMap)
    assert_equal(run(scaled, x), run(second, run(scaling, x)))


def dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int) -> torch.Tensor:
    parts = zip(x.chunk(groups, 1), weight.chunk(groups), strict=True)
    return torch.cat([part @ rows.T for part, rows in parts], 1) + bias


def test_what_cannot_be_added_says_why() -> None:
    conv = LinearMap(np.ones((4, 4, 3, 3)), np.zeros(4), begin=(1, 1), end=(1, 1))
    wider = LinearMap(np.ones((8, 4, 1, 1)), np.zeros(8))
    assert add([conv, wider]) == "the branches differ in channels"
    strided = replace(conv, stride=(2, 2))
    assert add([conv, strided]) == "the branches differ in stride"
    assert add([conv, replace(conv, end=(0, 0))]) == "the branches differ in output size"


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_fewer_groups_and_no_dilation_are_the_same_map(seed: int) -> None:
    rng = np.random.default_rng(seed)
    linear = random_map(rng, 4, 8)
    x = image(4, random_size(rng, 6))
    expected = apply(linear, x)
    for groups in (g for g in (1, 2, 4) if linear.groups % g == 0):
        same = undilate(regroup(linear, groups))
        assert (same.groups, same.dilation) == (groups, (1, 1))
        assert_equal(apply(same, x), expected)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (1, 0, 0, 1)], ids=str)
def test_average_pool_is_a_convolution(stride: int, pads: tuple[int, ...]) -> None:
    x = image(3, (7, 8))
    linear = average_pool(3, (3, 2), (stride, stride), pads)
    padded = F.pad(x, (pads[1], pads[3], pads[0], pads[2]))
    assert_equal(apply(linear, x), F.avg_pool2d(padded, (3, 2), stride))


def test_diagonal_is_found_in_any_form_and_nowhere_else() -> None:
    d = np.array([1.0, -2.0, 0.0, 0.5])
    scaling = per_channel(d, np.ones(4))
    assert scaling.is_per_channel
    for groups in (1, 2, 4):
        np.testing.assert_array_equal(diagonal(regroup(scaling, groups)), d)
    dense = regroup(scaling, 1)
    mixing = replace(dense, kernel=dense.kernel + np.eye(4)[::-1].reshape(4, 4, 1, 1))
    assert diagonal(mixing) is None
    assert diagonal(replace(dense, stride=(2, 2))) is None
    assert diagonal(LinearMap(np.ones((4, 4, 3, 3)), np.zeros(4))) is None
    assert diagonal(LinearMap(np.ones((8, 4, 1, 1)), np.zeros(8))) is None


def test_sizes_and_costs() -> None:
    linear = LinearMap(np.zeros((8, 2, 3, 1)), np.zeros(8), groups=2)
    assert (linear.size, linear.in_channels, linear.out_channels) == ((3, 1), 4, 8)
    assert linear.macs == 8 * 2 * 3
    assert not linear.is_pointwise
    assert identity(4).macs == 4
