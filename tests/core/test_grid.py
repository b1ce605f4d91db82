"""The deployment grid against onnxruntime's QuantizeLinear, and its formula pinned."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from reptrt.core.grid import Grid, along_axis, channel_amax, dequantize, quantize, scale_from_amax
from tests.support.helpers import ort_run

INT8 = Grid.activation(8)


def ort_quantize(x: np.ndarray, scale: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and dequantized values of onnxruntime."""
    zero_point = np.zeros(scale.shape, dtype=np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=axis),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=axis),
    ]
    outputs = [("q", TensorProto.INT8), ("y", TensorProto.FLOAT)]
    graph = helper.make_graph(
        nodes,
        "q",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs],
        [numpy_helper.from_array(scale, "s"), numpy_helper.from_array(zero_point, "z")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    found = ort_run(model, {"x": x}, optimize=False)
    return found["q"], found["y"]


@pytest.mark.parametrize(
    ("grid", "codes"),
    [
        (Grid.activation(8), (-128, 127)),
        (Grid.activation(6), (-32, 31)),
        (Grid.activation(2), (-2, 1)),
        (Grid.weight(8), (-127, 127)),
        (Grid.weight(6), (-31, 31)),
        (Grid.weight(2), (-1, 1)),
    ],
    ids=str,
)
def test_codes_of_a_grid(grid: Grid, codes: tuple[int, int]) -> None:
    assert (grid.qmin, grid.qmax) == codes


def test_the_formula_is_pinned() -> None:
    """Divide by a float32 scale, ties to even, saturate: each of these differs in some variant."""
    assert scale_from_amax(12.7, INT8) == np.float32(12.7 / 127)  # not 127.5, not 128
    x = np.float32([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.4, 200, -128.4, -200])
    expected = np.int8([0, 2, 2, 0, -2, 126, 127, 127, -128, -128])
    np.testing.assert_array_equal(quantize(x, 1.0, INT8), expected)


def test_values_are_divided_not_multiplied_by_the_inverse() -> None:
    scale = np.float32(3.7) / np.float32(127)
    ties = (np.arange(127, dtype=np.float32) + np.float32(0.5)) * scale
    values = np.concatenate([np.nextafter(ties, np.float32(0)), ties, np.nextafter(ties, 9)])
    values = values.astype(np.float32)
    by_division, by_inverse = np.rint(values / scale), np.rint(values * (np.float32(1) / scale))
    assert (by_division != by_inverse).any()
    np.testing.assert_array_equal(quantize(values, scale, INT8), by_division.clip(-128, 127))


finite = st.floats(-(2.0**10), 2.0**10, width=32)
arrays = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=1, max_dims=4, max_side=5), elements=finite
)


@settings(max_examples=60, deadline=None)
@given(x=arrays, amax=st.floats(2.0**-20, 2.0**12, width=32))
def test_per_tensor_equals_onnxruntime(x: np.ndarray, amax: float) -> None:
    scale = scale_from_amax(amax, INT8)
    codes, values = ort_quantize(x, scale, axis=0)
    ours = quantize(x, scale, INT8)
    np.testing.assert_array_equal(ours, codes)
    np.testing.assert_array_equal(dequantize(ours, scale), values)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_per_channel_equals_onnxruntime(data: st.DataObject) -> None:
    weight = data.draw(hnp.arrays(np.float32, (3, 4, 2, 1), elements=finite))
    axis = data.draw(st.sampled_from([0, 1]))
    scale = scale_from_amax(channel_amax(weight, axis), Grid.weight(8))
    assert scale.shape == (weight.shape[axis],)
    codes, values = ort_quantize(weight, scale, axis)
    ours = quantize(weight, scale, Grid.weight(8), axis)
    np.testing.assert_array_equal(ours, codes)
    np.testing.assert_array_equal(dequantize(ours, scale, axis), values)
    assert ours.min() >= -127  # symmetric, as amax is the largest value itself


@settings(max_examples=60, deadline=None)
@given(x=arrays, amax=st.floats(2.0**-10, 2.0**12, width=32), bits=st.integers(2, 8))
def test_error_is_at_most_half_a_step_inside_amax(x: np.ndarray, amax: float, bits: int) -> None:
    grid = Grid.activation(bits)
    scale = scale_from_amax(amax, grid)
    error = np.abs(dequantize(quantize(x, scale, grid), scale) - x)
    inside = np.abs(x) <= amax
    assert (error[inside] <= scale / 2 * (1 + 1e-4)).all()
    codes = quantize(x, scale, grid)
    assert codes.min() >= grid.qmin
    assert codes.max() <= grid.qmax


def test_an_all_zero_channel_has_scale_one_and_zero_codes() -> None:
    weight = np.zeros((2, 3), dtype=np.float32)
    weight[1] = [0.5, -1.0, 0.25]
    scale = scale_from_amax(channel_amax(weight, 0), Grid.weight(8))
    np.testing.assert_array_equal(scale, np.float32([1.0, 1.0 / 127]))
    np.testing.assert_array_equal(quantize(weight, scale, Grid.weight(8), 0)[0], 0)


@pytest.mark.parametrize("amax", [1e-45, 1e-40, 1e-37])
def test_a_tiny_amax_never_gives_a_zero_scale(amax: float) -> None:
    scale = scale_from_amax(amax, INT8)
    assert scale >= np.finfo(np.float32).tiny
    assert np.isfinite(quantize(np.float32([0, amax]), scale, INT8)).all()


@pytest.mark.parametrize("bits", [8, 6])
def test_full_range_codes_are_unsigned(bits: int) -> None:
    grid = Grid.activation(bits).full_range
    x = np.float32([-3, 0, 0.6, 31, 200, 1e6])
    codes = quantize(x, 1.0, grid)
    assert codes.dtype == np.uint8
    np.testing.assert_array_equal(codes, np.rint(x).clip(0, 2**bits - 1))
    np.testing.assert_array_equal(dequantize(codes, 1.0), codes.astype(np.float32))


@pytest.mark.parametrize("grid", [Grid(0, 256), Grid(-129, 127), Grid(-1, 128)])
def test_a_grid_that_8_bits_do_not_hold(grid: Grid) -> None:
    with pytest.raises(ValueError, match=r"Grid\(.*cannot represent these codes"):
        quantize(np.float32([1]), 1.0, grid)


def test_along_axis_broadcasts_along_the_axis_only() -> None:
    values = np.float32([1, 2, 3])
    assert along_axis(values, 4, 1).shape == (1, 3, 1, 1)
    assert along_axis(2.0, 4, None).shape == ()
    weight = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.testing.assert_array_equal(channel_amax(-weight, 1), [15, 19, 23])
