"""The form for onnxruntime keeps every code, and lets every layer really run in INT8."""

import collections
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from reptrt.core.grid import Grid
from reptrt.execute.lowering import lower
from reptrt.execute.runner import OrtRunner, optimized_nodes
from reptrt.execute.torch_runner import int8_runner
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import model_from_net, net_from_model
from reptrt.rewrite.split_coarse_fine import split_coarse_fine
from tests.support.helpers import optimized_op_counts, ort_run
from tests.support.onnx_nets import Builder, basic_block, padded_chain, plain_chain, without_names
from tests.support.qdq_nets import images, quantized, residual_net, with_outputs

NETS: dict[str, Callable[[], onnx.ModelProto]] = {
    "plain": plain_chain,
    "padded": padded_chain,
    "block": basic_block,
    "downsample": lambda: basic_block(downsample=True),
    "everything": residual_net,
    "unnamed": lambda: without_names(residual_net()),
}


def codes_of(model: onnx.ModelProto, x: np.ndarray) -> dict[str, np.ndarray]:
    """Return what each DequantizeLinear of an activation reads, less its zero point."""
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    zero_points = {
        node.input[0]: int(constants[node.input[2]])
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] not in constants
    }
    found = ort_run(with_outputs(model, list(zero_points)), {"x": x}, optimize=False)
    return {
        name.removesuffix(".u8_clipped"): found[name].astype(int) - zero_point
        for name, zero_point in zero_points.items()
    }


@pytest.mark.parametrize("gain", [1.0, 3.0], ids=["inside", "saturated"])
@pytest.mark.parametrize("name", list(NETS))
def test_every_code_stays(name: str, gain: float) -> None:
    model = quantized(NETS[name](), images())
    lowered = lower(model)
    x = gain * images(8, seed=2)
    expected, got = codes_of(model, x), codes_of(lowered, x)
    assert set(expected) <= set(got)  # pairs behind MaxPool and Flatten come on top
    for tensor, codes in expected.items():
        np.testing.assert_array_equal(got[tensor], codes, err_msg=tensor)
    if gain > 1:
        assert any((codes == 127).any() for codes in got.values())
        assert not any((codes > 127).any() for codes in got.values())


def step_of_head(model: onnx.ModelProto) -> float:
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return float(constants["pool.scale"] * np.abs(constants["head.weight.scale"]).max() * 127)


@pytest.mark.parametrize("name", list(NETS))
def test_logits_are_those_of_the_graph_as_written(name: str) -> None:
    """In torch and through onnxruntime's kernels, optimized or not."""
    model = quantized(NETS[name](), images())
    x = images(8, seed=2)
    with torch.inference_mode():
        written = TorchGraph(model)(torch.from_numpy(x)).numpy()
    plain = ort_run(model, {"x": x})["head"]
    with OrtRunner(model.SerializeToString(), threads=1) as runner:
        lowered = runner.run(x)["head"]
    # kernels differ where a sum falls between two codes; a step of the pool's output moves a
    # logit by its largest weight
    tolerance = 3 * step_of_head(model)
    np.testing.assert_allclose(plain, written, rtol=0, atol=tolerance)
    np.testing.assert_allclose(lowered, written, rtol=0, atol=tolerance)
    assert np.abs(written).max() > 10 * tolerance


@pytest.mark.slow
@pytest.mark.parametrize("gain", [1.0, 3.0], ids=["inside", "saturated"])
@pytest.mark.parametrize("name", list(NETS))
def test_torch_and_onnxruntime_give_the_same_bits(name: str, gain: float) -> None:
    model = quantized(NETS[name](), images())
    x = gain * images(100, seed=2)
    with OrtRunner(model.SerializeToString(), threads=1) as runner:
        expected = runner.run(x)["head"]
        alone = np.concatenate([runner.run(image[None])["head"] for image in x])
    with int8_runner(model, torch.device("cpu")) as runner:
        simulated = runner.run(x)["head"]
    np.testing.assert_array_equal(simulated, expected)
    np.testing.assert_array_equal(alone, expected)
    assert len(np.unique(expected)) > 100


@pytest.mark.parametrize(
    ("name", "in_int8", "in_float"),
    [
        ("plain", 2, set()),
        ("padded", 2, set()),
        ("block", 2, {"c2"}),
        ("downsample", 3, {"c2"}),
        ("everything", 8, {"a2", "b2", "s2"}),
    ],
)
def test_layers_whose_output_is_quantized_run_in_int8(
    name: str, in_int8: int, in_float: set[str]
) -> None:
    """TensorRT adds a residual before it quantizes (c2, a2, b2), and so does a gate (s2)."""
    model = quantized(NETS[name](), images())
    nodes = optimized_nodes(model.SerializeToString())
    counts = collections.Counter(op for _, op in nodes)
    assert counts["QLinearConv"] == in_int8
    layers = {node.name for node in model.graph.node if node.op_type == "Conv"}
    assert {name for name, op in nodes if op in ("Conv", "FusedConv")} & layers == in_float
    assert (counts["QGemm"], counts["Gemm"]) == (1, 0)
    assert plain_op_counts(model)["QLinearConv"] < in_int8  # it is the lowering that does it


def test_two_layers_that_read_one_signed_tensor_run_in_int8() -> None:
    """As the parts of a first layer do that is split."""
    net = net_from_model(plain_chain())
    split_coarse_fine(net, ["c1"], grid=Grid.weight(8), precision="int8")
    counts = optimized_op_counts(quantized(model_from_net(net), images()).SerializeToString())
    assert (counts["QLinearConv"], counts["QLinearAdd"]) == (3, 1)
    assert (counts["Conv"], counts["FusedConv"]) == (0, 0)


def plain_op_counts(model: onnx.ModelProto) -> dict[str, int]:
    """Operators after onnxruntime's optimization of the graph as TensorRT wants it."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder) / "m.onnx")
        onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        graph = onnx.load(options.optimized_model_filepath).graph
    return collections.Counter(node.op_type for node in graph.node)


def test_a_float_model_comes_back_as_it_is() -> None:
    model = residual_net()
    assert lower(model) is model


def test_the_model_given_is_not_changed() -> None:
    model = quantized(residual_net(), images())
    before = model.SerializeToString(deterministic=True)
    first = lower(model).SerializeToString(deterministic=True)
    assert model.SerializeToString(deterministic=True) == before
    assert lower(model).SerializeToString(deterministic=True) == first


@pytest.mark.parametrize("high", [6.0, 0.5, 100.0])
def test_a_clip_saturates_where_it_says(high: float) -> None:
    b = Builder()
    y = b.conv("x", 8, "c1")
    bounds = [b.constant("0", np.float32(0)), b.constant("high", np.float32(high))]
    y = b.node("Clip", [y, *bounds], "act")
    b.channels[y] = 8
    model = quantized(b.model(b.head(b.relu(b.conv(y, 8, "c2")))), images())
    x = 5 * images(8, seed=2)
    expected, got = codes_of(model, x), codes_of(lower(model), x)
    np.testing.assert_array_equal(got["act.q"], expected["act.q"])
    assert optimized_op_counts(model.SerializeToString())["QLinearConv"] == 2


def test_a_clip_with_a_negative_bound_stays() -> None:
    b = Builder()
    bounds = [b.constant("low", np.float32(-1)), b.constant("high", np.float32(1))]
    y = b.node("Clip", [b.conv("x", 8, "c1"), *bounds], "act")
    b.channels[y] = 8
    model = quantized(b.model(b.head(b.relu(b.conv(y, 8, "c2")))), images())
    x = 5 * images(8, seed=2)
    expected, got = codes_of(model, x), codes_of(lower(model), x)
    np.testing.assert_array_equal(got["act.q"], expected["act.q"])
    assert got["act.q"].min() < 0


def change_weight_channel(model: onnx.ModelProto, factor: float, bias: float) -> None:
    """Scale the weights of one channel of c1 and give it a bias."""
    for tensor in model.graph.initializer:
        if tensor.name in ("c1.weight", "c1.bias"):
            values = numpy_helper.to_array(tensor).copy()
            values[3] = values[3] * factor if tensor.name == "c1.weight" else bias
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


@pytest.mark.parametrize("bias", [0.5, -0.5, 1e-30, 0.0])
@pytest.mark.parametrize("factor", [1.0, 1e-6, 1e-9, 1e-20, 0.0])
def test_a_channel_with_next_to_no_weights_keeps_its_bias(factor: float, bias: float) -> None:
    """INT32 codes of the bias in steps of input times weight would overflow, or be too coarse."""
    float_model = plain_chain()
    change_weight_channel(float_model, factor, bias)
    x = images(8)
    model = quantized(float_model, x)
    exact = codes_of(model, x)["c1.relu.q"]
    name = "c1.relu.q.u8_clipped"
    got = ort_run(with_outputs(lower(model), [name]), {"x": x})[name]  # optimized: INT32 bias
    difference = np.abs(got.astype(int) - exact)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 2e-3


def test_a_weight_step_is_left_alone_where_the_bias_fits() -> None:
    model = quantized(plain_chain(), images())
    before = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    after = {t.name: numpy_helper.to_array(t) for t in lower(model).graph.initializer}
    for layer in ("c1", "c2", "head"):
        for role in ("q", "scale"):
            name = f"{layer}.weight.{role}"
            np.testing.assert_array_equal(after[name], before[name])


def pairs_by_hand(b: Builder, x: str, scale: float, zero_point: np.generic | None) -> str:
    names = [b.constant(f"{x}.s", np.float32(scale))]
    if zero_point is not None:
        names.append(b.constant(f"{x}.z", zero_point))
    q = b.node("QuantizeLinear", [x, *names], f"{x}.q")
    return b.node("DequantizeLinear", [q, *names], f"{x}.dq")


@pytest.mark.parametrize(
    "zero_point",
    [np.int8(-128), np.int8(3), np.uint8(0), np.uint8(7), None],
    ids=lambda z: "none" if z is None else f"{z.dtype}:{z}",
)
def test_other_zero_points_mean_what_they_say(zero_point: np.generic | None) -> None:
    """Files of other quantizers: ReLU outputs with all 256 codes, or unsigned ones."""
    b = Builder()
    y = pairs_by_hand(b, b.relu(b.conv("x", 8, "c1")), 0.01, zero_point)
    y = b.node("MaxPool", [y], "pool1", kernel_shape=[2, 2], strides=[2, 2])
    model = b.model(b.relu(b.conv(y, 8, "c2")))
    x = images()
    expected = ort_run(model, {"x": x}, optimize=False)["c2.relu"]
    got = ort_run(lower(model), {"x": x}, optimize=False)["c2.relu"]
    np.testing.assert_array_equal(got, expected)


def test_codes_that_somebody_else_reads_stay_signed() -> None:
    """MaxPool on the codes themselves; codes as an output of the net."""
    b = Builder()
    y = b.relu(b.conv("x", 8, "c1"))
    names = [b.constant("s", np.float32(0.01)), b.constant("z", np.int8(0))]
    q = b.node("QuantizeLinear", [y, *names], "q")
    y = b.node("MaxPool", [q], "pool1", kernel_shape=[2, 2], strides=[2, 2])
    y = b.node("DequantizeLinear", [y, *names], "dq")
    b.channels[y] = 8
    also = b.node("DequantizeLinear", [q, *names], "dq2")
    model = b.model(b.relu(b.conv(y, 8, "c2")), also, q)
    x = images()
    expected = ort_run(model, {"x": x}, optimize=False)
    got = ort_run(lower(model), {"x": x}, optimize=False)
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value)
        assert got[name].dtype == value.dtype


def test_a_reshaped_weight_with_a_scale_per_channel_stays() -> None:
    b = Builder()
    b.conv("x", 4, "c1")
    b.constant("w.q", np.arange(-60, 60, dtype=np.int8).reshape(6, 20)[:, :4].copy())
    names = [
        b.constant("w.s", np.linspace(0.01, 0.06, 6, dtype=np.float32)),
        b.constant("w.z", np.zeros(6, np.int8)),
    ]
    weight = b.node("DequantizeLinear", ["w.q", *names], "w.dq", axis=0)
    weight = b.node("Transpose", [weight], "w.t", perm=[1, 0])
    flat = b.node("Flatten", [b.node("GlobalAveragePool", ["c1"], "pool")], "flat")
    flat = pairs_by_hand(b, flat, 0.01, np.int8(0))
    model = b.model(b.node("MatMul", [flat, weight], "y"))
    x = images()
    expected = ort_run(model, {"x": x}, optimize=False)["y"]
    np.testing.assert_array_equal(ort_run(lower(model), {"x": x}, optimize=False)["y"], expected)
