"""Files for onnxruntime: INT8 kernels without reptrt, all codes, sums that know what they need."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest

from reptrt.core.choices import TargetName
from reptrt.core.errors import EngineError
from reptrt.core.grid import Grid
from reptrt.data.dataset import open_dataset
from reptrt.graph.net import net_from_model, read_model
from reptrt.graph.preprocess import read_preprocess
from reptrt.graph.quantized import plan_from_net
from reptrt.judge.evaluate import evaluate
from reptrt.judge.options import EvaluateOptions
from reptrt.pipeline import CalibrateOptions, Source, calibrate, export
from reptrt.pipeline.options import PLAIN_INT8
from reptrt.quantize.choose import decide, num_macs
from reptrt.quantize.choose.ends import MOST, keep_ends, prices_of_ends
from reptrt.quantize.targets import TARGETS
from reptrt.rewrite.split_identity import split_identity
from reptrt.trt.input import read_buildable
from tests.pipeline.test_calibrate import CIFAR, ZOO
from tests.support.helpers import SHARED, needs_shared, optimized_op_counts, ort_run
from tests.support.learned_nets import rep_net, write_images, write_net
from tests.support.onnx_nets import Builder
from tests.support.qdq_nets import with_outputs

FOR_CPU = CalibrateOptions(images=32, target="onnxruntime", split="identity")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    model = write_net(folder / "m.onnx", rep_net(blocks=3))
    data = write_images(folder / "d.npz", 32)
    calibrate(model, data, folder / "o.onnx", FOR_CPU)
    return folder


def test_onnxruntime_runs_int8_kernels_without_reptrt(made: Path) -> None:
    """The file as it is, not the form that reptrt's runner makes of it."""
    model = onnx.load(made / "o.onnx")
    assert not any(node.op_type == "Clip" for node in model.graph.node)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(made / "optimized.onnx")
    onnxruntime.InferenceSession(str(made / "o.onnx"), options, ["CPUExecutionProvider"])
    counts = Counter(node.op_type for node in onnx.load(made / "optimized.onnx").graph.node)
    weights = plan_from_net(net_from_model(model)).weights
    convolutions = [n for n in model.graph.node if n.op_type == "Conv" and n.name in weights]
    assert counts["QLinearConv"] == len(convolutions) > 3
    assert counts["QLinearAdd"] == 3
    assert counts["Conv"] + counts["FusedConv"] + counts["Add"] == 0


def test_onnxruntime_runs_int8_kernels_without_full_range(tmp_path: Path) -> None:
    """Symmetric codes behind a ReLU begin at 0; with 128 in the middle, layers ran in float."""
    model = write_net(tmp_path / "m.onnx", rep_net(blocks=3))
    data = write_images(tmp_path / "d.npz", 32)
    plain = replace(PLAIN_INT8, images=32, target="onnxruntime")
    for name, options in {"plain": plain, "split": replace(FOR_CPU, full_range=False)}.items():
        report = calibrate(model, data, tmp_path / f"{name}.onnx", options)
        counts = optimized_op_counts(tmp_path / f"{name}.onnx")
        assert counts["QLinearConv"] == 4, name
        assert counts["Conv"] + counts["FusedConv"] + counts["Add"] == 0
        assert not report.full_range


def test_every_activation_has_256_codes_that_lie_where_its_values_do(made: Path) -> None:
    model = read_model(made / "o.onnx")
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    activations = plan_from_net(net_from_model(model)).activations
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            assert types[node.input[2]] == onnx.TensorProto.UINT8
    relus = {node.output[0] for node in model.graph.node if node.op_type == "Relu"}
    assert all(activation.grid.is_whole for activation in activations.values())
    assert {name for name in relus if name in activations}
    assert all(activations[name].grid == Grid(0, 255) for name in relus & activations.keys())


@needs_shared
@pytest.mark.slow
def test_a_trained_net_keeps_its_accuracy_in_onnxruntime(tmp_path: Path) -> None:
    """Plain INT8 has 17.4 dB, float sums 36.9."""
    model, output = tmp_path / "m.onnx", tmp_path / "o.onnx"
    weights = SHARED / "zoo" / "repvgg_cifar10.pt"
    export(Source("repvgg", weights, ZOO["repvgg"]), model, CIFAR)
    options = CalibrateOptions(images=256, target="onnxruntime")
    report = calibrate(model, SHARED / "cifar10" / "calib", output, options)
    assert len(report.splits) > 10
    judging = EvaluateOptions(reference=model, limit=1000)
    (result,) = evaluate([output], SHARED / "cifar10" / "test", judging).results
    assert (result.sqnr_db or 0) > 32
    counts = optimized_op_counts(output.read_bytes())
    assert counts["QLinearConv"] == report.layers


def test_the_choice_knows_the_largest_output_of_each_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: dict[str, float] = {}

    def watched(node: gs.Node, stats: object, output: float, *grids: object) -> float:
        known[node.name] = output
        return 0.0

    monkeypatch.setattr(decide, "rounding_of_rest", watched)
    model = write_net(tmp_path / "m.onnx", rep_net(blocks=2))
    data = write_images(tmp_path / "d.npz", 32)
    options = replace(FOR_CPU, images=32, split="auto", equalize=False)
    calibrate(model, data, tmp_path / "o.onnx", options)
    graph = onnx.load(str(model)).graph
    layers = {node.name: node.output[0] for node in graph.node if node.name in known}
    relus = {node.input[0]: node.output[0] for node in graph.node if node.op_type == "Relu"}
    behind = {layer: relus[tensor] for layer, tensor in layers.items()}
    (x,) = open_dataset(data, read_preprocess(net_from_model(read_model(model)))).batches(32)
    made = ort_run(with_outputs(onnx.load(str(model)), [*behind.values()]), {"x": x})
    assert known
    for layer, tensor in behind.items():
        assert known[layer] == pytest.approx(float(made[tensor].max()), rel=1e-4)


def test_an_engine_is_refused(made: Path) -> None:
    with pytest.raises(EngineError, match=r"o\.onnx: made for onnxruntime.*target"):
        read_buildable(made / "o.onnx")


def residual(seed: int = 0) -> onnx.ModelProto:
    """Two residual blocks, the first with a convolution on the skip."""
    b = Builder(size=8, seed=seed)
    y = b.relu(b.conv("x", 8, "stem"))
    for name, skip in (("a", True), ("b", False)):
        shortcut = b.conv(y, 8, f"{name}.skip", size=1, pads=[0] * 4) if skip else y
        inner = b.conv(b.relu(b.conv(y, 8, f"{name}.1")), 8, f"{name}.2")
        y = b.relu(b.node("Add", [inner, shortcut], f"{name}.sum"))
    return b.model(b.head(y))


def test_residual_sums_run_in_int8(tmp_path: Path) -> None:
    """A convolution whose output is added in float would run in float."""
    model = write_net(tmp_path / "m.onnx", residual())
    data = write_images(tmp_path / "d.npz", 32, size=8)
    counts = {}
    for target in get_args(TargetName):
        output = tmp_path / f"{target}.onnx"
        calibrate(model, data, output, CalibrateOptions(images=32, target=target, split="none"))
        counts[target] = optimized_op_counts(output.read_bytes())
    assert counts["tensorrt"]["QLinearAdd"] == 0
    assert counts["onnxruntime"]["QLinearAdd"] == 2
    assert counts["onnxruntime"]["QLinearConv"] >= 5
    assert counts["onnxruntime"]["Add"] == 0


# Ends --------------------------------------------------------------------------------------------


def test_the_price_of_an_end_is_its_share_of_the_work(made: Path) -> None:
    net, costs = net_from_model(read_model(made / "m.onnx")), TARGETS["onnxruntime"].costs
    names = [node.name for node in net.graph.nodes if node.op in ("Conv", "Gemm")]
    prices = prices_of_ends(net, names, costs, num_macs(net))
    assert set(prices) <= {names[0], names[-1]}
    assert all(0 < price <= MOST for price in prices.values())
    assert names[-1] in prices
    assert prices_of_ends(net, [], costs, num_macs(net)) == {}
    total, whole = num_macs(net), prices[names[-1]]
    split_identity(net, names, grid=Grid.weight(8), form="identity-scalar", precision="int8")
    assert prices_of_ends(net, names, costs, total)[names[-1]] == whole


def test_a_first_layer_that_feeds_a_sum_stays_in_int8(made: Path) -> None:
    """Its output would change its layout before and behind the sums of the whole chain."""
    net, costs = net_from_model(read_model(made / "m.onnx")), TARGETS["onnxruntime"].costs
    free = replace(costs, crossing_macs=0.0, float_macs=1.0)
    names = [node.name for node in net.graph.nodes if node.op in ("Conv", "Gemm")]
    total = num_macs(net)
    assert set(prices_of_ends(net, names, free, total)) == {names[0], names[-1]}
    split_identity(net, names, grid=Grid.weight(8), form="identity-scalar", precision="int8")
    assert set(prices_of_ends(net, names, free, total)) == {names[-1]}


def test_an_end_stays_in_float_where_the_error_falls_by_more_than_it_costs() -> None:
    errors = {(): 1.0, ("a",): 0.98, ("b",): 0.8, ("b", "c"): 0.6}

    def error(kept: Sequence[str]) -> float:
        return errors[tuple(kept)]

    assert keep_ends({"a": 0.03}, error) == ()
    assert keep_ends({"b": 0.02, "c": 0.035}, error) == ("b", "c")
    assert keep_ends({"b": 0.02, "c": 0.3}, error) == ("b",)
    assert keep_ends({}, error) == ()
