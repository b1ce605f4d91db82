"""Curvature of tensors: against Jacobians, the error that it predicts, and what rounding gains."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx
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
from reptrt.quantize.calib.measure import Measure, relative
from reptrt.quantize.reconstruct.loss import Loss, roots_of
from reptrt.quantize.rounding import curvature as curvatures
from reptrt.quantize.rounding import nearest_plane as planes
from reptrt.quantize.rounding.compensate import compensate
from reptrt.quantize.rounding.curvature import collect_curvature, in_steps, layer_outputs
from reptrt.quantize.rounding.nearest_plane import nearest_plane
from tests.support.helpers import ort_run

GRID = Grid.weight(8)


def net_of(
    nodes: list[onnx.NodeProto],
    weights: Mapping[str, npt.NDArray[np.floating]],
    outputs: tuple[str, ...] = ("y",),
    channels: int = 4,
) -> Net:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (None, channels, 6, 6))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(w, np.float32), name) for name, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return net_from_model(onnx.shape_inference.infer_shapes(model))


def classifier(classes: int, seed: int = 0) -> Net:
    """Conv, Relu, a strided Conv, GlobalAveragePool, Gemm."""
    rng = np.random.default_rng(seed)
    weights = {
        "w1": rng.standard_normal((6, 4, 3, 3)) / 3,
        "b1": rng.standard_normal(6),
        "w2": rng.standard_normal((5, 6, 3, 3)) / 3,
        "w3": rng.standard_normal((classes, 5)),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="one", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="two", strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["c2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w3"], ["y"], name="three", transB=1),
    ]
    return net_of(nodes, weights)


def detector(seed: int = 0) -> Net:
    """Two levels of boxes and scores of three classes behind a Sigmoid."""
    rng = np.random.default_rng(seed)
    weights = {
        "w": rng.standard_normal((8, 4, 3, 3)) / 3,
        "wb": rng.standard_normal((4, 8, 1, 1)),
        "ws": rng.standard_normal((3, 8, 1, 1)) / 2,
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="one", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Conv", ["r", "wb"], ["boxes"], name="boxes"),
        helper.make_node("Conv", ["r", "ws"], ["logits"], name="scores"),
        helper.make_node("Sigmoid", ["logits"], ["p"]),
    ]
    return net_of(nodes, weights, ("boxes", "p"))


def images(number: int, channels: int = 4, seed: int = 0) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((number, channels, 6, 6)).astype(np.float32)


def dataset_of(x: npt.NDArray[np.float32], net: Net) -> Dataset:
    return open_dataset(Arrays("images", x), read_preprocess(net))


def curvature_of(net: Net, data: Dataset, axes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    return collect_curvature(net, data, axes, images=64, seed=0, device=torch.device("cpu"))


def jacobian_products(net: Net, x: npt.NDArray[np.float32], name: str, axis: int) -> torch.Tensor:
    """Return the sum of J^T diag(1 / sum y^2) J over images and positions, one output at a time."""
    graph = TorchGraph(net).double()
    total = torch.zeros(())
    for start in range(0, len(x), curvatures._BATCH):
        some = torch.from_numpy(x[start : start + curvatures._BATCH]).double().requires_grad_()
        seen: list[torch.Tensor] = []
        outputs = graph.run({"x": some}, ["y"], observe={name: seen.append})["y"]
        for value in outputs.flatten():
            (gradient,) = torch.autograd.grad(value, seen[0], retain_graph=True)
            rows = gradient.movedim(axis, -1).flatten(0, -2)
            total = total + rows.mT @ rows / outputs.detach().square().sum()
    return total


def normalized(x: torch.Tensor) -> npt.NDArray[np.float64]:
    return np.asarray(x / x.diagonal().mean())


@pytest.mark.parametrize(("name", "axis"), [("c1", 1), ("c2", 1), ("f", 1), ("y", -1)])
def test_curvature_is_that_of_the_jacobian(
    name: str, axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a single output any sign gives it exactly; with several, on average."""
    single, several = classifier(1), classifier(3)
    x = images(10)
    got = curvature_of(single, dataset_of(x, single), {name: axis})[name]
    wanted = jacobian_products(single, x, name, axis)
    np.testing.assert_allclose(normalized(got), normalized(wanted), rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(curvatures, "_SIGNS", 400)
    got = curvature_of(several, dataset_of(x, several), {name: axis})[name]
    wanted = jacobian_products(several, x, name, axis)
    np.testing.assert_allclose(normalized(got), normalized(wanted), atol=0.1)


@pytest.mark.parametrize("make", [lambda: classifier(3), detector], ids=["classifier", "detector"])
def test_it_predicts_the_measured_error(make: object) -> None:
    """Errors in some directions, at all positions: the measure and e^T G e order them alike."""
    net = make()  # type: ignore[operator]
    graph, x = TorchGraph(net), images(64)
    name = "c1" if "c1" in net.graph.tensors() else "c"
    g = curvature_of(net, dataset_of(x, net), {name: 1})[name]
    values, vectors = torch.linalg.eigh(g)
    measure = Measure(graph)
    rng = np.random.default_rng(0)
    exact = graph.run({"x": torch.from_numpy(x)}, measure.names)
    measured = []
    for vector in vectors.mT:
        places = torch.from_numpy(rng.choice([-1.0, 1.0], (64, 1, 6, 6)).astype(np.float32))
        move = 0.01 * vector.float()[None, :, None, None] * places
        got = graph.run(
            {"x": torch.from_numpy(x)}, measure.names, overrides={name: lambda v, m=move: v + m}
        )
        sums = measure.sums(exact, got).values()
        measured.append(sum(float(relative(*pair)) for pair in sums))
    ratio = np.array(measured) / values.clamp_min(1e-30).numpy()
    big = values > 0.02 * values.max()
    assert int(big.sum()) >= 3
    ratios = ratio[big.numpy()]
    assert ratios.max() / ratios.min() < 2.5


def test_outputs_count_in_their_own_units() -> None:
    """An output in millimetres does not outvote one in metres."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((6, 4, 1, 1)), "k": np.float32(1000)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="layer"),
        helper.make_node("Split", ["c", "sizes"], ["y", "half"], axis=1),
        helper.make_node("Mul", ["half", "k"], ["z"]),
    ]
    net = net_of(nodes, {**weights, "sizes": np.zeros(1)}, ("y", "z"))
    sizes = net.graph.tensors()["sizes"]
    sizes.values = np.array([3, 3], np.int64)
    g = curvature_of(net, dataset_of(images(32), net), {"c": 1})["c"]
    diagonal = g.diagonal()
    assert 0.2 < float(diagonal[:3].mean() / diagonal[3:].mean()) < 5


def test_what_no_output_hears_of_is_left_out() -> None:
    net = classifier(3)
    codes = helper.make_node("ArgMax", ["y"], ["z"], axis=1)
    model = model_from_net(net)
    model.graph.node.append(codes)
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.INT64, None))
    silent = net_from_model(model)
    data = dataset_of(images(8), silent)
    found = curvature_of(silent, data, {"c1": 1})
    assert found.keys() <= {"c1"}  # compared at the logits in place of the class, or not at all
    wide = curvature_of(net, data, {"c1": 1, "r1": 2})
    assert wide["r1"].shape == (6, 6)


def covariance_of(rng: np.random.Generator, size: int) -> npt.NDArray[np.float64]:
    mix = rng.standard_normal((size, size)) * rng.uniform(0.1, 3, size)
    return np.asarray(mix.T @ mix / size)


def damped(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return x + 0.01 * np.diag(x).mean() * np.eye(len(x))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 12))
def test_codes_are_the_nearest_plane_of_the_product(seed: int, outputs: int, inputs: int) -> None:
    """Babai's algorithm, one code at a time, for the Kronecker product of both matrices."""
    rng = np.random.default_rng(seed)
    weight = rng.uniform(-20, 20, (outputs, inputs))
    g, h = covariance_of(rng, outputs), covariance_of(rng, inputs)
    rows, columns = (np.argsort(np.diag(m), kind="stable") for m in (g, h))
    factor = np.linalg.cholesky(
        np.kron(damped(g)[np.ix_(rows, rows)], damped(h)[np.ix_(columns, columns)])
    ).T
    exact = weight[np.ix_(rows, columns)].reshape(-1)
    error = np.zeros_like(exact)
    for j in range(len(exact) - 1, -1, -1):
        pull = factor[j, j + 1 :] @ error[j + 1 :] / factor[j, j]
        error[j] = exact[j] - np.rint(exact[j] + pull)
    wanted = np.zeros_like(weight)
    wanted[np.ix_(rows, columns)] = (exact - error).reshape(outputs, inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planes, "_PARTS", outputs)
        got = nearest_plane(
            *(torch.from_numpy(x)[None] for x in (weight, h)), GRID, torch.from_numpy(g)[None]
        )
    assert (got[0].numpy() == wanted).mean() > 0.98 or outputs * inputs < 50


@pytest.mark.parametrize("parts", [1, 3, 8, 64])
def test_outputs_that_are_added_up_lose_less(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "_PARTS", parts)
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.uniform(-9, 9, (2, 24, 30)))
    h = torch.from_numpy(np.stack([covariance_of(rng, 30) for _ in range(2)]))
    mix = rng.standard_normal((4, 24))
    g = torch.from_numpy(mix.T @ mix + 0.05 * np.eye(24)).expand(2, -1, -1)

    def noise(codes: torch.Tensor) -> float:
        error = codes - weight
        return float(((error @ h) * (g @ error)).sum())

    alone, together = (nearest_plane(weight, h, GRID, c) for c in (None, g))
    assert torch.equal(together, together.round())
    if parts == 1:
        assert torch.equal(together, alone)
    else:
        assert noise(together) < (0.75 if parts == 3 else 0.5) * noise(alone)


def test_steps_and_groups_of_a_curvature() -> None:
    rng = np.random.default_rng(0)
    g, steps = covariance_of(rng, 6), rng.uniform(0.5, 2, (2, 3, 1))
    got = in_steps(torch.from_numpy(g), torch.from_numpy(steps)).numpy()
    for group in range(2):
        own = g[3 * group : 3 * group + 3, 3 * group : 3 * group + 3]
        np.testing.assert_allclose(got[group], own * steps[group] * steps[group].T)


@pytest.mark.parametrize("group", [1, 2])
def test_the_net_comes_closer_to_its_float_outputs(group: int) -> None:
    """A layer whose outputs are added up by the next one, in onnxruntime, on other images."""
    rng = np.random.default_rng(5)
    weights = {
        "w1": rng.standard_normal((16, 4 // group, 3, 3)),
        "w2": rng.standard_normal((2, 16, 1, 1)),
    }
    weights["w1"][:, 0, 1, 1] += 30  # large steps
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c"], name="one", pads=[1, 1, 1, 1], group=group),
        helper.make_node("Conv", ["c", "w2"], ["y"], name="two"),
    ]
    net = net_of(nodes, weights)
    graph, data = TorchGraph(net), dataset_of(np.cumsum(images(64), -1), net)
    nearest = {"one": quantize_weights(net, place(net), GRID)["one"]}
    axes = layer_outputs([node for node in net.graph.nodes if node.name == "one"])
    curvature = curvature_of(net, data, axes)
    others = np.cumsum(images(32, seed=1), -1)
    wanted = ort_run(model_from_net(net), {"x": others})["y"]

    def noise(known: Mapping[str, torch.Tensor]) -> float:
        codes = compensate(
            net, graph, data, nearest, GRID, centred=False, seed=0, memory=1 << 30, curvature=known
        )["one"]
        model = model_from_net(net)
        for tensor in model.graph.initializer:
            if tensor.name == "w1":
                tensor.CopyFrom(numpy_helper.from_array(codes.dequantized(), "w1"))
        return float(np.square(ort_run(model, {"x": others})["y"] - wanted).mean())

    assert noise(curvature) < 0.6 * noise({})


def test_losses_count_by_the_curvature() -> None:
    rng = np.random.default_rng(0)
    measure = Measure(TorchGraph(classifier(3)))
    g = torch.from_numpy(covariance_of(rng, 6))
    loss = Loss(measure, "mse", roots_of({"c1": 7 * g}, torch.device("cpu")))
    value, target = (torch.from_numpy(rng.standard_normal((3, 6, 4, 4))).float() for _ in "ab")
    scaled = damped(g.numpy() / np.diag(g.numpy()).mean())

    def power(x: torch.Tensor) -> float:
        return float(np.einsum("nchw,cd,ndhw->", x.numpy(), scaled, x.numpy()))

    (counted,) = loss.errors({"c1": value}, {"c1": target})
    assert float(counted) == pytest.approx(power(value - target) / power(target), rel=1e-4)
    (plain,) = loss.errors({"c2": value}, {"c2": target})
    wanted = float((value - target).square().sum() / target.square().sum())
    assert float(plain) == pytest.approx(wanted, rel=1e-5)
