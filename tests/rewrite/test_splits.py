"""Both weight splits: exact in float, bounded in INT8, refused with a reason where impossible."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reptrt.core.grid import Grid
from reptrt.graph.net import Net, model_from_net
from reptrt.graph.placement import place
from reptrt.graph.qdq import quantize_weight
from reptrt.graph.splits import read_splits
from reptrt.rewrite.split_coarse_fine import coarse_and_fine, split_coarse_fine
from reptrt.rewrite.split_identity import best_scalar, diagonal_of, split_identity, without_diagonal
from tests.support.helpers import ort_run

INT8 = Grid.weight(8)


def rep_weight(
    rng: np.random.Generator, outputs: int, inputs: int, size: int, groups: int
) -> np.ndarray:
    """A kernel with the rep-net disease: small taps, a larger centre, a large diagonal."""
    weight = 0.006 * rng.standard_normal((outputs, inputs // groups, size, size))
    weight[:, :, size // 2, size // 2] += 0.04 * rng.standard_normal((outputs, inputs // groups))
    if outputs == inputs:
        channels = np.arange(outputs)
        weight[channels, channels % weight.shape[1], size // 2, size // 2] += rng.uniform(
            0.3, 2.0, outputs
        )
    return weight.astype(np.float32)


def conv_net(weight: np.ndarray, *, groups: int, stride: int, pad: int, height: int) -> Net:
    """x -> Conv "conv" -> Relu -> Conv "next" -> y: the second makes the sum's output matter."""
    rng = np.random.default_rng(5)
    inputs, outputs = weight.shape[1] * groups, weight.shape[0]
    x = gs.Variable("x", np.float32, ("N", inputs, height, height + 1))
    mid, act = gs.Variable("mid", np.float32), gs.Variable("act", np.float32)
    y = gs.Variable("y", np.float32, ("N", 3, None, None))
    attrs = {"kernel_shape": list(weight.shape[2:]), "group": groups}
    attrs |= {"strides": [stride] * 2, "pads": [pad] * 4}
    bias = rng.standard_normal(outputs).astype(np.float32)
    last = rng.standard_normal((3, outputs, 1, 1)).astype(np.float32)
    nodes = [
        gs.Node(
            "Conv", "conv", attrs, [x, gs.Constant("w", weight), gs.Constant("b", bias)], [mid]
        ),
        gs.Node("Relu", "relu", {}, [mid], [act]),
        gs.Node("Conv", "next", {}, [act, gs.Constant("last", last)], [y]),
    ]
    return Net(gs.Graph(nodes, [x], [y], opset=19, ir_version=9))


def outputs_of(net: Net, x: np.ndarray) -> np.ndarray:
    return ort_run(model_from_net(net.copy()), {"x": x})["y"]


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Net, np.ndarray]:
    groups = draw(st.sampled_from([1, 2, 4]))
    size = draw(st.sampled_from([1, 3, 5]))
    stride = draw(st.sampled_from([1, 2]))
    outputs = draw(st.sampled_from([4, 8]))
    height = draw(st.sampled_from([5, 6, 9]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    weight = rep_weight(rng, outputs, 4, size, groups)
    net = conv_net(weight, groups=groups, stride=stride, pad=size // 2, height=height)
    return net, rng.standard_normal((2, 4, height, height + 1)).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(case=convolutions(), how=st.sampled_from(["coarse-fine", "identity", "identity-scalar"]))
def test_a_split_keeps_the_output(case: tuple[Net, np.ndarray], how: str) -> None:
    net, x = case
    expected = outputs_of(net, x)
    if how == "coarse-fine":
        report = split_coarse_fine(net, ["conv"], grid=INT8)
    else:
        report = split_identity(net, ["conv"], grid=INT8, form=how)
    assert len(report.changed) + len(report.skipped) == 1
    got = outputs_of(net, x)
    # float32 sums of at most 100 products in another order
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), size=st.sampled_from([3, 5]))
def test_every_tap_is_within_half_a_fine_step(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rep_weight(rng, 8, 8, size, 1)
    coarse, fine = coarse_and_fine(weight, INT8)
    np.testing.assert_array_max_ulp(coarse + fine, weight, maxulp=1)
    parts = [quantize_weight(part, 0, INT8) for part in (coarse, fine)]
    total = np.zeros(weight.shape, dtype=np.float64)  # float64 oracle of what the engine sums
    for part in parts:
        total += part.codes.astype(np.float64) * part.scale[:, None, None, None].astype(np.float64)
    half_step = parts[1].scale[:, None, None, None] / 2
    rounding = 2e-7 * np.abs(weight).max()  # of the float32 scales
    assert (np.abs(total - weight) <= half_step * (1 + 1e-4) + rounding).all()


def test_coarse_codes_are_lossless_and_dead_channels_survive() -> None:
    weight = rep_weight(np.random.default_rng(0), 4, 4, 3, 1)
    weight[2] = 0.0
    weight[3, :, 1, 1] = 0.0
    coarse, fine = coarse_and_fine(weight, INT8)
    quantized = quantize_weight(coarse, 0, INT8)
    back = quantized.codes * quantized.scale[:, None, None, None]
    np.testing.assert_allclose(back, coarse, rtol=3e-7)
    assert not coarse[2:].any()
    np.testing.assert_array_equal(fine[3], weight[3])


def test_splits_take_the_disease_away() -> None:
    """Weight noise falls by the ratio that the identity tap had over the rest: 20 dB and more."""
    weight = rep_weight(np.random.default_rng(1), 32, 32, 3, 1)

    def noise(part: np.ndarray) -> float:
        quantized = quantize_weight(part, 0, INT8)
        back = quantized.codes * quantized.scale[:, None, None, None].astype(np.float64)
        return float(np.square(back - part).sum())

    plain = noise(weight)
    assert noise(coarse_and_fine(weight, INT8)[1]) < plain / 1000
    assert noise(without_diagonal(weight, diagonal_of(weight))) < plain / 100


def test_diagonal_of_a_grouped_kernel() -> None:
    weight = np.arange(4 * 2 * 9, dtype=np.float32).reshape(4, 2, 3, 3)
    expected = [weight[0, 0, 1, 1], weight[1, 1, 1, 1], weight[2, 0, 1, 1], weight[3, 1, 1, 1]]
    np.testing.assert_array_equal(diagonal_of(weight), expected)
    assert not diagonal_of(without_diagonal(weight, diagonal_of(weight))).any()


def test_best_scalar_is_the_best_of_a_fine_grid() -> None:
    weight = rep_weight(np.random.default_rng(2), 16, 16, 3, 1)

    def cost(d0: float) -> float:
        rest = without_diagonal(weight, np.float32(d0))
        return float(np.square(np.abs(rest).max(axis=(1, 2, 3))).sum())

    grid = np.linspace(diagonal_of(weight).min(), diagonal_of(weight).max(), 2001)
    assert cost(best_scalar(weight, INT8)) <= 1.02 * min(map(cost, grid))


REFUSED = {
    "1x1 has no surrounding": ("coarse-fine", (4, 4, 1), 1, 0, "all centre"),
    "valid padding, coarse": ("coarse-fine", (4, 4, 3), 1, 0, "padding is less than half"),
    "valid padding, identity": ("identity", (4, 4, 3), 1, 0, "not on the output position"),
    "stride": ("identity", (4, 4, 3), 2, 1, "stride"),
    "channels differ": ("identity", (8, 4, 3), 1, 1, "no diagonal"),
    "even kernel": ("coarse-fine", (4, 4, 2), 1, 1, "no centre tap"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_split_is_left_with_the_reason(name: str) -> None:
    how, (outputs, inputs, size), stride, pad, reason = REFUSED[name]
    weight = rep_weight(np.random.default_rng(0), outputs, inputs, size, 1)
    net = conv_net(weight, groups=1, stride=stride, pad=pad, height=6)
    split = split_coarse_fine if how == "coarse-fine" else split_identity
    report = split(net, ["conv"], grid=INT8)
    assert report.changed == ()
    assert reason in report.skipped[0].reason
    assert read_splits(net) == ()


def test_placement_leaves_a_float_sum_alone_and_quantizes_an_int8_one() -> None:
    weight = rep_weight(np.random.default_rng(0), 4, 4, 3, 1)
    readers = {}
    for precision in ("float", "int8"):
        net = conv_net(weight, groups=1, stride=1, pad=1, height=6)
        split_identity(net, ["conv"], grid=INT8, precision=precision)
        model_from_net(net)
        readers[precision] = {r for a in place(net).activations for r in a.readers}
    assert readers["float"] == {("conv.rest", 0), ("conv.identity", 0), ("next", 0)}
    assert readers["int8"] - readers["float"] == {("conv.sum", 0), ("conv.sum", 1)}


def test_the_record_survives_the_file() -> None:
    weight = rep_weight(np.random.default_rng(0), 4, 4, 3, 1)
    net = conv_net(weight, groups=1, stride=1, pad=1, height=6)
    split_coarse_fine(net, ["conv"], grid=INT8)
    model = onnx.load_model_from_string(model_from_net(net).SerializeToString())
    assert "conv.coarse" in {p.key: p.value for p in model.metadata_props}["reptrt.splits"]
