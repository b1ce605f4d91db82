"""Small Q/DQ graphs in the form that TensorRT expects, written node by node."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_ZERO = np.int8(0)


def qdq_model(
    batch: int | str = "N",
    channels: int = 16,
    size: int = 8,
    num_convs: int = 2,
    zero_point: np.generic | None = _ZERO,
) -> onnx.ModelProto:
    """Q -> DQ -> Conv (INT8 codes, float bias) -> ReLU, ``num_convs`` times, then pooling."""
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, np.ndarray] = {"scale": np.float32(0.02)}
    if zero_point is not None:
        constants["zero_point"] = zero_point
    scale = ["scale"] if zero_point is None else ["scale", "zero_point"]
    source, in_channels = "input", 3
    for i in range(num_convs):
        shape = (channels, in_channels, 3, 3)
        constants |= {
            f"conv{i}.weight_q": rng.integers(-127, 128, shape).astype(np.int8),
            f"conv{i}.scale": rng.uniform(1e-3, 1e-2, channels).astype(np.float32),
            f"conv{i}.zero_point": np.zeros(channels, np.int8),
            f"conv{i}.bias": rng.normal(size=channels).astype(np.float32),
        }
        weight = [f"conv{i}.weight_q", f"conv{i}.scale", f"conv{i}.zero_point"]
        nodes += [
            helper.make_node("QuantizeLinear", [source, *scale], [f"q{i}"], name=f"q{i}"),
            helper.make_node("DequantizeLinear", [f"q{i}", *scale], [f"dq{i}"], name=f"dq{i}"),
            helper.make_node("DequantizeLinear", weight, [f"w{i}"], name=f"w{i}", axis=0),
            helper.make_node(
                "Conv",
                [f"dq{i}", f"w{i}", f"conv{i}.bias"],
                [f"c{i}"],
                name=f"conv{i}",
                pads=[1, 1, 1, 1],
            ),
            helper.make_node("Relu", [f"c{i}"], [f"r{i}"], name=f"relu{i}"),
        ]
        source, in_channels = f"r{i}", channels
    nodes.append(helper.make_node("GlobalAveragePool", [source], ["logits"], name="pool"))
    return model_of(nodes, [batch, 3, size, size], [batch, channels, 1, 1], constants)


def model_of(
    nodes: list[onnx.NodeProto],
    input_shape: list[int | str],
    output_shape: list[int | str],
    constants: dict[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    """Return a model from ``input`` to the last node's output, opset 19, no check."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, input_shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, output_shape)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def save(model: onnx.ModelProto, path: Path) -> Path:
    """Write a model; return the path."""
    onnx.save(model, str(path))
    return path
