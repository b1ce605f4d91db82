"""Legitimate nets that few exporters write: the whole way, against onnxruntime as the file is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from reptrt.core.metrics import sqnr_db
from reptrt.execute.lowering import lower
from reptrt.execute.runner import OrtRunner
from reptrt.execute.torch_runner import int8_runner
from reptrt.graph.net import model_from_net, net_from_model, read_model
from reptrt.judge.diagnose import diagnose
from reptrt.pipeline import CalibrateOptions, CalibrateReport, calibrate
from reptrt.quantize.calib.options import ThresholdOptions
from tests.support.helpers import ort_run
from tests.support.onnx_nets import Builder, give_identity

COUNT = 32
X = np.random.default_rng(5).standard_normal((COUNT, 3, 8, 8))
X = (X * np.random.default_rng(6).uniform(0.1, 3, (COUNT, 1, 1, 1))).astype(np.float32)


def made(folder: Path, model: onnx.ModelProto, **options: Any) -> CalibrateReport:
    """Calibrate a net in a folder, as q.onnx."""
    onnx.save(model, str(folder / "m.onnx"))
    np.savez(folder / "x.npz", x=X)
    chosen = CalibrateOptions(**{"images": COUNT, **options})
    return calibrate(folder / "m.onnx", folder / "x.npz", folder / "q.onnx", chosen)


def ways(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the first output as the file is written, and lowered in onnxruntime and in torch."""
    model = read_model(path)
    written = next(iter(ort_run(model, {"x": X}, optimize=False).values()))
    with OrtRunner(path) as runner, int8_runner(model, torch.device("cpu")) as simulation:
        lowered = runner.run(X)[runner.output_names[0]]
        (by_torch,) = simulation.run(X).values()
    return written, lowered, by_torch


def scale_channel(model: onnx.ModelProto, name: str, index: tuple[Any, ...], factor: float) -> None:
    """Multiply some weights of an initializer."""
    for tensor in model.graph.initializer:
        if tensor.name == name:
            value = numpy_helper.to_array(tensor).copy()
            value[index] *= factor
            tensor.CopyFrom(numpy_helper.from_array(value, name))


def transposed(groups: int) -> onnx.ModelProto:
    b = Builder()
    y = b.relu(b.conv("x", 8, "c1"))
    weight = b.parameter("up.weight", 8, 8 // groups, 2, 2)
    bias = b.constant("up.bias", np.r_[1.0, 0.1 * b.rng.standard_normal(7)].astype(np.float32))
    y = b.node("ConvTranspose", [y, weight, bias], "up", strides=[2, 2], group=groups)
    b.channels[y] = 8
    return b.model(b.conv(b.relu(y), 4, "c2"))


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("factor", [1.0, 1e-6, 0.0])
def test_a_transposed_convolution_keeps_its_bias(groups: int, factor: float, tmp_path: Path):
    model = transposed(groups)
    scale_channel(model, "up.weight", (slice(None), 0), factor)
    made(tmp_path, model)
    written, lowered, by_torch = ways(tmp_path / "q.onnx")
    (exact,) = ort_run(model, {"x": X}).values()
    assert sqnr_db(exact, written) > 25
    if groups == 1:  # else its scales are shared and its bias is on no grid
        assert sqnr_db(written, lowered) > 60
        np.testing.assert_array_equal(lowered, by_torch)
    else:
        assert min(sqnr_db(written, lowered), sqnr_db(lowered, by_torch)) > 40


@pytest.mark.slow
@pytest.mark.parametrize("split", ["none", "coarse-fine", "identity"])
def test_a_channel_without_weights_is_summed_as_codes_too(split: str, tmp_path: Path) -> None:
    b = Builder()
    y = b.relu(b.conv("x", 16, "stem"))
    for index in range(3):
        y = b.relu(b.conv(y, 16, f"c{index}"))
    net = net_from_model(b.model(b.head(y)))
    model = model_from_net(give_identity(net, [f"c{index}" for index in range(3)]))
    for index in range(3):
        scale_channel(model, f"c{index}.weight", (3,), 0.0)
    made(tmp_path, model, split=split)
    written, lowered, by_torch = ways(tmp_path / "q.onnx")
    assert sqnr_db(written, lowered) > 45
    np.testing.assert_array_equal(lowered, by_torch)
    graph = lower(read_model(tmp_path / "q.onnx"), kernels=False).graph
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert all(node.input[0].endswith(".codes") for node in layers)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6,), (1, 6), (1, 1), (1,), ()], ids=str)
@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("correct_bias", [True, False])
def test_the_bias_of_a_gemm_may_have_any_shape(
    shape: tuple[int, ...], alpha: float, correct_bias: bool, tmp_path: Path
) -> None:
    b = Builder()
    y = b.node("GlobalAveragePool", [b.relu(b.conv("x", 8, "c1"))], "pool")
    y = b.node("Flatten", [y], "flat")
    bias = b.constant("g.bias", np.abs(b.rng.standard_normal(shape)).astype(np.float32))
    y = b.node("Gemm", [y, b.parameter("g.weight", 6, 8), bias], "g", transB=1, alpha=alpha)
    b.channels[y] = 6
    model = b.model(b.gemm(b.relu(y), 5, "head"))
    made(tmp_path, model, correct_bias=correct_bias, equalize=correct_bias)
    (exact,) = ort_run(model, {"x": X}).values()
    for found in ways(tmp_path / "q.onnx"):
        assert sqnr_db(exact, found) > 20


@pytest.mark.parametrize(
    ("split", "pattern"), [("coarse-fine", "fine"), ("identity", "st"), ("coarse-fine", "e$|stem")]
)
def test_exclude_means_layers_of_the_net_not_parts_of_splits(
    split: str, pattern: str, tmp_path: Path
) -> None:
    b = Builder()
    y = b.relu(b.conv("x", 8, "stem"))
    for name in ("c0", "c1"):
        y = b.relu(b.conv(y, 8, name))
    excluded = {"fine": {"fine_head"}, "st": {"stem"}, "e$|stem": {"stem"}}[pattern]
    report = made(tmp_path, b.model(b.conv(y, 5, "fine_head")), split=split, exclude=(pattern,))
    model = onnx.load(str(tmp_path / "q.onnx"))
    codes = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    floats = {n.name for n in model.graph.node if n.op_type == "Conv" and n.input[1] not in codes}
    assert floats == excluded
    assert report.splits
    assert not {split.layer for split in report.splits} & excluded


def compared(b: Builder, logits: str) -> str:
    return b.node("Greater", [logits, b.constant("zero", np.float32(0))], "greater")


def largest(b: Builder, logits: str) -> str:
    return b.node("ArgMax", [logits], "largest", axis=1, keepdims=0)


@pytest.mark.parametrize("also", [compared, largest])
def test_outputs_that_are_no_numbers_have_no_say(
    also: Callable[[Builder, str], str], tmp_path: Path
) -> None:
    reports = []
    for more in (False, True):
        b = Builder()
        logits = b.head(b.relu(b.conv(b.relu(b.conv("x", 8, "c1")), 8, "c2")))
        model = b.model(*([logits, also(b, logits)] if more else [logits]))
        reports.append(made(tmp_path, model, activation_bits=5))
    assert reports[0].tensors == reports[1].tensors


def test_a_net_for_one_image_is_diagnosed(tmp_path: Path) -> None:
    b = Builder()
    y = b.node(
        "MaxPool", [b.relu(b.conv("x", 4, "c1"))], "pool", kernel_shape=[4, 4], strides=[4] * 2
    )
    y = b.node("Reshape", [y, b.constant("shape", np.int64([1, -1]))], "flat")
    b.channels[y] = 16
    report = made(tmp_path, b.model(b.gemm(y, 5, "head"), batch=1))
    options = CalibrateOptions(images=COUNT)
    found = diagnose(tmp_path / "m.onnx", tmp_path / "x.npz", options, report)
    assert {layer.layer for layer in found.layers} == {"c1", "head"}
    assert found.corners[3].sqnr_db > 20


@pytest.mark.slow
@pytest.mark.parametrize("images", [2, 8, 16])
@pytest.mark.parametrize("seed", range(4))
def test_a_diagnosis_prepares_what_calibration_prepared(
    images: int, seed: int, tmp_path: Path
) -> None:
    """From the same images: else their splits differ, and their tensors."""
    b = Builder(seed=seed)
    y = b.relu(b.conv("x", 16, "c0"))
    for index in range(1, 5):
        y = b.relu(b.conv(y, 16, f"c{index}"))
    net = net_from_model(b.model(b.head(y)))
    model = model_from_net(give_identity(net, [f"c{index}" for index in range(1, 5)]))
    report = made(tmp_path, model, images=images, split_precision="int8")
    options = CalibrateOptions(images=images, split_precision="int8")
    found = diagnose(tmp_path / "m.onnx", tmp_path / "x.npz", options, report)
    assert found.equalized == report.equalized
    forms = {split.layer: split.form for split in report.splits}
    assert {e.layer: e.form for e in found.layers if e.form != "none"} == forms


def test_thresholds_of_a_given_rule_are_of_all_images(tmp_path: Path) -> None:
    b = Builder()
    model = b.model(b.head(b.relu(b.conv("x", 8, "c1"))))
    report = made(tmp_path, model, threshold=ThresholdOptions("max"))
    assert report.tensors[0].maximum == np.abs(X).max()
    assert net_from_model(model).graph.inputs[0].name == report.tensors[0].tensor


def test_layers_that_lead_to_no_output_are_not_quantized(tmp_path: Path) -> None:
    b = Builder()
    y = b.relu(b.conv("x", 8, "c1"))
    b.relu(b.conv(y, 8, "dead"))
    report = made(tmp_path, b.model(b.head(b.relu(b.conv(y, 8, "c2")))), max_overhead=1.0)
    assert report.layers == 3
    assert "c1.relu" in report.full_range
    written, lowered, by_torch = ways(tmp_path / "q.onnx")
    assert sqnr_db(written, lowered) > 45
    np.testing.assert_array_equal(lowered, by_torch)
