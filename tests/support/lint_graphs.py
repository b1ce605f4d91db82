"""Small Q/DQ graphs, each with a single defect."""

import importlib.util
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from reptrt.core.grid import Grid
from reptrt.graph.net import Net, bytes_from_model, model_from_net, net_from_model
from reptrt.graph.placement import place
from reptrt.graph.plan import plan_from_placement
from reptrt.graph.qdq import insert_qdq, quantize_weights
from reptrt.linter import LintReport, lint_net
from reptrt.trt import binding, versions
from reptrt.trt.messages import Messages

C = 16  # channels
IMAGE = (1, C, 8, 8)
INT8_ZERO = np.int8(0)
FLOAT = TensorProto.FLOAT


needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)


def findings(model: onnx.ModelProto) -> LintReport:
    """Lint a model."""
    return lint_net(net_from_model(model))


def rules(report: LintReport, *severities: str) -> list[str]:
    """Return the broken rules of the given severities, by default of errors and warnings."""
    shown = severities or ("error", "warning")
    return [finding.rule for finding in report.findings if finding.severity in shown]


def quantized(
    model: onnx.ModelProto, rewrite: Callable[[Net], object] | None = None
) -> onnx.ModelProto:
    """Quantize as `reptrt calibrate` does, with made-up scales."""
    net = net_from_model(model)
    if rewrite is not None:
        assert rewrite(net).changed
    placement = place(net)
    scales = {a.tensor: 0.01 * (1 + a.group) for a in placement.activations}
    weights = quantize_weights(net, placement, Grid.weight(8))
    insert_qdq(net, plan_from_placement(placement, scales, weights, Grid.activation(8)))
    return model_from_net(net)


def refused_by_rtx(model: onnx.ModelProto) -> bool:
    """Parse with tensorrt_rtx, and build for sm89 if that works."""
    backend = binding.load("tensorrt-rtx")
    with Messages(backend) as messages:
        builder = binding.create_builder(backend, messages)
        network = versions.create_network(backend, builder)
        parser = backend.trt.OnnxParser(network, messages.logger)
        if not parser.parse(bytes_from_model(model)) or parser.num_errors:
            return True
        config = builder.create_builder_config()
        versions.set_targets(backend, config, ("sm89",))
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            shape = tuple(4 if size < 0 else size for size in tensor.shape)
            if -1 in tuple(tensor.shape):
                profile.set_shape(tensor.name, shape, shape, shape)
        config.add_optimization_profile(profile)
        return builder.build_serialized_network(network, config) is None


class QdqGraph:
    """A graph from input ``x``, built node by node."""

    def __init__(self, shape: tuple[int, ...] = IMAGE, kind: int = FLOAT, opset: int = 19) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs = [helper.make_tensor_value_info("x", kind, shape)]
        self.opset = opset

    def constant(self, value: object) -> str:
        name = f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op: str, *inputs: str, domain: str = "", **attributes: object) -> str:
        name = f"{op.lower()}{len(self.nodes)}"
        node = helper.make_node(op, list(inputs), [f"{name}.out"], name, **attributes)
        node.domain = domain
        self.nodes.append(node)
        return f"{name}.out"

    def q(self, x: str, scale: object = 0.05, zero_point: object = INT8_ZERO, axis: int = 1) -> str:
        return self.node("QuantizeLinear", x, *self._parameters(scale, zero_point), axis=axis)

    def dq(
        self, x: str, scale: object = 0.05, zero_point: object = INT8_ZERO, axis: int = 1
    ) -> str:
        return self.node("DequantizeLinear", x, *self._parameters(scale, zero_point), axis=axis)

    def qdq(
        self, x: str, scale: object = 0.05, zero_point: object = INT8_ZERO, axis: int = 1
    ) -> str:
        return self.dq(self.q(x, scale, zero_point, axis), scale, zero_point, axis)

    def weight(
        self,
        *shape: int,
        axis: int = 0,
        scale: object = None,
        zero_point: object = None,
        kind: type[np.integer] = np.int8,
    ) -> str:
        codes = self.rng.integers(0, 127, shape).astype(kind)
        scale = np.full(shape[axis], 0.01, np.float32) if scale is None else scale
        zero_point = np.zeros(np.shape(scale), kind) if zero_point is None else zero_point
        return self.dq(self.constant(codes), scale, zero_point, axis)

    def conv(self, x: str, weight: str | None = None, *bias: str, pad: int = 1) -> str:
        weight = self.weight(C, C, 3, 3) if weight is None else weight
        return self.node("Conv", x, weight, *bias, pads=[pad] * 4)

    def block(self, x: str, *, scale: object = 0.05) -> str:
        return self.node("Relu", self.conv(self.qdq(x, scale)))

    def model(self, *outputs: str, kind: int = FLOAT) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "net",
            self.inputs,
            [helper.make_tensor_value_info(output, kind, None) for output in outputs],
            self.constants,
        )
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        ir_version = 9 if self.opset < 21 else 10
        model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)
        return onnx.shape_inference.infer_shapes(model)  # the checker wants shapes of outputs

    def _parameters(self, scale: object, zero_point: object) -> list[str]:
        scale = np.float32(scale) if isinstance(scale, float) else scale
        values = [value for value in (scale, zero_point) if value is not None]
        return [value if isinstance(value, str) else self.constant(value) for value in values]


def clean() -> onnx.ModelProto:
    """Return two INT8 convolutions in FP16."""
    g = QdqGraph(kind=TensorProto.FLOAT16)
    x = "x"
    for _ in range(2):
        weight = g.weight(C, C, 3, 3, scale=np.full(C, 0.01, np.float16))
        x = g.node("Relu", g.conv(g.qdq(x, np.float16(0.05)), weight))
    return g.model(x, kind=TensorProto.FLOAT16)


def one_conv(
    scale: object = 0.05,
    zero_point: object = INT8_ZERO,
    axis: int = 1,
    opset: int = 19,
    **weight: object,
) -> onnx.ModelProto:
    """Return one INT8 convolution with ReLU; ``weight_axis=...`` sets the axis of its weight."""
    g = QdqGraph(opset=opset)
    x = g.qdq("x", scale, zero_point, axis)
    options = {name.removeprefix("weight_"): value for name, value in weight.items()}
    return g.model(g.node("Relu", g.conv(x, g.weight(C, C, 3, 3, **options))))


def matrix_product(op: str, axis: int, **attributes: object) -> onnx.ModelProto:
    """Return an INT8 Gemm or MatMul, 32 -> 16 (16 x 32 with transB)."""
    g = QdqGraph((4, 32))
    shape = (16, 32) if attributes.get("transB") else (32, 16)
    return g.model(g.node(op, g.qdq("x"), g.weight(*shape, axis=axis), **attributes))


def transposed_conv(axis: int) -> onnx.ModelProto:
    """Return an INT8 ConvTranspose, 16 -> 32."""
    g = QdqGraph()
    return g.model(g.node("ConvTranspose", g.qdq("x"), g.weight(C, 32, 2, 2, axis=axis)))


def with_bias(codes: object, scale: object, zero_point: object) -> onnx.ModelProto:
    """Return an INT8 convolution whose bias is dequantized."""
    g = QdqGraph()
    return g.model(g.conv(g.qdq("x"), None, g.dq(g.constant(codes), scale, zero_point, axis=0)))


def integer_op(op: str) -> onnx.ModelProto:
    """Return a graph with an operator that computes on codes."""
    is_conv = op == "QLinearConv"
    g = QdqGraph(IMAGE if is_conv else (4, C))
    shape = (C, C, 1, 1) if is_conv else (C, C)
    weight, scale, zero = g.constant(np.ones(shape, np.int8)), g.constant(np.float32(0.05)), ""
    if op == "DynamicQuantizeLinear":
        g.nodes.append(helper.make_node(op, ["x"], ["q", "s", "z"], "dynamic"))
        return g.model(g.node("Relu", g.node("Neg", g.dq("q", "s", "z"))))
    codes, zero = g.q("x"), g.constant(INT8_ZERO)
    if op == "MatMulInteger":
        return g.model(g.node("Cast", g.node(op, codes, weight), to=FLOAT))
    operands = (codes, scale, zero, weight, scale, zero)
    domain = "com.microsoft" if op == "QGemm" else ""
    bias = ("",) if op == "QGemm" else ()
    result = g.node(op, *operands, *bias, scale, zero, domain=domain)
    return g.model(g.node("Neg", g.dq(result)))


def scalar_constant() -> onnx.ModelProto:
    """Return a convolution whose result is multiplied by a dequantized scalar."""
    g = QdqGraph()
    factor = g.dq(g.constant(np.int8(5)))
    return g.model(g.node("Mul", g.conv(g.qdq("x")), factor))


def scalar_input() -> onnx.ModelProto:
    """Return a convolution whose result is multiplied by a quantized scalar input."""
    g = QdqGraph()
    g.inputs.append(helper.make_tensor_value_info("s", FLOAT, ()))
    return g.model(g.block(g.node("Mul", g.conv(g.qdq("x")), g.qdq("s"))))


def reshaped_codes() -> onnx.ModelProto:
    """Return a convolution with a Reshape between INT8 weight and DQ."""
    g = QdqGraph()
    flat = g.constant(np.ones((C, C * 9), np.int8))
    codes = g.node("Reshape", flat, g.constant(np.array([C, C, 3, 3])))
    weight = g.dq(codes, np.full(C, 0.01, np.float32), np.zeros(C, np.int8), axis=0)
    return g.model(g.conv(g.qdq("x"), weight))


def runtime_parameter(role: str) -> onnx.ModelProto:
    """Return a convolution whose scale or zero point is a graph input."""
    g = QdqGraph()
    kind = FLOAT if role == "scale" else TensorProto.INT8
    g.inputs.append(helper.make_tensor_value_info("p", kind, ()))
    x = g.qdq("x", "p") if role == "scale" else g.qdq("x", 0.05, "p")
    return g.model(g.conv(x))


def half_and_float() -> onnx.ModelProto:
    """Return a convolution of an FP16 input with an FP32 weight."""
    g = QdqGraph(kind=TensorProto.FLOAT16)
    return g.model(g.conv(g.qdq("x", np.float16(0.05))), kind=TensorProto.FLOAT16)


def float_scale_of_half(*, of: str) -> onnx.ModelProto:
    """Return an FP16 graph in which the scale of a Q, or of a summand, is FP32."""
    g = QdqGraph(kind=TensorProto.FLOAT16)
    if of == "quantize":
        x = g.node("Cast", g.qdq("x", np.float32(0.05)), to=TensorProto.FLOAT16)
    else:
        x = g.qdq("x", np.float16(0.05))
    y = g.conv(x, g.weight(C, C, 3, 3, scale=np.full(C, 0.01, np.float16)))
    if of == "sum":
        codes = g.constant(np.ones((1, C, 1, 1), np.int8))
        y = g.node("Add", y, g.dq(codes, np.float32(0.05)))
    return g.model(g.node("Relu", y), kind=TensorProto.FLOAT16)


def decoded(*ops: str, then: str | None = None) -> onnx.ModelProto:
    """Return a head whose output is quantized and decoded by nodes that need no INT8.

    Args:
        ops: nodes of one operand behind the pair.
        then: a last node that joins the result with a float branch.
    """
    g = QdqGraph()
    x = g.block("x")
    y = g.qdq(g.conv(g.qdq(x)), 0.04)
    for op in ops:
        y = g.node(op, y)
    if then is not None:
        y = g.node(then, y, g.conv(g.qdq(x)), **({"axis": 1} if then == "Concat" else {}))
    return g.model(g.node("Neg", y) if then is None else y)


def gelu_by_tanh(*, skip: bool) -> onnx.ModelProto:
    """Return a residual sum in front of GELU by tanh, its skip quantized or not.

    The sum inside GELU, x + 0.044715 x^3, is no residual.
    """
    g = QdqGraph()
    x = g.block("x")
    x_dq = g.qdq(x)
    total = g.node("Add", g.conv(x_dq), x_dq if skip else x)
    three, small, half, one = (g.constant(np.float32(v)) for v in (3, 0.044715, 0.5, 1))
    inner = g.node("Add", total, g.node("Mul", g.node("Pow", total, three), small))
    gate = g.node("Mul", g.node("Add", g.node("Tanh", inner), one), half)
    return g.model(g.conv(g.qdq(g.node("Mul", total, gate), 0.1)))


def small_fp16_scale() -> onnx.ModelProto:
    """Return an FP16 convolution with a scale of 1e-6."""
    g = QdqGraph(kind=TensorProto.FLOAT16)
    weight = g.weight(C, C, 3, 3, scale=np.full(C, 0.01, np.float16))
    return g.model(g.conv(g.qdq("x", np.float16(1e-6)), weight), kind=TensorProto.FLOAT16)


def dangling_q() -> onnx.ModelProto:
    """Return a convolution whose quantized output leaves the graph as codes."""
    g = QdqGraph()
    return g.model(g.q(g.block("x")), kind=TensorProto.INT8)


def arithmetic_on_codes() -> onnx.ModelProto:
    """Return a graph that casts codes to numbers."""
    g = QdqGraph()
    return g.model(g.node("Cast", g.q(g.block("x")), to=FLOAT))


def pair_before(op: str) -> onnx.ModelProto:
    """Return Conv, Q/DQ, and then ReLU, Sigmoid or BatchNormalization."""
    g = QdqGraph()
    ones = g.constant(np.ones(C, np.float32))
    more = (ones,) * 4 if op == "BatchNormalization" else ()
    return g.model(g.conv(g.qdq(g.node(op, g.qdq(g.conv(g.qdq("x"))), *more))))


def residual(*, main: bool, skip: bool, relu: bool = False, split: bool = False) -> onnx.ModelProto:
    """Return conv(conv(x)) + x, with Q/DQ on the main or the skip input of the Add, or on both."""
    g = QdqGraph()
    x = g.block("x")
    x_dq = g.qdq(x)
    inner = g.qdq(g.node("Relu", g.conv(x_dq)))
    y = g.conv(inner)
    if split:
        y = g.node("Add", y, g.qdq(g.conv(inner, g.weight(C, C, 1, 1), pad=0), 0.06))
    y = g.node("Relu", y) if relu else y
    total = g.node("Add", g.qdq(y, 0.07) if main else y, x_dq if skip else x)
    return g.model(g.conv(g.qdq(g.node("Relu", total), 0.1)))


def split(side: str) -> onnx.ModelProto:
    """Return a weight split: conv(x) plus a 1x1 convolution of x, or plus d * x, in float."""
    g = QdqGraph()
    x = g.qdq("x")
    if side == "conv":
        part = g.conv(x, g.weight(C, C, 1, 1), pad=0)
    else:
        part = g.node("Mul", x, g.constant(np.full((1, C, 1, 1), 0.9, np.float32)))
    return g.model(g.block(g.node("Relu", g.node("Add", part, g.conv(x)))))


def padded(*, before: bool) -> onnx.ModelProto:
    """Return Pad and Conv, with Q/DQ before or behind the Pad."""
    g = QdqGraph()
    pads = g.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    x = g.node("Pad", g.qdq("x") if before else "x", pads)
    return g.model(g.conv(x if before else g.qdq(x), pad=0))


def concatenated(left: float, right: float, after: float | None) -> onnx.ModelProto:
    """Return a Concat of two quantized branches and a convolution of it."""
    g = QdqGraph()
    parts = [g.qdq(g.block("x"), left), g.qdq(g.block("x"), right)]
    x = g.node("Concat", *parts, axis=1)
    x = x if after is None else g.qdq(x, after)
    return g.model(g.conv(x, g.weight(C, 2 * C, 3, 3)))


def requantized(first: float, second: float, op: str | None) -> onnx.ModelProto:
    """Return Q/DQ, a node that moves values or none, Q/DQ, and a convolution."""
    g = QdqGraph()
    x = g.qdq("x", first)
    x = x if op is None else g.node(op, x, kernel_shape=[2, 2], strides=[2, 2])
    return g.model(g.conv(g.qdq(x, second)))


def two_scales() -> onnx.ModelProto:
    """Return two convolutions of one tensor, quantized with a scale each."""
    g = QdqGraph()
    x = g.block("x")
    return g.model(g.conv(g.qdq(x, 0.05)), g.conv(g.qdq(x, 0.03)))


def quantized_output(op: str | None) -> onnx.ModelProto:
    """Return a convolution whose output, or Sigmoid of it, is quantized."""
    g = QdqGraph()
    x = g.conv(g.qdq("x"))
    x = x if op is None else g.node(op, x)
    return g.model(g.qdq(x, 0.01))


def unequal_pair() -> onnx.ModelProto:
    """Return a Q and a DQ of different scales before a convolution."""
    g = QdqGraph()
    return g.model(g.conv(g.dq(g.q("x", 0.05), 0.03)))


def scaled_skip() -> onnx.ModelProto:
    """Return a residual whose skip has the codes of x and a scale of its own."""
    g = QdqGraph()
    codes = g.q(g.block("x"), 0.05)
    total = g.node("Add", g.conv(g.dq(codes, 0.05)), g.dq(codes, 0.04))
    return g.model(g.block(g.node("Relu", total)))


def gated() -> onnx.ModelProto:
    """Return SiLU with Q/DQ on the Sigmoid."""
    g = QdqGraph()
    y = g.conv(g.qdq("x"))
    return g.model(g.conv(g.qdq(g.node("Mul", y, g.qdq(g.node("Sigmoid", y), 0.008)))))


def float_conv(*, last: bool) -> onnx.ModelProto:
    """Return three convolutions, the middle or the last one in float."""
    g = QdqGraph()
    weight = g.constant(np.ones((C, C, 3, 3), np.float32))
    x = g.block("x")
    x = g.block(x) if last else g.node("Relu", g.conv(x, weight))
    return g.model(g.conv(x, weight) if last else g.block(x))


def half_quantized(missing: str) -> onnx.ModelProto:
    """Return two convolutions, one with only its input or only its weight quantized."""
    g = QdqGraph()
    x = g.block("x")
    if missing == "input":
        return g.model(g.block(g.conv(x)))
    weight = g.constant(np.ones((C, C, 3, 3), np.float32))
    return g.model(g.block(g.conv(g.qdq(x), weight)))


def island(*ops: str, **attributes: object) -> onnx.ModelProto:
    """Return two convolutions with float nodes between them."""
    g = QdqGraph()
    x = g.block("x")
    for op in ops:
        x = g.node(op, x, **attributes)
    return g.model(g.block(x))


def runtime_weight() -> onnx.ModelProto:
    """Return a convolution whose weight is a graph input, quantized at run time."""
    g = QdqGraph()
    g.inputs.append(helper.make_tensor_value_info("w", FLOAT, (C, C, 3, 3)))
    weight = g.qdq("w", np.full(C, 0.01, np.float32), np.zeros(C, np.int8), axis=0)
    return g.model(g.conv(g.qdq("x"), weight))


def unquantized() -> onnx.ModelProto:
    """Return a float convolution."""
    g = QdqGraph()
    return g.model(g.conv("x", g.constant(np.ones((C, C, 3, 3), np.float32))))


def simulated() -> onnx.ModelProto:
    """Return a graph that says of itself that it simulates 6 bits."""
    model = one_conv()
    helper.set_model_props(model, {"reptrt.simulation": "6-bit weights"})
    return model
