"""Compensated rounding: rows against onnxruntime, codes against GPTQ's own updates, the effect."""

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from reptrt.core.grid import Grid
from reptrt.data.arrays import Arrays
from reptrt.data.dataset import Dataset, open_dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import Net, model_from_net, net_from_model
from reptrt.graph.placement import place
from reptrt.graph.preprocess import read_preprocess
from reptrt.graph.qdq import quantize_weights
from reptrt.quantize.calib.collect import Kept, watch
from reptrt.quantize.calib.outputs import parts, stride_of
from reptrt.quantize.rounding import moments, sums
from reptrt.quantize.rounding.compensate import compensate
from reptrt.quantize.rounding.moments import collect_moments
from reptrt.quantize.rounding.nearest_plane import nearest_plane
from reptrt.quantize.rounding.windows import Window, matrix_of, weight_of, window_of
from tests.support.helpers import ort_run

GRID = Grid.weight(8)
LAYERS = {
    "3x3": ("Conv", (1, 4, 7, 6), (6, 4, 3, 3), {"pads": [1, 1, 1, 1]}),
    "strided": ("Conv", (2, 4, 9, 8), (6, 4, 3, 3), {"strides": [2, 1], "pads": [1, 0, 0, 1]}),
    "dilated": ("Conv", (2, 2, 9, 9), (3, 2, 3, 2), {"dilations": [2, 3]}),
    "grouped": ("Conv", (2, 6, 5, 5), (4, 3, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    "depthwise": ("Conv", (2, 5, 5, 5), (5, 1, 3, 3), {"group": 5}),
    "same": ("Conv", (2, 3, 6, 7), (4, 3, 4, 4), {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    "one axis": ("Conv", (2, 3, 9), (4, 3, 3), {"pads": [1, 1]}),
    "product": ("Gemm", (5, 7), (3, 7), {"transB": 1}),
    "product of columns": ("Gemm", (5, 7), (7, 3), {}),
    "many rows": ("MatMul", (2, 4, 7), (7, 3), {}),
}


def net_of(op: str, shape: tuple[int, ...], weight: npt.NDArray[np.float32], attrs: dict) -> Net:
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"], name="layer", **attrs)],
        "one layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return net_from_model(onnx.shape_inference.infer_shapes(model))


def layer_of(net: Net) -> gs.Node:
    return next(node for node in net.graph.nodes if node.name == "layer")


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_weight_are_the_outputs_of_onnxruntime(name: str) -> None:
    op, shape, of_weight, attrs = LAYERS[name]
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    weight = rng.standard_normal(of_weight).astype(np.float32)
    net = net_of(op, shape, weight, attrs)
    axis = 0 if op == "Conv" or attrs.get("transB") else 1
    window = window_of(layer_of(net))
    assert window is not None
    rows = window.rows(torch.from_numpy(x), 10**6, rng).double()
    matrix = torch.from_numpy(matrix_of(weight, axis, window.groups))
    got = torch.einsum("rgd,god->rgo", rows, matrix).reshape(len(rows), -1).numpy()
    wanted = ort_run(model_from_net(net), {"x": x})["y"]
    if op == "Conv":
        wanted = np.moveaxis(wanted, 1, -1)
    np.testing.assert_allclose(got, wanted.reshape(len(rows), -1), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(weight_of(matrix.numpy(), weight.shape, axis), weight)


def test_layers_without_rows_have_no_window() -> None:
    rng = np.random.default_rng(0)
    transposed = net_of("ConvTranspose", (1, 3, 4, 4), np.ones((3, 2, 2, 2), np.float32), {})
    stacked = net_of("MatMul", (2, 4, 3), rng.standard_normal((2, 3, 5)).astype(np.float32), {})
    assert window_of(layer_of(transposed)) is None
    assert window_of(layer_of(stacked)) is None


def covariance_of(rng: np.random.Generator, size: int) -> npt.NDArray[np.float64]:
    mix = rng.standard_normal((size, size)) * rng.uniform(0.1, 3, size)
    return np.asarray(mix.T @ mix / size)


def gptq(weight: npt.NDArray[np.float64], covariance: npt.NDArray[np.float64]) -> np.ndarray:
    """GPTQ as its authors write it: the inverse, its Cholesky factor, updates of what is left."""
    order = np.argsort(np.diag(covariance), kind="stable")[::-1]
    damped = covariance + 0.01 * np.diag(covariance).mean() * np.eye(len(covariance))
    factor = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    left, codes = weight[:, order].copy(), np.zeros_like(weight)
    for j in range(len(order)):
        codes[:, order[j]] = np.clip(np.rint(left[:, j]), GRID.qmin, GRID.qmax)
        error = (left[:, j] - codes[:, order[j]]) / factor[j, j]
        left[:, j:] -= np.outer(error, factor[j, j:])
    return codes


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 90), st.floats(0.5, 200))
def test_codes_are_those_of_gptq(seed: int, size: int, largest: float) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.uniform(-largest, largest, (2, 5, size))
    covariance = np.stack([covariance_of(rng, size) for _ in range(2)])
    got = nearest_plane(torch.from_numpy(weight), torch.from_numpy(covariance), GRID).numpy()
    wanted = np.stack([gptq(w, h) for w, h in zip(weight, covariance, strict=True)])
    assert (got == wanted).mean() > 0.98  # a tie in one code moves those behind it
    assert np.abs(got).max() <= GRID.qmax


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31))
def test_error_is_within_its_bound_and_near_the_best(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight, covariance = rng.uniform(-9, 9, (1, 20, 4)), covariance_of(rng, 4)
    codes = nearest_plane(torch.from_numpy(weight), torch.from_numpy(covariance)[None], GRID)
    error = codes.numpy()[0] - weight[0]
    damped = covariance + 0.01 * np.diag(covariance).mean() * np.eye(4)
    noise = np.einsum("od,de,oe->o", error, damped, error)
    order = np.argsort(np.diag(damped), kind="stable")
    factor = np.linalg.cholesky(damped[np.ix_(order, order)]).T  # lower, transposed
    assert (noise <= np.square(np.diag(factor)).sum() / 4 * (1 + 1e-9)).all()
    steps = np.stack(np.meshgrid(*[np.arange(-3, 4)] * 4), -1).reshape(-1, 4)
    around = (np.floor(weight[0])[:, None] + steps) - weight[0][:, None]
    best = np.einsum("ond,de,one->on", around, damped, around).min(1)
    assert noise.sum() <= 2.5 * best.sum()  # 1.07 on average, 1.83 at most over 300 seeds


def test_uncorrelated_inputs_round_to_nearest() -> None:
    rng = np.random.default_rng(0)
    weight = rng.uniform(-130, 130, (1, 3, 50))
    covariance = torch.diag(torch.from_numpy(rng.uniform(0, 2, 50)))[None]
    codes = nearest_plane(torch.from_numpy(weight), covariance, GRID)
    np.testing.assert_array_equal(codes, np.clip(np.rint(weight), GRID.qmin, GRID.qmax))


def images(seed: int, number: int, channels: int = 4) -> npt.NDArray[np.float32]:
    """Smooth images, whose neighbouring pixels and channels are much alike."""
    rng = np.random.default_rng(seed)
    noise = np.cumsum(np.cumsum(rng.standard_normal((number, channels, 12, 12)), -1), -2)
    return (noise + 2 * noise.mean(1, keepdims=True)).astype(np.float32)


def dataset_of(x: npt.NDArray[np.float32], net: Net) -> Dataset:
    return open_dataset(Arrays("images", x), read_preprocess(net))


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("most_inputs", [1152, 18])  # in one block, and in several
def test_outputs_on_other_images_come_closer(
    monkeypatch: pytest.MonkeyPatch, group: int, most_inputs: int
) -> None:
    monkeypatch.setattr(moments, "_MOST_INPUTS", most_inputs)
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((8, 4 // group, 3, 3)).astype(np.float32)
    weight[:, 0, 1, 1] += 20  # large steps
    net = net_of("Conv", (32, 4, 12, 12), weight, {"pads": [1, 1, 1, 1], "group": group})
    nearest = quantize_weights(net, place(net), GRID)
    memory = {"all": 1 << 30, "little": 1}
    found = {
        name: compensate(
            net,
            TorchGraph(net),
            dataset_of(images(0, 64), net),
            nearest,
            GRID,
            centred=False,
            seed=0,
            memory=size,
        )["layer"]
        for name, size in memory.items()
    }
    np.testing.assert_array_equal(found["all"].codes, found["little"].codes)
    others = torch.from_numpy(images(2, 32))

    def noise(codes: npt.NDArray[np.int8]) -> float:
        error = codes * nearest["layer"].scale[:, None, None, None] - weight
        padded = torch.nn.functional.conv2d(
            others, torch.from_numpy(error), padding=1, groups=group
        )
        return float(padded.square().mean())

    assert noise(found["all"].codes) < 0.3 * noise(nearest["layer"].codes)
    assert np.abs(found["all"].codes).max() <= 127


def compensated(
    net: Net, x: npt.NDArray[np.float32], *, centred: bool = False
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Return the codes of the layer, the nearest codes, and the scales."""
    nearest = quantize_weights(net, place(net), GRID)
    found = compensate(
        net,
        TorchGraph(net),
        dataset_of(x, net),
        nearest,
        GRID,
        centred=centred,
        seed=0,
        memory=1 << 30,
    )
    return found["layer"].codes, nearest["layer"].codes, nearest["layer"].scale


def test_channels_that_are_worse_on_held_out_images_stay_nearest() -> None:
    """The images that judge are noise: what compensates in smooth images does not in them."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((16, 4, 3, 3)).astype(np.float32)
    net = net_of("Conv", (32, 4, 12, 12), weight, {"pads": [1, 1, 1, 1]})
    x = images(0, 64)
    codes, nearest, _ = compensated(net, x)
    assert (codes != nearest).any(axis=(1, 2, 3)).all()
    x[stride_of(64) - 1 :: stride_of(64)] = 9 * rng.standard_normal((8, 4, 12, 12))
    codes, nearest, _ = compensated(net, x)
    assert (codes == nearest).all(axis=(1, 2, 3)).sum() > 8


def flat_net(op: str, weight: npt.NDArray[np.float32]) -> Net:
    """A product that reads images flattened."""
    attrs = {"transB": 1} if op == "Gemm" else {}
    values = weight if op == "Gemm" else np.ascontiguousarray(weight.T)
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node(op, ["flat", "w"], ["y"], name="layer", **attrs),
    ]
    graph = helper.make_graph(
        nodes,
        "a product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (32, 4, 3, 3))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return net_from_model(onnx.shape_inference.infer_shapes(model))


@pytest.mark.parametrize(("op", "less"), [("MatMul", 0.1), ("Gemm", 0.1)])
def test_the_mean_counts_unless_a_bias_takes_it_out(op: str, less: float) -> None:
    """Inputs are 10 and a little noise, so the errors of each output should add up to nothing.

    A MatMul has no bias. That of a Gemm is corrected for the mean, if biases are.
    """
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((24, 36)).astype(np.float32)
    x = (10 + 0.1 * rng.standard_normal((256, 4, 3, 3))).astype(np.float32)
    others = 10 + 0.1 * rng.standard_normal((64, 36))
    noise = {}
    for centred in (False, True):
        codes, nearest, scale = compensated(flat_net(op, weight), x, centred=centred)
        for name, values in (("gptq", codes), ("nearest", nearest)):
            matrix = values if op == "Gemm" else values.T
            error = (matrix * scale[:, None] - weight) @ others.T
            noise[name, centred] = np.square(error).sum()
    assert noise["gptq", False] < less * noise["nearest", False]
    keeps_mean = noise["gptq", True] < less * noise["nearest", True]
    assert keeps_mean == (op == "MatMul")


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("columns", [4, 256])
def test_moments_are_those_of_float64(
    monkeypatch: pytest.MonkeyPatch, offset: float, columns: int
) -> None:
    """All rows of a product are wanted."""
    monkeypatch.setattr(sums, "_COLUMNS", columns)
    rng = np.random.default_rng(0)
    rows = (offset + rng.standard_normal((5000, 2, 6))).astype(np.float32)
    found = sums.Sums(Window((), (), (), (), "", 1), 2)
    for part in np.array_split(rows, 7):
        found.add(torch.from_numpy(part.reshape(-1, 12)), 5000, rng)
    exact = rows.astype(np.float64).transpose(1, 0, 2)
    for centred in (True, False):
        mean, covariance = found.moments(centred=centred)
        middle = exact.mean(1) if centred else np.zeros((2, 6))
        apart = exact - middle[:, None]
        expected = apart.transpose(0, 2, 1) @ apart / 5000
        np.testing.assert_allclose(mean, middle, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(covariance, expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_moments_of_whole_maps_are_those_of_all_rows(data: st.DataObject) -> None:
    """Against float64 on the rows themselves, for any kernel of stride 1."""
    draw, rank = data.draw, data.draw(st.integers(1, 2))
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(rank))
    dilations = tuple(draw(st.integers(1, 2)) for _ in range(rank))
    auto = draw(st.sampled_from(["", "SAME_UPPER", "SAME_LOWER"]))
    pads = () if auto else tuple(draw(st.integers(0, 3)) for _ in range(2 * rank))
    groups, blocks = draw(st.sampled_from([(1, 1), (1, 2), (2, 2), (2, 4), (4, 4)]))
    window = Window(kernel, (1,) * rank, dilations, pads, auto, groups)
    reach = [(taps - 1) * step + 1 for taps, step in zip(kernel, dilations, strict=True)]
    sizes = [max(1, draw(st.integers(1, 6)), taps * (not auto)) for taps in reach]
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    images = torch.from_numpy((3 + rng.standard_normal((9, 4, *sizes))).astype(np.float32))
    found = sums.MapSums(window, blocks)
    for part in images.split(4):
        found.add(part)
    mean, covariance = found.means()
    rows = window.rows(images, 10**6, rng).double().reshape(-1, *mean.shape)
    apart = rows - rows.mean(0)
    np.testing.assert_allclose(mean, rows.mean(0), atol=1e-5)
    expected = torch.einsum("rbd,rbe->bde", apart, apart) / len(rows)
    np.testing.assert_allclose(covariance, expected, atol=2e-4)


def test_small_maps_are_taken_whole_and_large_ones_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """All positions of a large map are too many, however few their products are."""
    taken: list[int] = []
    monkeypatch.setattr(sums.MapSums, "add", lambda _, images: taken.append(images.shape[-1]))
    monkeypatch.setattr(sums.RowSums, "add", lambda *_: None)
    rng = np.random.default_rng(0)
    for size in (4, 8, 16):
        window = Window((3, 3), (1, 1), (1, 1), (1, 1, 1, 1), "", 1)
        sums.Sums(window, 1).add(torch.zeros(2, 2, size, size), 48, rng)
    strided = Window((3, 3), (2, 2), (1, 1), (1, 1, 1, 1), "", 1)
    sums.Sums(strided, 1).add(torch.zeros(2, 2, 4, 4), 48, rng)
    assert taken == [4, 8]


def test_moments_of_kept_values_are_those_of_a_pass() -> None:
    """The net is not run, and channels are scaled; powers of two scale without rounding."""
    weight = np.ones((8, 4, 3, 3), np.float32)
    net = net_of("Conv", (32, 4, 12, 12), weight, {"pads": [1, 1, 1, 1], "strides": [2, 1]})
    window = window_of(layer_of(net))
    assert window is not None
    factors = 2.0 ** np.arange(-1, 3)
    key = moments.Inputs("x", window, 4, centred=True)
    scaled = (images(0, 70) * factors[:, None, None]).astype(np.float32)
    with torch.inference_mode():
        expected = collect_moments(
            TorchGraph(net), dataset_of(scaled, net), [key], seed=3, memory=1
        )[key]
        kept = Kept(1 << 30, 70)
        for part in parts(dataset_of(images(0, 70), net)):
            watch(TorchGraph(net), part, {"x": [kept.record]}, "values")
        kept.factors = {"x": factors}
        unused = TorchGraph(net_of("Gemm", (5, 7), np.ones((3, 7), np.float32), {"transB": 1}))
        found = collect_moments(
            unused, dataset_of(scaled, net), [key], seed=3, memory=1, kept=kept
        )[key]
    torch.testing.assert_close(found.covariance, expected.covariance, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.judges, expected.judges, rtol=1e-6, atol=1e-6)
    assert found.judges.shape[0] >= 8 * 6 * 12
