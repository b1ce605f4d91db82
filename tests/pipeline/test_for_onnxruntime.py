"""Files for onnxruntime: INT8 kernels without reptrt, all codes, sums that know what they need."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from reptrt.core.errors import EngineError
from reptrt.core.grid import Grid
from reptrt.core.metrics import sqnr_db
from reptrt.execute.runner import OrtRunner
from reptrt.graph.net import net_from_model, read_model
from reptrt.graph.quantized import plan_from_net
from reptrt.pipeline import CalibrateOptions, calibrate
from reptrt.quantize.choose.ends import MOST, keep_ends, prices_of_ends
from reptrt.quantize.targets import TARGETS
from reptrt.trt.input import read_buildable
from tests.support.learned_nets import rep_net, write_images, write_net

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
    plan = plan_from_net(net_from_model(model))
    assert counts["QLinearAdd"] > 0
    assert counts["QLinearConv"] + counts["QGemm"] == len(plan.weights)
    assert counts["Conv"] + counts["FusedConv"] + counts["Gemm"] <= len(plan.excluded)


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


def test_a_file_for_cpus_is_nearer_to_float_than_int8_sums_for_engines(made: Path) -> None:
    model = made / "m.onnx"
    engine = CalibrateOptions(images=32, split="identity", split_precision="int8")
    calibrate(model, made / "d.npz", made / "e.onnx", engine)
    pixels = np.load(write_images(made / "other.npz", 64, seed=5))["x"]
    x = ((pixels / 255 - 0.5) / 0.25).astype(np.float32)
    with OrtRunner(model) as runner:
        reference = runner.run(x)[runner.output_names[0]]
    found = {}
    for name in ("o", "e"):
        with OrtRunner(made / f"{name}.onnx") as runner:
            found[name] = sqnr_db(reference, runner.run(x)[runner.output_names[0]])
    assert found["o"] > found["e"] + 3


def test_an_engine_is_refused(made: Path) -> None:
    with pytest.raises(EngineError, match=r"o\.onnx: made for onnxruntime.*target"):
        read_buildable(made / "o.onnx")


# Ends --------------------------------------------------------------------------------------------


def test_the_price_of_an_end_is_its_share_of_the_work(made: Path) -> None:
    net, costs = net_from_model(read_model(made / "m.onnx")), TARGETS["onnxruntime"].costs
    names = [node.name for node in net.graph.nodes if node.op in ("Conv", "Gemm")]
    prices = prices_of_ends(net, names, costs)
    assert set(prices) <= {names[0], names[-1]}
    assert all(0 < price <= MOST for price in prices.values())
    assert names[-1] in prices
    assert prices_of_ends(net, [], costs) == {}


def test_an_end_stays_in_float_where_the_error_falls_by_more_than_it_costs() -> None:
    errors = {(): 1.0, ("a",): 0.98, ("b",): 0.8, ("b", "c"): 0.6}

    def error(kept: Sequence[str]) -> float:
        return errors[tuple(kept)]

    assert keep_ends({"a": 0.03}, error) == ()
    assert keep_ends({"b": 0.02, "c": 0.035}, error) == ("b", "c")
    assert keep_ends({"b": 0.02, "c": 0.3}, error) == ("b",)
    assert keep_ends({}, error) == ()
