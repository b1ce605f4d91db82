"""Make the fixtures of this folder; see README.md. One argument: nets, onnxruntime or modelopt."""

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FOLDER = Path(__file__).resolve().parent
SIZE = 16
CHANNELS = 16


class Builder:
    """A float graph, node by node, with He-normal weights."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def node(self, op: str, name: str, *inputs: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [f"{name}.out"], name, **attributes))
        return f"{name}.out"

    def conv(
        self,
        name: str,
        x: str,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        pad: int | None = None,
    ) -> str:
        shape = (outputs, inputs, kernel, kernel)
        std = np.sqrt(2 / (inputs * kernel**2))
        weight = self.constant(f"{name}.w", self.rng.normal(0, std, shape).astype(np.float32))
        bias = self.constant(f"{name}.b", self.rng.normal(0, 0.1, outputs).astype(np.float32))
        pad = kernel // 2 if pad is None else pad
        return self.node("Conv", name, x, weight, bias, pads=[pad] * 4, strides=[stride] * 2)

    def block(self, name: str, x: str, inputs: int, outputs: int, **options: int) -> str:
        return self.node("Relu", f"{name}.relu", self.conv(name, x, inputs, outputs, **options))

    def head(self, x: str, inputs: int) -> str:
        pooled = self.node("GlobalAveragePool", "pool", x)
        flat = self.node("Flatten", "flatten", pooled)
        weight = self.rng.normal(0, 0.3, (10, inputs)).astype(np.float32)
        names = self.constant("head.w", weight), self.constant("head.b", np.zeros(10, np.float32))
        return self.node("Gemm", "head", flat, *names, transB=1)

    def model(self, output: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
        return onnx.shape_inference.infer_shapes(model)


def rep() -> onnx.ModelProto:
    """Return a fused rep-net: three 3x3 convolutions with ReLU, average, Gemm."""
    b = Builder()
    x = b.block("stem", "x", 3, CHANNELS, stride=2)
    x = b.block("conv1", x, CHANNELS, CHANNELS)
    x = b.block("conv2", x, CHANNELS, CHANNELS, stride=2)
    return b.model(b.head(x, CHANNELS))


def res() -> onnx.ModelProto:
    """Return a ResNet-like net: MaxPool, an identity block, a block with a 1x1 projection."""
    b = Builder()
    x = b.node(
        "MaxPool", "maxpool", b.block("stem", "x", 3, CHANNELS), kernel_shape=[2, 2], strides=[2, 2]
    )
    y = b.conv("a2", b.block("a1", x, CHANNELS, CHANNELS), CHANNELS, CHANNELS)
    x = b.node("Relu", "a.relu", b.node("Add", "a.add", y, x))
    y = b.conv("b2", b.block("b1", x, CHANNELS, CHANNELS, stride=2), CHANNELS, CHANNELS)
    skip = b.conv("b.skip", x, CHANNELS, CHANNELS, kernel=1, stride=2)
    x = b.node("Relu", "b.relu", b.node("Add", "b.add", y, skip))
    return b.model(b.head(x, CHANNELS))


def cat(*, explicit_pad: bool = True) -> onnx.ModelProto:
    """Return a YOLO-like net: Pad, Concat of two branches, SiLU, 1x1 head with Sigmoid."""
    b = Builder()
    x = b.block("stem", "x", 3, CHANNELS, stride=2)
    if explicit_pad:
        pads = b.constant("pad.pads", np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
        left = b.block("left", b.node("Pad", "pad", x, pads), CHANNELS, CHANNELS, pad=0)
    else:
        left = b.block("left", x, CHANNELS, CHANNELS)
    right = b.node("MaxPool", "right", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1])
    x = b.node("Concat", "concat", left, right, axis=1)
    x = b.conv("mix", x, 2 * CHANNELS, CHANNELS, kernel=1)
    x = b.node("Mul", "mix.silu", x, b.node("Sigmoid", "mix.sigmoid", x))
    x = b.conv("detect", x, CHANNELS, 6, kernel=1)
    return b.model(b.node("Sigmoid", "scores", x))


NETS = {"rep": rep, "res": res, "cat": cat}


def images() -> np.ndarray:
    """Return 32 images of smooth noise, (32, 3, 16, 16)."""
    rng = np.random.default_rng(1)
    coarse = rng.normal(size=(32, 3, SIZE // 4, SIZE // 4)).repeat(4, 2).repeat(4, 3)
    return (coarse + 0.1 * rng.normal(size=(32, 3, SIZE, SIZE))).astype(np.float32)


def with_onnxruntime(source: Path) -> None:
    """Write NAME.ort.onnx, all options at their defaults, and two variants of them.

    res.ort_symmetric.onnx has the options that come closest to what TensorRT takes,
    rep.ort_qoperator.onnx the format with QLinearConv.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{"x": image[None]} for image in images()])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    for name in NETS:
        quantize_static(str(source / f"{name}.onnx"), str(FOLDER / f"{name}.ort.onnx"), Reader())
    quantize_static(
        str(source / "res.onnx"),
        str(FOLDER / "res.ort_symmetric.onnx"),
        Reader(),
        per_channel=True,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
    )
    quantize_static(
        str(source / "rep.onnx"),
        str(FOLDER / "rep.ort_qoperator.onnx"),
        Reader(),
        quant_format=QuantFormat.QOperator,
    )


def with_modelopt(source: Path) -> None:
    """Write NAME.modelopt.onnx, all options at their defaults but the mode (INT8)."""
    from modelopt.onnx.quantization import quantize

    for name in NETS:
        quantize(
            str(source / f"{name}.onnx"),
            quantize_mode="int8",
            calibration_data={"x": images()},
            calibration_eps=["cpu"],
            output_path=str(FOLDER / f"{name}.modelopt.onnx"),
        )


def main() -> None:
    """Make what the argument names."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        for name, make in NETS.items():
            onnx.save(make(), str(source / f"{name}.onnx"))
        {"onnxruntime": with_onnxruntime, "modelopt": with_modelopt}[sys.argv[1]](source)


if __name__ == "__main__":
    main()
