"""What was learned means the same in onnxruntime and in torch: code by code, and in the end."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from reptrt.data.dataset import open_dataset
from reptrt.execute.runner import OrtRunner
from reptrt.execute.torch_runner import graph_runner, int8_runner
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import net_from_model
from reptrt.graph.preprocess import read_preprocess
from reptrt.pipeline import CalibrateOptions, calibrate
from tests.support.helpers import ort_run
from tests.support.learned_nets import SIZE, rep_net, write_images, write_net
from tests.support.onnx_nets import basic_block
from tests.support.qdq_nets import with_outputs

pytestmark = pytest.mark.slow

COUNT = 1000
LEARNED = CalibrateOptions(images=64, recipe="balanced", iterations=8)
CASES = {
    "full range, splits": LEARNED,
    "symmetric, whole": replace(LEARNED, full_range=False, split="none"),
    "identity": replace(LEARNED, split="identity"),
    "coarse-fine": replace(LEARNED, split="coarse-fine"),
    "affines kept": replace(LEARNED, keep_affine=True),
    "residual": replace(LEARNED, iterations=100),
}
LOWERED = CASES | {
    "INT8 summands": replace(LEARNED, split="identity", split_precision="int8"),
    "6 bits": replace(LEARNED, weight_bits=6, activation_bits=6),
    "FP16 rest": replace(LEARNED, high_precision="fp16"),
}
CLEAR = 1e-3  # of a step, from where a code changes


@pytest.fixture(scope="module", params=CASES)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[onnx.ModelProto, np.ndarray]:
    """A learned net, and images that it has not seen."""
    return learned(request.param, tmp_path_factory.mktemp("same"))


def learned(case: str, folder: Path) -> tuple[onnx.ModelProto, np.ndarray]:
    size = 8 if case == "residual" else SIZE
    write_net(folder / "m.onnx", basic_block() if case == "residual" else rep_net())
    write_images(folder / "d.npz", 64, size=size)
    report = calibrate(folder / "m.onnx", folder / "d.npz", folder / "o.onnx", LOWERED[case])
    assert report.learned is not None
    assert any(unit.kept == "learned" for unit in report.learned.units)
    model = onnx.load(str(folder / "o.onnx"))
    return model, unseen(folder, size)


def unseen(folder: Path, size: int) -> np.ndarray:
    path = write_images(folder / "unseen.npz", COUNT, seed=1, size=size)
    net = net_from_model(onnx.load(str(folder / "m.onnx")))
    (x,) = open_dataset(path, read_preprocess(net)).batches(COUNT)
    return x


def pairs_of(model: onnx.ModelProto) -> list[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """Q and DQ of every activation."""
    readers = {name: node for node in model.graph.node for name in node.input}
    quantizes = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    found = [(node, readers[node.output[0]]) for node in quantizes]
    assert all(dequantize.op_type == "DequantizeLinear" for _, dequantize in found)
    return found


def test_every_code_is_the_same_but_at_its_borders(
    written: tuple[onnx.ModelProto, np.ndarray],
) -> None:
    """Of one pair after the other, made from the same codes before it."""
    model, x = written[0], written[1][:100]
    pairs = pairs_of(model)
    assert len(pairs) >= 5
    names = [name for q, dq in pairs for name in (q.input[0], q.output[0], dq.output[0])]
    by_ort = ort_run(with_outputs(model, names), {"x": x}, optimize=False) | {"x": x}
    graph = TorchGraph(net_from_model(model))
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for quantize, dequantize in pairs:
        others = {dq.output[0] for _, dq in pairs} - {dequantize.output[0]}
        given = {name: torch.from_numpy(by_ort[name].copy()) for name in ("x", *others)}
        made = list(dict.fromkeys([quantize.output[0], dequantize.output[0]]))
        with torch.inference_mode():
            by_torch = {name: value.numpy() for name, value in graph.run(given, made).items()}
        scale = np.float64(constants[quantize.input[1]])
        exact = by_ort[quantize.input[0]] / scale
        clear = np.abs(exact - np.floor(exact) - 0.5) > CLEAR
        codes = by_ort[quantize.output[0]]
        assert clear.mean() > 0.95
        assert np.ptp(codes.astype(int)) > 50
        found = by_torch[quantize.output[0]]
        assert found.dtype == codes.dtype == np.int8
        np.testing.assert_array_equal(found[clear], codes[clear], err_msg=quantize.name)
        assert np.abs(found.astype(int) - codes).max() <= 1
        values = by_torch[dequantize.output[0]]
        np.testing.assert_array_equal(values, found * np.float32(scale))
        expected = np.clip(np.rint(exact), -128, 127)
        np.testing.assert_array_equal(codes[clear], expected[clear])


def test_the_same_class_comes_first(written: tuple[onnx.ModelProto, np.ndarray]) -> None:
    """Whatever order a runtime sums in."""
    model, x = written
    (wanted,) = ort_run(model, {"x": x}, optimize=False).values()
    with graph_runner(net_from_model(model), torch.device("cpu")) as runner:
        (found,) = runner.run(x).values()
    assert (found.argmax(1) == wanted.argmax(1)).mean() >= 0.999
    assert len(np.unique(wanted.argmax(1))) > 1
    assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize("case", LOWERED)
def test_lowered_the_outputs_are_the_same_bits(case: str, tmp_path: Path) -> None:
    """In torch as in onnxruntime's INT8 kernels, and close to the graph as it is written."""
    model, x = learned(case, tmp_path)
    with OrtRunner(model.SerializeToString(), threads=1) as runner:
        (wanted,) = runner.run(x).values()
    with int8_runner(model, torch.device("cpu")) as runner:
        (found,) = runner.run(x).values()
    np.testing.assert_array_equal(found, wanted)
    (as_it_is,) = ort_run(model, {"x": x}, optimize=False).values()
    near = 1e-2 if case == "FP16 rest" else 1e-3  # which is widened
    assert np.linalg.norm(found - as_it_is) < near * np.linalg.norm(as_it_is)
