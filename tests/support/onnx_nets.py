"""Small float networks written node by node, as any exporter could write them."""

from collections.abc import Collection, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from reptrt.graph.net import Net, constant_of

Array = np.ndarray


class Builder:
    """Collects nodes; every method returns the name of its output tensor, also the node's name."""

    def __init__(self, channels: int = 3, size: int = 8, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.channels = {"x": channels}
        self.size = size
        self.rng = np.random.default_rng(seed)

    def node(self, op: str, inputs: Sequence[str], name: str, **attrs: object) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attrs))
        self.channels[name] = max(self.channels.get(tensor, 0) for tensor in inputs)
        return name

    def constant(self, name: str, value: Array) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def parameter(self, name: str, *shape: int, gain: float = 1.0) -> str:
        """A random weight that keeps the variance of a ReLU network."""
        std = gain * np.sqrt(2.0 / max(1, int(np.prod(shape[1:]))))
        return self.constant(name, (std * self.rng.standard_normal(shape)).astype(np.float32))

    def conv(self, x: str, outputs: int, name: str, size: int = 3, **attrs: object) -> str:
        groups = int(attrs.get("group", 1))
        weight = self.parameter(f"{name}.weight", outputs, self.channels[x] // groups, size, size)
        bias = self.constant(
            f"{name}.bias", (0.1 * self.rng.standard_normal(outputs)).astype(np.float32)
        )
        attrs.setdefault("pads", [size // 2] * 4)
        self.node("Conv", [x, weight, bias], name, kernel_shape=[size, size], **attrs)
        self.channels[name] = outputs
        return name

    def relu(self, x: str) -> str:
        return self.node("Relu", [x], f"{x}.relu")

    def gemm(self, x: str, outputs: int, name: str) -> str:
        weight = self.parameter(f"{name}.weight", outputs, self.channels[x])
        bias = self.constant(
            f"{name}.bias", (0.1 * self.rng.standard_normal(outputs)).astype(np.float32)
        )
        self.node("Gemm", [x, weight, bias], name, transB=1)
        self.channels[name] = outputs
        return name

    def head(self, x: str, classes: int = 5) -> str:
        """Global average -> Flatten -> Gemm."""
        pooled = self.node("GlobalAveragePool", [x], "pool")
        return self.gemm(self.node("Flatten", [pooled], "flat"), classes, "head")

    def model(self, *outputs: str, batch: int | str = "N", opset: int = 19) -> onnx.ModelProto:
        inputs = [self.channels["x"], self.size, self.size]
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *inputs])],
            [onnx.ValueInfoProto(name=name) for name in outputs],  # types are inferred
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        model.ir_version = 9
        model = onnx.shape_inference.infer_shapes(model)
        onnx.checker.check_model(model)
        return model


def give_identity(net: Net, layers: Collection[str]) -> Net:
    """Add 1 to the weight from each channel of a layer to itself, as an identity branch does."""
    for node in net.graph.nodes:
        if node.name in layers and node.op == "Conv":
            weight = constant_of(node.inputs[1]).copy()
            channels = np.arange(len(weight))
            row, column = (size // 2 for size in weight.shape[2:])
            weight[channels, channels % weight.shape[1], row, column] += 1
            node.inputs[1].values = weight
    return net


def plain_chain(size: int = 8) -> onnx.ModelProto:
    """Conv -> ReLU -> conv -> ReLU -> global average -> Gemm."""
    b = Builder(size=size)
    return b.model(b.head(b.relu(b.conv(b.relu(b.conv("x", 8, "c1")), 8, "c2"))))


def padded_chain() -> onnx.ModelProto:
    """Zero-padding by separate Pad nodes before convolutions without padding."""
    b = Builder()
    pads = b.constant("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1], dtype=np.int64))
    first = b.relu(b.conv(b.node("Pad", ["x", pads], "pad1"), 8, "c1", pads=[0] * 4))
    second = b.relu(b.conv(b.node("Pad", [first, pads], "pad2"), 8, "c2", pads=[0] * 4))
    return b.model(b.head(second))


def basic_block(downsample: bool = False) -> onnx.ModelProto:
    """A ResNet basic block between a stem and a head."""
    b = Builder()
    stem = b.relu(b.conv("x", 8, "stem"))
    outputs, stride = (16, [2, 2]) if downsample else (8, [1, 1])
    inner = b.relu(b.conv(stem, outputs, "c1", strides=stride))
    main = b.conv(inner, outputs, "c2")
    skip = (
        b.conv(stem, outputs, "down", size=1, strides=stride, pads=[0] * 4) if downsample else stem
    )
    return b.model(b.head(b.relu(b.node("Add", [main, skip], "add"))))


def without_names(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with every node unnamed, which ONNX allows."""
    nameless = onnx.ModelProto()
    nameless.CopyFrom(model)
    for node in nameless.graph.node:
        node.name = ""
    return nameless
