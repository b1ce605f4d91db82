"""Biases on the accumulator's grid: nothing is left in which runtimes differ."""

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch

from reptrt.execute.lowering import lower
from reptrt.execute.runner import OrtRunner
from reptrt.execute.torch_runner import graph_runner
from reptrt.graph.net import constant_of, net_from_model, producer_of
from reptrt.pipeline import CalibrateOptions, calibrate
from reptrt.rewrite.round_biases import round_biases
from tests.support.helpers import ort_run
from tests.support.learned_nets import SIZE, rep_net, write_images, write_net
from tests.support.onnx_nets import plain_chain
from tests.support.qdq_nets import images, quantized, residual_net


def grid_of(node: gs.Node) -> np.ndarray:
    """The step of a layer's INT32 sums, float64 (O,)."""
    x = producer_of(node.inputs[0])
    while x.op != "DequantizeLinear":
        x = producer_of(x.inputs[0])
    step, scale = (constant_of(n.inputs[1]) for n in (x, producer_of(node.inputs[1])))
    return np.float64(step) * scale.astype(np.float64)


@pytest.mark.parametrize("make", [plain_chain, residual_net])
def test_biases_are_multiples_and_move_by_half_a_step_at_most(make) -> None:
    net = net_from_model(quantized(make(), images()))
    layers = [n for n in net.graph.nodes if n.op in ("Conv", "Gemm")]
    before = {n.name: constant_of(n.inputs[2]).astype(np.float64) for n in layers}
    x = images(8, seed=2)
    expected = ort_run(quantized(make(), images()), {"x": x}, optimize=False)["head"]
    assert set(round_biases(net).changed) == set(before)
    for node in layers:
        after, grid = constant_of(node.inputs[2]).astype(np.float64), grid_of(node)
        np.testing.assert_allclose(after / grid, np.rint(after / grid), atol=1e-3)
        assert (np.abs(after - before[node.name]) <= 0.5 * grid * (1 + 1e-6) + 1e-7).all()
        assert np.abs(after - before[node.name]).max() > 0
    assert expected.shape == (8, 5)
    assert round_biases(net).changed  # again: nothing moves any more
    for node in layers:
        grid, again = grid_of(node), constant_of(node.inputs[2]).astype(np.float64)
        np.testing.assert_allclose(again / grid, np.rint(again / grid), atol=1e-3)


def test_a_float_layer_keeps_its_bias() -> None:
    net = net_from_model(plain_chain())
    assert round_biases(net).changed == ()


def test_int8_kernels_and_torch_give_the_same_logits(tmp_path: Path) -> None:
    """INT8 kernels round biases to INT32; what is calibrated has nothing left to round."""
    model = write_net(tmp_path / "m.onnx", rep_net(blocks=3))
    data = write_images(tmp_path / "d.npz", 64)
    options = CalibrateOptions(images=64, split="none")
    calibrate(model, data, tmp_path / "o.onnx", options)
    written = onnx.load(str(tmp_path / "o.onnx"))
    for node in net_from_model(lower(written)).graph.nodes:  # as UINT8, biases without the offset
        if node.op == "Conv":
            bias = constant_of(node.inputs[2]).astype(np.float64) / grid_of(node)
            assert np.abs(bias - np.rint(bias)).max() < 0.05
    x = 0.5 * images(500, 3, SIZE, seed=3)
    by_torch = graph_runner(net_from_model(written), torch.device("cpu")).run(x)["head"]
    with OrtRunner(tmp_path / "o.onnx", threads=1) as runner:
        by_kernels = next(iter(runner.run(x).values()))
    same = (np.abs(by_kernels - by_torch) < 1e-4 * np.abs(by_torch).max()).all(axis=1)
    assert same.mean() > 0.98  # but for sums in the middle between two codes
