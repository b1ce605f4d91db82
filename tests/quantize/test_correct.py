"""Corrected weights: against least squares in numpy, and their effect on nets."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from reptrt.core.grid import Grid
from reptrt.graph.net import Net, constant_of, model_from_net, net_from_model
from reptrt.graph.splits import read_splits
from reptrt.judge.evaluate import evaluate
from reptrt.judge.options import EvaluateOptions
from reptrt.pipeline import CalibrateOptions, calibrate
from reptrt.quantize.reconstruct import correct as correcting
from reptrt.quantize.reconstruct.correct import Seen, correct, find_layers
from reptrt.quantize.reconstruct.state import Pair, Sites, State, WeightSite
from reptrt.quantize.rounding.windows import matrix_of
from reptrt.rewrite.split_coarse_fine import split_coarse_fine
from reptrt.rewrite.split_identity import split_identity
from tests.support.helpers import ort_run
from tests.support.learned_nets import rep_net, write_images, write_net

GRID = Grid.weight(8)
STEP = 0.01
LAYERS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ("Conv", (64, 4, 5, 5), (6, 4, 3, 3), {"pads": [1, 1, 1, 1]}),
    "square": ("Conv", (64, 4, 5, 5), (4, 4, 3, 3), {"pads": [1, 1, 1, 1]}),
    "strided": ("Conv", (64, 4, 7, 7), (6, 4, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "grouped": ("Conv", (64, 6, 5, 5), (4, 3, 3, 3), {"group": 2}),
    "depthwise": ("Conv", (64, 3, 6, 6), (3, 1, 3, 3), {"group": 3, "pads": [1, 1, 1, 1]}),
    "pointwise": ("Conv", (64, 4, 5, 5), (6, 4, 1, 1), {}),
    "product": ("Gemm", (500, 7), (3, 7), {"transB": 1}),
    "product of columns": ("Gemm", (500, 7), (7, 3), {}),
}


def one_layer(name: str) -> tuple[Net, Sites, State]:
    """Return a net of one layer and what can be learned in it."""
    op, shape, of_weight, attrs = LAYERS[name]
    rng = np.random.default_rng(1)
    weight = rng.standard_normal(of_weight).astype(np.float32)
    if name == "square":
        weight[range(4), range(4), 1, 1] += 3
    axis = 0 if op == "Conv" or attrs.get("transB") else 1
    outputs = of_weight[axis]
    constants = {"w": weight, "b": rng.standard_normal(outputs).astype(np.float32)}
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *constants], ["y"], name="layer", **attrs)],
        "one layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (None, *shape[1:]))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, key) for key, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    largest = np.abs(np.moveaxis(weight, axis, 0)).reshape(outputs, -1).max(1)
    scale = (largest / GRID.qmax).reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    site = WeightSite(
        "layer", torch.from_numpy(weight), torch.from_numpy(scale), "w.dq", "layer", exact=False
    )
    pair = Pair("x", frozenset({"layer"}), ("x.quantize",), "x.dequantize", 0, Grid.weight(8))
    sites = Sites({"layer": site}, {"x": pair}, {"layer": ("gain", "shift")}, GRID)
    broad = (1, outputs, *[1] * (len(shape) - 2))
    state = State(
        {"layer": torch.round(site.weight / site.scale)},
        {"layer": torch.ones(broad)},
        {"layer": torch.zeros(broad)},
        {0: torch.tensor(STEP)},
    )
    return net_from_model(onnx.shape_inference.infer_shapes(model)), sites, state


def inputs_of(name: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return inputs in the float net, and distorted ones in the quantized net."""
    rng = np.random.default_rng(0)
    exact = rng.uniform(-0.5, 0.5, LAYERS[name][1]).astype(np.float32)
    noise = 0.03 * rng.standard_normal(exact.shape)
    return exact, (0.9 * exact + 0.1 * np.roll(exact, 1, axis=1) + 0.05 + noise).astype(np.float32)


@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_those_of_least_squares(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correcting, "_DAMPINGS", (1e-9,))
    net, sites, state = one_layer(name)
    (layer,) = find_layers(net, sites, {}).values()
    exact, given = inputs_of(name)
    batches = [
        (torch.from_numpy(x), torch.from_numpy(y))
        for x, y in zip(np.array_split(exact, 3), np.array_split(given, 3), strict=True)
    ]
    seen = Seen(batches, 10**6)
    site, found = correct(layer, seen, seen, state, GRID)
    window, rng = layer.inputs.window, np.random.default_rng(0)
    quantized = np.clip(np.rint(given / np.float32(STEP)), -127, 127) * np.float32(STEP)

    def rows(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        return window.rows(torch.from_numpy(x), 10**6, rng).double().numpy()

    before, after = (
        matrix_of(weight.numpy(), layer.axis, window.groups)
        for weight in (sites.weights["layer"].weight, site.weight)
    )
    x, y = rows(exact), rows(quantized)
    for group in range(window.groups):
        wanted = x[:, group] @ before[group].T
        centred = y[:, group] - y[:, group].mean(0)
        best, *_ = np.linalg.lstsq(centred, wanted - wanted.mean(0), rcond=None)
        np.testing.assert_allclose(after[group], best.T, rtol=1e-3, atol=1e-3)
    # With its codes and shift, the layer has the mean outputs of the float layer, in onnxruntime.
    model = model_from_net(net)
    outputs = ort_run(model, {"x": exact})["y"]
    for tensor in model.graph.initializer:
        if tensor.name == "w":
            rounded = (found.codes["layer"] * site.scale).numpy()
            tensor.CopyFrom(numpy_helper.from_array(rounded.astype(np.float32), "w"))
        else:
            tensor.CopyFrom(numpy_helper.from_array(found.shift["layer"].numpy().reshape(-1), "b"))
    again = ort_run(model, {"x": quantized})["y"]
    axes = tuple(i for i in range(outputs.ndim) if i != 1)
    np.testing.assert_allclose(again.mean(axes), outputs.mean(axes), atol=1e-4)
    assert np.abs(found.codes["layer"].numpy()).max() <= GRID.qmax


def test_what_cannot_be_corrected_is_left_out() -> None:
    net, sites, _ = one_layer("3x3")
    assert [*find_layers(net, sites, {})] == ["layer"]
    for without in (replace(sites, affines={}), replace(sites, pairs={})):
        assert not find_layers(net, without, {})


def test_what_other_images_deny_is_not_corrected() -> None:
    """Where the error of held-out images has another sign, the weight stays; else it moves."""
    net, sites, state = one_layer("3x3")
    (layer,) = find_layers(net, sites, {}).values()
    exact, given = (torch.from_numpy(x) for x in inputs_of("3x3"))
    seen, opposite = (Seen([(x, given)], 10**6) for x in (exact, 2 * given - exact))
    moved, _ = correct(layer, seen, seen, state, GRID)
    stayed, _ = correct(layer, seen, opposite, state, GRID)
    weight = sites.weights["layer"].weight
    np.testing.assert_allclose(stayed.weight, weight, atol=1e-6)
    assert float((moved.weight - weight).abs().max()) > 0.05


@pytest.mark.parametrize("name", ["3x3", "grouped", "product of columns"])
def test_codes_count_by_the_curvature_of_the_outputs(name: str) -> None:
    """Outputs of very different steps, whose sums are all that is heard of."""
    net, sites, state = one_layer(name)
    (layer,) = find_layers(net, sites, {}).values()
    site, outputs = layer.site, len(layer.bias)
    spread = torch.logspace(0, 1, outputs).reshape([-1 if n > 1 else 1 for n in site.scale.shape])
    layer = replace(layer, site=replace(site, scale=10 * site.scale * spread))
    mix = torch.from_numpy(np.random.default_rng(2).standard_normal((1, outputs)))
    counts = mix.mT @ mix + 0.01 * torch.eye(outputs)
    exact, given = (torch.from_numpy(x) for x in inputs_of(name))
    seen = Seen([(exact, given)], 10**6)
    window, rng = layer.inputs.window, np.random.default_rng(0)
    rows = window.rows(given, 10**6, rng).double()
    rows = rows - rows.mean(0)

    def noise(curvature: torch.Tensor | None) -> float:
        corrected, found = correct(replace(layer, curvature=curvature), seen, seen, state, GRID)
        error = found.codes["layer"] * layer.site.scale - corrected.weight
        matrix = torch.from_numpy(matrix_of(error.numpy(), layer.axis, window.groups))
        off = torch.einsum("rgd,god->rgo", rows, matrix).flatten(1)
        return float(((off.T @ off) * counts).sum())

    assert noise(counts) < 0.6 * noise(None)


def test_the_damping_is_what_other_images_ask_for() -> None:
    """The error of few images is noise: what all images ask for is nearer with more damping."""
    net, sites, state = one_layer("3x3")
    (layer,) = find_layers(net, sites, {}).values()
    rng = np.random.default_rng(3)
    given = torch.from_numpy(rng.uniform(-0.5, 0.5, (64, 4, 5, 5)).astype(np.float32))
    noise = torch.from_numpy(0.02 * rng.standard_normal((64, 4, 5, 5)).astype(np.float32))
    exact = given + noise + 0.004 * given.roll(1, 1)
    few, others = (Seen([(exact[part], given[part])], 1e6) for part in (slice(4), slice(4, None)))
    weight = sites.weights["layer"].weight

    def off(judges: Seen) -> float:
        corrected, _ = correct(layer, few, judges, state, GRID)
        outputs = [
            torch.nn.functional.conv2d(x.double(), w.double(), padding=1)
            for x, w in ((exact[4:], weight), (given[4:], corrected.weight))
        ]
        return float((outputs[0] - outputs[1]).square().mean())

    assert off(others) < 0.9 * off(few)


@pytest.mark.parametrize("form", ["identity", "identity-scalar", "coarse-fine"])
def test_the_main_summand_takes_the_errors_of_the_whole_layer(form: str) -> None:
    """With x^ = 0.9 x the whole weight has to grow by a ninth, and the side summand stays."""
    net, sites, state = one_layer("square")
    site = sites.weights["layer"]
    weight = site.weight.numpy()
    split = split_coarse_fine if form == "coarse-fine" else partial(split_identity, form=form)
    split(net, ["layer"], grid=GRID)
    (summands,) = read_splits(net)
    parts = {node.name: node for node in net.graph.nodes}
    weights = {
        name: replace(
            site, node=name, weight=torch.from_numpy(constant_of(parts[name].inputs[1]).copy())
        )
        for name in (summands.main, summands.side)
        if parts[name].op == "Conv"
    }
    layers = find_layers(net, replace(sites, weights=weights), {})
    assert [*layers] == [summands.main]
    layer = layers[summands.main]
    np.testing.assert_allclose(layer.whole, weight, atol=1e-6)
    exact, _ = inputs_of("square")
    fine = replace(state, step={0: torch.tensor(1e-4)})
    layer = replace(layer, pair=replace(layer.pair, grid=Grid.weight(16)))
    seen = Seen([(torch.from_numpy(exact), torch.from_numpy(np.float32(0.9) * exact))], 10**6)
    corrected, found = correct(layer, seen, seen, fine, GRID)
    side = weight - layer.site.weight.numpy()
    np.testing.assert_allclose(corrected.weight.numpy() + side, weight / 0.9, rtol=0.02, atol=0.02)
    assert found.codes.keys() == {summands.main}


def sqnr(folder: Path, name: str, options: CalibrateOptions) -> tuple[float, list[str]]:
    """Return the SQNR on images nobody saw, and what was kept of each unit."""
    report = calibrate(folder / "m.onnx", folder / "d.npz", folder / name, options)
    judged = EvaluateOptions(reference=folder / "m.onnx")
    result = evaluate([folder / name], folder / "unseen.npz", judged).results[0]
    assert report.learned is not None
    return result.sqnr_db or 0.0, [unit.kept for unit in report.learned.units]


@pytest.mark.slow
def test_layers_take_back_what_layers_before_them_lost(tmp_path: Path) -> None:
    """Without steps of learning, at 6 bits."""
    write_net(tmp_path / "m.onnx", rep_net(4))
    write_images(tmp_path / "d.npz", 256)
    write_images(tmp_path / "unseen.npz", 256, seed=1)
    base = CalibrateOptions(
        images=256, max_overhead=0.0, recipe="accurate", weight_bits=6, activation_bits=6
    )
    learning = base.learning
    assert learning is not None
    assert learning.correct
    still = replace(learning, rounding=False, affine=True, steps=False, iterations=1)
    still = replace(still, affine_rate=1e-9)
    alone, _ = sqnr(tmp_path, "a.onnx", replace(base, learn=replace(still, correct=False)))
    corrected, kept = sqnr(tmp_path, "b.onnx", replace(base, learn=still))
    assert corrected > alone + 0.5
    assert {*kept} & {"corrected", "learned"}


def test_only_learned_rounding_of_codes_that_compensate_is_corrected() -> None:
    for recipe, expected in (("accurate", True), ("balanced", True), ("repapq", False)):
        learning = CalibrateOptions(recipe=recipe).learning  # type: ignore[arg-type]
        assert learning is not None
        assert learning.correct == learning.weighted == expected
