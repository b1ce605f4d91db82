"""Streaming histograms against counting all values at once, in any order and any parts."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reptrt.quantize.calib import histogram as module
from reptrt.quantize.calib.histogram import NUM_BINS, Histogram, histogram_of


def counted(values: np.ndarray, width: float) -> np.ndarray:
    """Counts of |x| > 0 in bins [i w, (i + 1) w) by integer division in float64."""
    magnitude = np.abs(values.astype(np.float64)).ravel()
    index = np.floor(magnitude[magnitude > 0] / width).astype(np.int64)
    return np.bincount(index, minlength=NUM_BINS)


def assert_equal(got: Histogram, expected: Histogram) -> None:
    np.testing.assert_array_equal(got.counts, expected.counts)
    assert (got.width, got.zeros) == (expected.width, expected.zeros)
    assert (got.minimum, got.maximum) == (expected.minimum, expected.maximum)


def check(values: np.ndarray, histogram: Histogram) -> None:
    assert histogram.counts.dtype == np.int64
    assert histogram.counts.shape == (NUM_BINS,)
    assert math.frexp(histogram.width)[0] == 0.5  # a power of two
    assert histogram.zeros == int((values == 0).sum())
    assert histogram.minimum == float(values.min())
    assert histogram.maximum == float(np.abs(values).max())
    assert NUM_BINS * histogram.width > histogram.maximum
    np.testing.assert_array_equal(histogram.counts, counted(values, histogram.width))


floats = st.floats(-(2.0**40), 2.0**40, width=32)
arrays = hnp.arrays(np.float32, st.integers(1, 60), elements=floats)


@settings(max_examples=150, deadline=None)
@given(values=arrays)
def test_counts_are_exact(values: np.ndarray) -> None:
    histogram = histogram_of(torch.from_numpy(values))
    check(values, histogram)
    if histogram.maximum > 2.0**-100:  # more than half of the bins are in use
        assert NUM_BINS * histogram.width <= 2 * histogram.maximum


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(parts=st.lists(arrays, min_size=1, max_size=6), data=st.data())
def test_merging_in_any_order_is_counting_everything(
    parts: list[np.ndarray], data: st.DataObject
) -> None:
    everything = np.concatenate(parts)
    order = data.draw(st.permutations(range(len(parts))))
    found = [histogram_of(torch.from_numpy(parts[i])) for i in order]
    merged = found[0]
    for histogram in found[1:]:
        merged = merged.merged(histogram)
    check(everything, merged)
    assert_equal(merged, histogram_of(torch.from_numpy(everything)))
    if len(found) > 2:  # and in any grouping
        tail = found[1]
        for histogram in found[2:]:
            tail = tail.merged(histogram)
        assert_equal(found[0].merged(tail), merged)


def test_values_on_the_borders_of_bins() -> None:
    borders = np.arange(NUM_BINS, dtype=np.float32) * np.float32(2.0**-13)
    below = np.nextafter(borders[1:], np.float32(0))
    values = np.concatenate([borders, below])
    histogram = histogram_of(torch.from_numpy(values))
    assert histogram.width == 2.0**-13
    expected = np.full(NUM_BINS, 2)
    expected[0] = 1  # its own border is the zero
    expected[-1] = 1
    np.testing.assert_array_equal(histogram.counts, expected)


def test_zeros_alone() -> None:
    zeros = histogram_of(torch.zeros(3, 4))
    assert (zeros.zeros, zeros.maximum, zeros.counts.sum()) == (12, 0.0, 0)
    values = np.float32([0.0, -0.0, 3.0])
    assert_equal(
        zeros.merged(histogram_of(torch.from_numpy(values))),
        histogram_of(torch.from_numpy(np.concatenate([np.zeros(12, np.float32), values]))),
    )


@pytest.mark.parametrize("tiny", [1e-45, 1e-38, 1e-33, 1e-30])
def test_tiny_values(tiny: float) -> None:
    values = np.float32([tiny, 0.0, 2 * tiny])
    check(values, histogram_of(torch.from_numpy(values)))
    merged = histogram_of(torch.from_numpy(values)).merged(histogram_of(torch.ones(1)))
    assert_equal(merged, histogram_of(torch.from_numpy(np.append(values, np.float32(1)))))


def test_values_near_the_upper_end() -> None:
    values = np.float32([np.nextafter(np.float32(2.0**100), np.float32(0)), 1.0])
    check(values, histogram_of(torch.from_numpy(values)))


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, -math.inf, 2.0**100, -(2.0**127), float(np.finfo(np.float32).max)]
)
def test_what_no_scale_follows_from_gives_an_infinite_maximum(bad: float) -> None:
    histogram = histogram_of(torch.tensor([1.0, bad, 2.0]))
    assert histogram.maximum == math.inf
    assert histogram.counts.sum() == 0


def test_any_memory_layout() -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 5, 7)).astype(np.float32))
    expected = histogram_of(x)
    assert_equal(histogram_of(x.contiguous(memory_format=torch.channels_last)), expected)
    wide = torch.zeros(2, 3, 5, 14)
    wide[..., ::2] = x
    assert_equal(histogram_of(wide[..., ::2]), expected)
    assert_equal(histogram_of(x.transpose(1, 3)), expected)


def test_more_values_than_are_counted_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors are counted in parts."""
    assert module._BLOCK < 2**24
    values = torch.full((2**24 + 3,), 1.5)
    assert histogram_of(values).counts.max() == 2**24 + 3
    monkeypatch.setattr(module, "_BLOCK", 7)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(100).astype(np.float32))
    check(x.numpy(), histogram_of(x))


def test_the_caller_s_tensor_and_histograms_are_not_changed() -> None:
    x = torch.from_numpy(np.float32([-1.0, 0.5, 0.0]))
    before = x.clone()
    small = histogram_of(x)
    counts = small.counts.copy()
    small.merged(histogram_of(torch.tensor([1000.0])))
    assert torch.equal(x, before)
    np.testing.assert_array_equal(small.counts, counts)


def test_width_depends_on_the_largest_value_alone() -> None:
    widths = [histogram_of(torch.tensor([m])).width for m in (0.9, 1.0, 1.5, 1.99, 2.0, 3.9)]
    assert widths == [w / NUM_BINS for w in (1.0, 2.0, 2.0, 2.0, 4.0, 4.0)]
    assert all(a <= b for a, b in pairwise(widths))
