"""Small ONNX classifiers, made with onnx.helper alone."""

import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def classifier(
    *,
    batch: int | str = "N",
    size: int = 8,
    classes: int = 10,
    seed: int = 0,
    metadata: dict[str, object] | None = None,
) -> onnx.ModelProto:
    """Return conv 3x3 -> ReLU -> global average -> Gemm, input x (batch, 3, size, size)."""
    rng = np.random.default_rng(seed)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "v"], ["logits"], name="head"),
    ]
    initializers = [
        numpy_helper.from_array(rng.standard_normal((6, 3, 3, 3)).astype(np.float32), "w"),
        numpy_helper.from_array(rng.standard_normal((6, classes)).astype(np.float32), "v"),
    ]
    return make_model(nodes, initializers, [batch, 3, size, size], [batch, classes], metadata)


def quantized_conv(*, signed: bool = False) -> onnx.ModelProto:
    """Return Q -> DQ -> conv -> ReLU -> Q -> DQ with UINT8 or, as TensorRT wants, INT8 codes."""
    rng = np.random.default_rng(0)
    constants = {
        "s": np.float32(0.05),
        "z": np.int8(0) if signed else np.uint8(0),
        "sw": np.float32(0.002),
        "zw": np.int8(0),
        "w": rng.integers(-127, 128, (4, 3, 3, 3), dtype=np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], name="xq"),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"], name="xd"),
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["wd"], name="wd"),
        helper.make_node("Conv", ["xd", "wd"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("QuantizeLinear", ["r", "s", "z"], ["rq"], name="rq"),
        helper.make_node("DequantizeLinear", ["rq", "s", "z"], ["logits"], name="rd"),
    ]
    initializers = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
    return make_model(nodes, initializers, ["N", 3, 8, 8], ["N", 4, 8, 8], None)


def make_model(
    nodes: list[onnx.NodeProto],
    initializers: list[onnx.TensorProto],
    input_shape: list[int | str],
    output_shape: list[int | str],
    metadata: dict[str, object] | None,
) -> onnx.ModelProto:
    """Return a checked model from input x to output logits; metadata goes under ``reptrt.``."""
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, input_shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, output_shape)],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    props = {f"reptrt.{key}": json.dumps(value) for key, value in (metadata or {}).items()}
    helper.set_model_props(model, props)
    onnx.checker.check_model(model)
    return model
