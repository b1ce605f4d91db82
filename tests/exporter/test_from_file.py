"""Files of other exporters, old and new, become what rewrites expect."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from reptrt.exporter.from_file import model_from_file
from reptrt.exporter.fuse import fuse
from reptrt.graph.net import model_from_net
from reptrt.graph.preprocess import Preprocess
from tests.support.helpers import ort_run
from tests.support.onnx_nets import Builder

X = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)


def exported(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The file, read and fused; its output is that of the file."""
    onnx.save(model, str(folder / "m.onnx"))
    net, _ = fuse(model_from_file(folder / "m.onnx", 19, None), Preprocess.plain(3, 8, 8))
    written = model_from_net(net)
    (expected,), (got,) = (ort_run(m, {"x": X}).values() for m in (model, written))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    return written


def with_norm(opset: int) -> onnx.ModelProto:
    b = Builder()
    b.node("Conv", ["x", b.parameter("conv.weight", 4, 3, 3, 3)], "c", kernel_shape=[3, 3])
    b.channels["c"] = 4
    b.constant("variance", np.full(4, 0.5, np.float32))
    statistics = [b.parameter(name, 4) for name in ("gamma", "beta", "mean")]
    b.node("BatchNormalization", ["c", *statistics, "variance"], "n")
    return b.model(b.head(b.relu("n")), opset=opset)


@pytest.mark.parametrize("opset", [9, 12])
def test_weights_that_are_listed_as_inputs(tmp_path: Path, opset: int) -> None:
    """As IR version 3 requires it."""
    model = with_norm(opset)
    model.ir_version = 3
    weights = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    model.graph.input.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
        for name, dims in weights.items()
    )
    onnx.checker.check_model(model)
    written = exported(model, tmp_path)
    assert written.ir_version >= 4
    assert [value.name for value in written.graph.input] == ["x"]
    assert "BatchNormalization" not in [node.op_type for node in written.graph.node]


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 19, 21, 22])
def test_opsets(tmp_path: Path, opset: int) -> None:
    written = exported(with_norm(opset), tmp_path)
    assert written.opset_import[0].version == max(opset, 19)
    assert "BatchNormalization" not in [node.op_type for node in written.graph.node]


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    """As PyTorch 2.1 wrote each module: a rep block inside a function, called twice."""
    block = helper.make_function(
        "local",
        "Block",
        ["x", "wide", "point"],
        ["y"],
        [
            helper.make_node("Conv", ["x", "wide"], ["a"], kernel_shape=[3, 3], pads=[1] * 4),
            helper.make_node("Conv", ["x", "point"], ["b"], kernel_shape=[1, 1]),
            helper.make_node("Add", ["a", "b"], ["sum"]),
            helper.make_node("Relu", ["sum"], ["y"]),
        ],
        [helper.make_opsetid("", 19)],
    )
    b = Builder()
    for index in (1, 2):
        weights = [b.parameter(f"{kind}{index}", 3, 3, k, k) for kind, k in (("w", 3), ("p", 1))]
        inputs = [f"y{index - 1}" if index > 1 else "x", *weights]
        b.nodes.append(helper.make_node("Block", inputs, [f"y{index}"], domain="local"))
        b.channels[f"y{index}"] = 3
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])]
    outputs = [helper.make_tensor_value_info("y2", TensorProto.FLOAT, ["N", 3, 8, 8])]
    model = helper.make_model(
        helper.make_graph(b.nodes, "net", inputs, outputs, b.constants),
        opset_imports=[helper.make_opsetid("", 19), helper.make_opsetid("local", 1)],
        functions=[block],
        ir_version=9,
    )
    written = exported(model, tmp_path)
    assert [node.op_type for node in written.graph.node] == ["Conv", "Relu", "Conv", "Relu"]
    assert not written.functions
