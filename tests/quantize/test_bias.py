"""Bias correction: the mean error of quantized weights, against brute force over all images."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from reptrt.core.grid import Grid
from reptrt.data.dataset import Dataset, open_dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import Net, model_from_net, net_from_model
from reptrt.graph.placement import place
from reptrt.graph.plan import QuantizedWeight
from reptrt.graph.preprocess import Preprocess, read_preprocess, write_preprocess
from reptrt.graph.qdq import quantize_weights
from reptrt.graph.splits import read_splits
from reptrt.pipeline import CalibrateOptions, calibrate, quantities
from reptrt.quantize.calib.bias import bias_errors, deployed_weights
from reptrt.quantize.calib.collect import collect
from reptrt.quantize.calib.options import ThresholdOptions
from reptrt.quantize.calib.outputs import Outputs
from tests.support.helpers import ort_run
from tests.support.learned_nets import rep_net, write_images, write_net
from tests.support.onnx_nets import Builder
from tests.support.qdq_nets import images, with_outputs

COUNT = 45  # neither a multiple of the batch size nor less than one
X = np.abs(images(COUNT, seed=4)) + 0.1  # a mean that is far from 0
COARSE = Grid.weight(3)  # large errors, so that rounding of float32 does not matter
PREPROCESS = Preprocess.plain(3, 8, 8)
PLAIN = CalibrateOptions(
    images=COUNT,
    threshold=ThresholdOptions("max"),
    equalize=False,
    split="none",
    full_range=False,
    rounding="nearest",
    weight_bits=3,
)


def many_layers() -> onnx.ModelProto:
    """Every kind of layer: pads, strides, groups, dilations, no bias, transposed, Gemm."""
    b = Builder()
    y = b.relu(b.conv("x", 8, "padded"))
    y = b.relu(b.conv(y, 8, "strided", strides=[2, 2], pads=[0, 1, 2, 1]))
    y = b.relu(b.conv(y, 8, "grouped", group=2))
    y = b.relu(b.conv(y, 8, "depthwise", group=8, dilations=[2, 2], pads=[2] * 4))
    b.nodes[-2].input.pop()  # without a bias
    b.node("ConvTranspose", [y, b.parameter("up.weight", 8, 3, 3, 3)], "up", kernel_shape=[3, 3])
    b.channels["up"] = 6
    b.nodes[-1].attribute.extend([onnx.helper.make_attribute("group", 2)])
    b.nodes[-1].attribute.extend([onnx.helper.make_attribute("strides", [2, 2])])
    y = b.relu("up")
    flat = b.node("Flatten", [b.node("GlobalAveragePool", [y], "pool")], "flat")
    b.channels[flat] = 6
    y = b.relu(b.gemm(flat, 7, "turned"))
    b.channels[y] = 7
    b.node("Gemm", [y, b.parameter("head.weight", 7, 5)], "head")
    return b.model("head")


def matmul_net(bias_of_conv: bool = False) -> onnx.ModelProto:
    """A MatMul, and on request a convolution whose bias is computed."""
    b = Builder()
    y = b.conv("x", 4, "c1")
    if bias_of_conv:
        conv = b.nodes.pop()
        conv.input[2] = b.node("Abs", ["c1.bias"], "computed")
        b.nodes.append(conv)
    y = b.node("GlobalAveragePool", [b.relu(y)], "pool")
    y = b.node("Flatten", [y], "flat")
    return b.model(b.node("MatMul", [y, b.parameter("v", 4, 5)], "head"))


def dataset(folder: Path, x: np.ndarray = X) -> Dataset:
    np.save(folder / "x.npy", x)
    return open_dataset(folder / "x.npy", PREPROCESS)


def layer64(node: onnx.NodeProto, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Return the output of a layer without its bias, in float64, computed by definition."""
    attrs = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    x, w = x.astype(np.float64), w.astype(np.float64)
    if node.op_type in ("Gemm", "MatMul"):
        return x @ (w.T if attrs.get("transB", 0) else w)
    groups, strides = attrs.get("group", 1), attrs.get("strides", [1, 1])
    dilations = attrs.get("dilations", [1, 1])
    top, left, bottom, right = attrs.get("pads", [0] * 4)
    reach = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
    parts = []
    if node.op_type == "Conv":
        x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
        height, width = (
            (n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, strides, strict=True)
        )
        for xg, wg in zip(np.split(x, groups, 1), np.split(w, groups, 0), strict=True):
            y = np.zeros((len(x), len(wg), height, width))
            for u, v in np.ndindex(*w.shape[2:]):
                rows = slice(u * dilations[0], u * dilations[0] + height * strides[0], strides[0])
                columns = slice(v * dilations[1], v * dilations[1] + width * strides[1], strides[1])
                y += np.einsum(
                    "nihw,oi->nohw", xg[:, :, rows, columns][:, :, :height, :width], wg[:, :, u, v]
                )
            parts.append(y)
    else:
        height, width = (
            (n - 1) * s + r for n, r, s in zip(x.shape[2:], reach, strides, strict=True)
        )
        for xg, wg in zip(np.split(x, groups, 1), np.split(w, groups, 0), strict=True):
            y = np.zeros((len(x), wg.shape[1], height, width))
            for u, v in np.ndindex(*w.shape[2:]):
                y[
                    :,
                    :,
                    u : u + x.shape[2] * strides[0] : strides[0],
                    v : v + x.shape[3] * strides[1] : strides[1],
                ] += np.einsum("nihw,io->nohw", xg, wg[:, :, u, v])
            parts.append(y)
    return np.concatenate(parts, 1)


def channel_means(values: np.ndarray, node: onnx.NodeProto) -> np.ndarray:
    axis = values.ndim - 1 if node.op_type == "MatMul" else 1
    return values.mean(axis=tuple(i for i in range(values.ndim) if i != axis))


def float_values(model: onnx.ModelProto, x: np.ndarray) -> dict[str, np.ndarray]:
    """Return every tensor of a float net on all images, computed by onnxruntime."""
    names = [name for node in model.graph.node for name in node.output]
    return ort_run(with_outputs(model, names), {"x": x}, optimize=False) | {"x": x}


def expected_errors(
    model: onnx.ModelProto, weights: dict[str, QuantizedWeight], x: np.ndarray
) -> dict[str, np.ndarray]:
    values = float_values(model, x)
    floats = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    found = {}
    for node in (node for node in model.graph.node if node.name in weights):
        weight = weights[node.name]
        shape = [-1 if i == weight.axis else 1 for i in range(weight.codes.ndim)]
        deployed = weight.codes * weight.scale.astype(np.float64).reshape(shape)
        error = deployed - floats[node.input[1]].astype(np.float64)
        found[node.name] = channel_means(layer64(node, values[node.input[0]], error), node)
    return found


def errors_of(net: Net, data: Dataset) -> tuple[dict[str, np.ndarray], dict[str, QuantizedWeight]]:
    weights = quantize_weights(net, place(net), COARSE)
    inputs = {node.name: node.inputs[0].name for node in net.graph.nodes}
    graph = TorchGraph(net)
    means = collect(graph, data, [], [inputs[name] for name in weights]).means
    return bias_errors(graph, means, weights), weights


def test_the_oracle_computes_what_onnxruntime_does() -> None:
    model = many_layers()
    values = float_values(model, X[:3])
    floats = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    layers = [node for node in model.graph.node if len(node.input) > 1]
    assert len(layers) == 7
    for node in layers:
        got = layer64(node, values[node.input[0]], floats[node.input[1]])
        if len(node.input) > 2:
            got += floats[node.input[2]].reshape(-1, *[1] * (got.ndim - 2))
        np.testing.assert_allclose(got, values[node.output[0]], atol=1e-5)


def test_errors_are_the_mean_over_all_images(tmp_path: Path) -> None:
    model = many_layers()
    errors, weights = errors_of(net_from_model(model), dataset(tmp_path))
    expected = expected_errors(model, weights, X)
    assert errors.keys() == expected.keys() == set(weights)
    for name, wanted in expected.items():
        assert np.abs(wanted).max() > 1e-3, name  # there is something to find
        np.testing.assert_allclose(errors[name], wanted, rtol=1e-4, atol=1e-5)


def test_the_size_of_a_batch_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, data = net_from_model(many_layers()), dataset(tmp_path)
    found = []
    for size in (32, 7, 64):
        monkeypatch.setattr("reptrt.quantize.calib.collect.COMPUTE_BATCH", size)
        found.append(errors_of(net, data)[0])
    for other in found[1:]:
        for name, wanted in found[0].items():
            np.testing.assert_allclose(other[name], wanted, rtol=1e-4, atol=1e-6)


def test_a_net_exported_for_one_image(tmp_path: Path) -> None:
    """A net whose head is a Reshape to [1, -1], which folds a batch into one row."""
    b = Builder()
    y = b.node("GlobalAveragePool", [b.relu(b.conv("x", 4, "c1"))], "pool")
    b.node("Reshape", [y, b.constant("shape", np.int64([1, -1]))], "flat")
    b.channels["flat"] = 4
    model = b.model(b.gemm("flat", 5, "head"), batch=1)
    errors, weights = errors_of(net_from_model(model), dataset(tmp_path))
    expected: dict[str, np.ndarray] = dict.fromkeys(weights, np.zeros(()))
    for image in X:
        for name, error in expected_errors(model, weights, image[None]).items():
            expected[name] = expected[name] + error / COUNT
    for name, wanted in expected.items():
        np.testing.assert_allclose(errors[name], wanted, rtol=1e-4, atol=1e-5)


# Through the pipeline ----------------------------------------------------------------------------


def calibrated(folder: Path, model: onnx.ModelProto, options: CalibrateOptions) -> onnx.ModelProto:
    net = net_from_model(model)
    write_preprocess(net, PREPROCESS)
    onnx.save(model_from_net(net), str(folder / "m.onnx"))
    np.save(folder / "x.npy", X)
    calibrate(folder / "m.onnx", folder / "x.npy", folder / "o.onnx", options)
    return onnx.load(str(folder / "o.onnx"))


def mean_errors(model: onnx.ModelProto, written: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return layer -> mean error of its output, given the float net's input, per channel.

    A split layer counts once: the sum of its parts against the layer as it was.
    """
    values = float_values(model, X)
    constants = {t.name: numpy_helper.to_array(t) for t in written.graph.initializer}
    makers = {name: node for node in written.graph.node for name in node.output}
    inputs = {node.name: node.input[0] for node in model.graph.node}
    splits = read_splits(net_from_model(written))
    layer_of = {part: s.layer for s in splits for part in (s.main, s.side)}
    totals: dict[str, np.ndarray] = {}
    for node in written.graph.node:
        layer = layer_of.get(node.name, node.name)
        if layer not in inputs:
            continue
        x = values[inputs[layer]]
        dequantize = makers.get(node.input[1]) if len(node.input) > 1 else None
        if dequantize is not None and dequantize.input[0] in constants:
            codes, scale = (constants[name] for name in dequantize.input[:2])
            axis = dequantize.attribute[0].i
            shape = [-1 if i == axis else 1 for i in range(codes.ndim)]
            y = layer64(node, x, codes * scale.astype(np.float64).reshape(shape))
            if len(node.input) > 2:
                y += constants[node.input[2]].reshape(-1, *[1] * (y.ndim - 2))
        elif layer != node.name:  # the Mul of an identity split
            y = x * next(constants[name] for name in node.input if name in constants)
        else:
            continue
        totals[layer] = totals.get(layer, 0.0) + y
    nodes = {node.name: node for node in model.graph.node}
    return {
        layer: channel_means(total - values[nodes[layer].output[0]], nodes[layer])
        for layer, total in totals.items()
    }


def half_step(path: Path) -> float:
    """Return half the largest step of an INT32 sum; biases are rounded to such steps."""
    constants = {
        t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer
    }
    weights = [v.max() for k, v in constants.items() if k.endswith(".weight.scale")]
    others = [
        v for k, v in constants.items() if k.endswith(".scale") and not k.endswith(".weight.scale")
    ]
    return 0.5 * float(max(weights)) * float(max(others))


def chain_with_and_without_bias() -> onnx.ModelProto:
    b = Builder()
    y = b.relu(b.conv("x", 8, "c1"))
    y = b.relu(b.conv(y, 8, "c2"))
    b.nodes[-2].input.pop()  # without a bias
    return b.model(b.head(y))


@pytest.mark.parametrize("split", ["none", "identity", "coarse-fine"])
def test_after_correction_no_channel_has_a_mean_error(tmp_path: Path, split: str) -> None:
    model = chain_with_and_without_bias()
    options = replace(PLAIN, split=split)  # type: ignore[arg-type]
    corrected = mean_errors(model, calibrated(tmp_path, model, options))
    plain = calibrated(tmp_path, model, replace(options, correct_bias=False))
    before = mean_errors(model, plain)
    assert corrected.keys() == before.keys() == {"c1", "c2", "head"}
    for layer, error in before.items():
        assert np.abs(error).max() > 5e-3, layer
        np.testing.assert_allclose(corrected[layer], 0, atol=half_step(tmp_path / "o.onnx") + 1e-5)
    counts = [
        sorted(node.op_type for node in file.graph.node)
        for file in (plain, onnx.load(str(tmp_path / "o.onnx")))
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("computed", [False, True], ids=["MatMul", "computed bias"])
def test_what_has_no_constant_bias_stays_as_it_is(tmp_path: Path, computed: bool) -> None:
    """A MatMul has no bias, and nothing can be added to a bias that is computed."""
    model = matmul_net(computed)
    written = calibrated(tmp_path, model, replace(PLAIN, weight_bits=8))
    nodes = {node.name: node for node in written.graph.node}
    assert nodes["head"].op_type == "MatMul"
    assert len(nodes["head"].input) == 2
    got = ort_run(written, {"x": X})["head"]
    wanted = ort_run(model, {"x": X})["head"]
    if computed:
        assert nodes["c1"].input[2] == "computed"
    assert np.linalg.norm(got - wanted) < 0.05 * np.linalg.norm(wanted)


# Kept where it helps -----------------------------------------------------------------------------

STAYS = "biases stay as they are: correcting them does not help this net"


def with_weights(
    model: onnx.ModelProto,
    weights: dict[str, QuantizedWeight],
    errors: dict[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    """Return the float model with dequantized weights and with errors subtracted from biases."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in (node for node in model.graph.node if node.name in weights):
        weight = weights[node.name]
        shape = [-1 if i == weight.axis else 1 for i in range(weight.codes.ndim)]
        values[node.input[1]] = weight.codes * weight.scale.reshape(shape)
        if errors is not None:
            values[node.input[2]] = values[node.input[2]] - errors[node.name]
    for tensor in changed.graph.initializer:
        value = values[tensor.name]
        kept = numpy_helper.to_array(tensor).dtype
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(value, dtype=kept), tensor.name))
    return changed


def squared_error(model: onnx.ModelProto, other: onnx.ModelProto, x: np.ndarray) -> float:
    """Return the error over all outputs of two models, computed by onnxruntime.

    It is the squared error; with several outputs, that of each relative to the output's power.
    """
    exact, other_outputs = (ort_run(net, {"x": x}, optimize=False) for net in (model, other))
    errors = [
        (float(np.square(other_outputs[name] - y.astype(float)).sum()), np.square(y).sum())
        for name, y in exact.items()
    ]
    return sum(error if len(errors) == 1 else error / float(power) for error, power in errors)


@pytest.mark.parametrize("count", [1, 45, 64])
def test_the_error_of_outputs_is_summed_over_images(tmp_path: Path, count: int) -> None:
    b = Builder()
    y = b.relu(b.conv("x", 8, "c1"))
    model = b.model(b.head(b.relu(b.conv(y, 8, "c2"))), y)
    net, x = net_from_model(model), images(count, seed=7)
    weights = quantize_weights(net, place(net), COARSE)
    graph = TorchGraph(net)
    outputs = Outputs(graph, dataset(tmp_path, x))
    found = outputs.error(graph, deployed_weights(graph, weights))
    expected = squared_error(model, with_weights(model, weights), x)
    assert found == pytest.approx(expected, rel=1e-4)
    assert outputs.error(graph) == 0.0


def test_the_error_of_the_outputs_of_a_net_for_one_image(tmp_path: Path) -> None:
    b = Builder()
    y = b.node("GlobalAveragePool", [b.relu(b.conv("x", 4, "c1"))], "pool")
    b.node("Reshape", [y, b.constant("shape", np.int64([1, -1]))], "flat")
    b.channels["flat"] = 4
    model = b.model("flat", batch=1)
    net = net_from_model(model)
    weights = quantize_weights(net, place(net), COARSE)
    graph = TorchGraph(net)
    outputs = Outputs(graph, dataset(tmp_path))
    found = outputs.error(graph, deployed_weights(graph, weights))
    changed = with_weights(model, weights)
    expected = sum(squared_error(model, changed, image[None]) for image in X)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def rep_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "d.npz", 80, seed=4)


def biases_of(path: Path) -> dict[str, np.ndarray]:
    model = onnx.load(str(path))
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return {
        node.name: values[node.input[2]]
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm") and len(node.input) > 2
    }


@pytest.mark.parametrize(("seed", "helps"), [(0, True), (3, True), (4, False)])
def test_biases_are_corrected_where_that_brings_the_outputs_nearer(
    seed: int, helps: bool, rep_images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With seed 4 every layer is right on average, yet the error of the whole net grows."""
    model = rep_net(6, seed)
    write_net(tmp_path / "m.onnx", model)
    options = replace(PLAIN, images=80)
    with caplog.at_level(logging.INFO):
        calibrate(tmp_path / "m.onnx", rep_images, tmp_path / "o.onnx", options)
    net = net_from_model(onnx.load(str(tmp_path / "m.onnx")))
    (x,) = open_dataset(rep_images, read_preprocess(net)).batches(80)
    weights = quantize_weights(net, place(net), COARSE)
    errors = expected_errors(model, weights, x)
    before, after = (
        squared_error(model, with_weights(model, weights, taken), x[7::8])
        for taken in (None, errors)
    )
    assert (after < before) == helps
    floats, found = biases_of(tmp_path / "m.onnx"), biases_of(tmp_path / "o.onnx")
    assert found.keys() == floats.keys() == set(weights)
    for name, original in floats.items():
        expected = original - errors[name] if helps else original
        slack = half_step(tmp_path / "o.onnx") + 1e-5
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=slack)
    assert (STAYS in caplog.messages) == (not helps)


def nonsense(*arguments: object) -> dict[str, np.ndarray]:
    """Return errors with the right shapes and wrong values."""
    rng = np.random.default_rng(0)
    return {
        name: 10 * rng.standard_normal(error.shape)
        for name, error in bias_errors(*arguments).items()  # type: ignore[arg-type]
    }


def turned(*arguments: object) -> dict[str, np.ndarray]:
    return {name: -error for name, error in bias_errors(*arguments).items()}  # type: ignore[arg-type]


def not_a_number(*arguments: object) -> dict[str, np.ndarray]:
    return {name: error * np.nan for name, error in bias_errors(*arguments).items()}  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [nonsense, turned, not_a_number])
@pytest.mark.parametrize("split", ["none", "identity", "coarse-fine"])
def test_a_correction_that_does_harm_leaves_no_trace(
    wrong: Callable[..., dict[str, np.ndarray]],
    split: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = chain_with_and_without_bias()
    options = replace(PLAIN, split=split)  # type: ignore[arg-type]
    helped = calibrated(tmp_path, model, options)
    assert STAYS not in caplog.messages
    plain = calibrated(tmp_path, model, replace(options, correct_bias=False))
    monkeypatch.setattr(quantities, "bias_errors", wrong)
    with caplog.at_level(logging.INFO):
        found = calibrated(tmp_path, model, options)
    assert found == plain != helped
    assert caplog.messages.count(STAYS) == 1
