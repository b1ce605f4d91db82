"""The linter's rules: a graph for each defect, graphs without, and TensorRT's own word on both."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from reptrt.linter import RULES
from tests.support import lint_graphs as graphs
from tests.support.lint_graphs import (
    C,
    QdqGraph,
    findings,
    needs_rtx,
    one_conv,
    refused_by_rtx,
    rules,
)

F32, F16, I8 = np.float32, np.float16, np.int8


# One defect each. `refused`: tensorrt_rtx 1.7 does not parse or does not build the graph; None: not
# asked, because it crashes.


@dataclass(frozen=True)
class Case:
    rule: str  # the only error or warning
    got: str  # regular expression
    refused: bool | None
    make: Callable[[], onnx.ModelProto]


NEGATIVE = np.r_[np.full(C - 1, 0.01), -0.01].astype(F32)
PER_CHANNEL = np.full(C, 0.05, F32)
CASES = {
    "activation zero point": Case(
        "QDQ001", "zero point 3", True, lambda: one_conv(zero_point=I8(3))
    ),
    "weight zero point": Case(
        "QDQ001", "zero point 5", True, lambda: one_conv(weight_zero_point=np.full(C, 5, I8))
    ),
    "uint8 activation": Case(
        "QDQ002", "^UINT8 codes$", False, lambda: one_conv(zero_point=np.uint8(0))
    ),
    "no zero point": Case(
        "QDQ002", r"UINT8 codes \(no zero point\)", False, lambda: one_conv(zero_point=None)
    ),
    "uint8 weight": Case("QDQ002", "UINT8", True, lambda: one_conv(weight_kind=np.uint8)),
    "zero scale": Case("QDQ003", "scale 0$", True, lambda: one_conv(0.0)),
    "negative scale": Case("QDQ003", "scale -0.05", True, lambda: one_conv(-0.05)),
    "nan scale": Case("QDQ003", "scale nan", True, lambda: one_conv(float("nan"))),
    "infinite scale": Case("QDQ003", "scale inf", False, lambda: one_conv(float("inf"))),
    "negative weight scale": Case(
        "QDQ003", "scale -0.01 in 1 of 16 channels", True, lambda: one_conv(weight_scale=NEGATIVE)
    ),
    "runtime scale": Case(
        "QDQ004", "scale p is computed", None, lambda: graphs.runtime_parameter("scale")
    ),
    "runtime zero point": Case(
        "QDQ004", "zero point p is computed", True, lambda: graphs.runtime_parameter("zero point")
    ),
    "too few scales": Case(
        "QDQ005",
        r"8 scales for 16 channels \(axis 0\)",
        True,
        lambda: one_conv(weight_scale=np.full(8, 0.01, F32)),
    ),
    "one zero point for all": Case(
        "QDQ005", "1 zero points for 16 scales", True, lambda: one_conv(weight_zero_point=I8(0))
    ),
    "activation per channel": Case(
        "QDQ006", "16 scales", False, lambda: one_conv(PER_CHANNEL, np.zeros(C, I8))
    ),
    "conv axis": Case("QDQ007", "along axis 1", False, lambda: one_conv(weight_axis=1)),
    "gemm axis": Case("QDQ007", "along axis 0", False, lambda: graphs.matrix_product("Gemm", 0)),
    "gemm axis, transB": Case(
        "QDQ007", "along axis 1", False, lambda: graphs.matrix_product("Gemm", 1, transB=1)
    ),
    "matmul axis": Case(
        "QDQ007", "along axis 0", False, lambda: graphs.matrix_product("MatMul", 0)
    ),
    "transposed axis": Case("QDQ007", "along axis 0", False, lambda: graphs.transposed_conv(0)),
    "int32 bias": Case(
        "QDQ008", "INT32", True, lambda: graphs.with_bias(np.ones(C, np.int32), F32(1e-4), None)
    ),
    "QLinearConv": Case("QDQ009", "QLinearConv", True, lambda: graphs.integer_op("QLinearConv")),
    "QLinearMatMul": Case(
        "QDQ009", "QLinearMatMul", True, lambda: graphs.integer_op("QLinearMatMul")
    ),
    "MatMulInteger": Case(
        "QDQ009", "MatMulInteger", True, lambda: graphs.integer_op("MatMulInteger")
    ),
    "QGemm": Case("QDQ009", "QGemm", True, lambda: graphs.integer_op("QGemm")),
    "dynamic": Case(
        "QDQ009", "DynamicQuant", True, lambda: graphs.integer_op("DynamicQuantizeLinear")
    ),
    "scalar constant": Case("QDQ010", "scalar INT8", True, graphs.scalar_constant),
    "reshaped codes": Case("QDQ010", "Reshape reads INT8", True, graphs.reshaped_codes),
    "mixed types": Case("QDQ011", "input float16, weight float32", True, graphs.half_and_float),
    "new opset": Case("QDQ012", "opset 21", False, lambda: one_conv(opset=21)),
    "old opset": Case("QDQ012", "opset 12", False, lambda: one_conv(opset=12)),
    "codes as output": Case("QDQ013", "read by the graph's output", False, graphs.dangling_q),
    "codes as numbers": Case("QDQ013", "read by Cast", False, graphs.arithmetic_on_codes),
    "fp32 scale of an fp16 tensor": Case(
        "QDQ016",
        "input float16, scale float32",
        False,
        lambda: graphs.float_scale_of_half(of="quantize"),
    ),
    "fp32 scale in an fp16 sum": Case(
        "QDQ016",
        "float32 beside float16 in add",
        True,
        lambda: graphs.float_scale_of_half(of="sum"),
    ),
    "simulation": Case("QDQ015", "6-bit weights", False, graphs.simulated),
    "pair before relu": Case(
        "QDQ101", "between Conv and Relu", False, lambda: graphs.pair_before("Relu")
    ),
    "pair before sigmoid": Case(
        "QDQ101", "between Conv and Sigmoid", False, lambda: graphs.pair_before("Sigmoid")
    ),
    "pair before batch norm": Case(
        "QDQ102", "between Conv and batch", False, lambda: graphs.pair_before("BatchNormalization")
    ),
    "pairs on both of a sum": Case(
        "QDQ103", "between conv.* and add", False, lambda: graphs.residual(main=True, skip=True)
    ),
    "pairs on both of a sum, behind a split": Case(
        "QDQ103",
        "between add.* and add",
        False,
        lambda: graphs.residual(main=True, skip=True, split=True),
    ),
    "float skip": Case(
        "QDQ104", "relu.* as float", False, lambda: graphs.residual(main=False, skip=False)
    ),
    "float input of a sum that fuses with nothing": Case(
        "QDQ104",
        "relu.* as float",
        False,
        lambda: graphs.residual(main=False, skip=True, relu=True),
    ),
    "pair behind pad": Case(
        "QDQ105", "between pad.* and conv", False, lambda: graphs.padded(before=False)
    ),
    "concat inputs": Case(
        "QDQ106", "scales 0.05, 0.04", False, lambda: graphs.concatenated(0.05, 0.04, 0.05)
    ),
    "concat output": Case(
        "QDQ106", "scales 0.05, 0.06", False, lambda: graphs.concatenated(0.05, 0.05, 0.06)
    ),
    "twice in a row": Case(
        "QDQ107", "0.05 after scale 0.05", False, lambda: graphs.requantized(0.05, 0.05, None)
    ),
    "another scale behind a pool": Case(
        "QDQ107", "0.03 after scale 0.05", False, lambda: graphs.requantized(0.05, 0.03, "MaxPool")
    ),
    "two scales": Case("QDQ108", "with scales 0.05, 0.03", False, graphs.two_scales),
    "quantized logits": Case(
        "QDQ109", "is rounded to 256", False, lambda: graphs.quantized_output(None)
    ),
    "quantized scores": Case(
        "QDQ109", "is rounded to 256", False, lambda: graphs.quantized_output("Sigmoid")
    ),
    "unequal pair": Case("QDQ110", "Q with scale 0.05, DQ with 0.03", False, graphs.unequal_pair),
    "int8 bias": Case(
        "QDQ111", "bias through", False, lambda: graphs.with_bias(np.ones(C, I8), 0.01, I8(0))
    ),
    "decoded in INT8": Case("QDQ114", "only Exp read conv", False, lambda: graphs.decoded("Exp")),
    "joined with floats at the end": Case(
        "QDQ114", "only Concat read conv", False, lambda: graphs.decoded(then="Concat")
    ),
    "moved and decoded": Case(
        "QDQ114", "only Flatten read conv", False, lambda: graphs.decoded("Flatten", "Exp")
    ),
    "summed at the end": Case(
        "QDQ114", "only Sub read conv", False, lambda: graphs.decoded(then="Sub")
    ),
    "float skip before GELU by tanh": Case(
        "QDQ104", "relu.* as float", False, lambda: graphs.gelu_by_tanh(skip=False)
    ),
    "quantized gate": Case("QDQ113", "between Sigmoid and Mul", False, graphs.gated),
    "float convolution": Case(
        "QDQ201", "Conv in float", False, lambda: graphs.float_conv(last=False)
    ),
    "float weight": Case(
        "QDQ202", "weight in float, input q", False, lambda: graphs.half_quantized("weight")
    ),
    "float input": Case(
        "QDQ202", "input in float, weight q", False, lambda: graphs.half_quantized("input")
    ),
    "softmax between": Case(
        "QDQ203",
        r"softmax\d+ \(Softmax\), logsoftmax\d+ \(LogSoftmax\)$",
        False,
        lambda: graphs.island("Softmax", "Neg", "LogSoftmax"),
    ),
    "pool on float": Case(
        "QDQ203", "AveragePool", False, lambda: graphs.island("AveragePool", kernel_shape=[1, 1])
    ),
    "runtime weight": Case("QDQ207", "weight .* run time", False, graphs.runtime_weight),
    "float graph": Case("QDQ208", "0 of 1 layers", False, graphs.unquantized),
    "one weight scale": Case(
        "QDQ301", "one scale", False, lambda: one_conv(weight_scale=F32(0.01))
    ),
    "small fp16 scale": Case("QDQ302", "FP16 scale 1.01e-06", False, graphs.small_fp16_scale),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_defect_one_finding(case):
    report = findings(case.make())
    assert rules(report) == [case.rule]
    (finding,) = [f for f in report.findings if f.severity != "info"]
    assert re.search(case.got, finding.got)
    assert finding.expected
    assert finding.node


@pytest.mark.slow
@needs_rtx
@pytest.mark.parametrize(
    "case",
    [case for case in CASES.values() if case.refused is not None],
    ids=[name for name, case in CASES.items() if case.refused is not None],
)
def test_what_tensorrt_refuses_is_an_error(case):
    assert refused_by_rtx(case.make()) == case.refused
    severity = {rule.id: rule.severity for rule in RULES}[case.rule]
    assert severity == "error" or not case.refused


def test_every_rule_has_a_case_or_an_info_test():
    tested = {case.rule for case in CASES.values()}
    assert {rule.id for rule in RULES if rule.severity != "info"} == tested


# What is right: no errors, no warnings.

RIGHT = {
    "fp16": graphs.clean,
    "fp32": one_conv,
    "negative axis": lambda: one_conv(weight_axis=-4),
    "scale of shape (1,)": lambda: one_conv(np.full(1, 0.05, F32), np.zeros(1, I8)),
    "gemm": lambda: graphs.matrix_product("Gemm", 1),
    "gemm, transB": lambda: graphs.matrix_product("Gemm", 0, transB=1),
    "matmul": lambda: graphs.matrix_product("MatMul", 1),
    "transposed conv": lambda: graphs.transposed_conv(1),
    "residual": lambda: graphs.residual(main=False, skip=True),
    "residual behind a split": lambda: graphs.residual(main=False, skip=True, split=True),
    "pad behind the pair": lambda: graphs.padded(before=True),
    "concat": lambda: graphs.concatenated(0.05, 0.05, 0.05),
    "concat without a pair behind it": lambda: graphs.concatenated(0.05, 0.05, None),
    "equal scales around a pool": lambda: graphs.requantized(0.05, 0.05, "MaxPool"),
    "scaled skip": graphs.scaled_skip,
    "scalar input": graphs.scalar_input,
    "float head": lambda: graphs.float_conv(last=True),
    "coarse-fine split in float": lambda: graphs.split("conv"),
    "identity split in float": lambda: graphs.split("mul"),
    "GELU by tanh": lambda: graphs.gelu_by_tanh(skip=True),
    "pointwise between": lambda: graphs.island("Sigmoid", "Abs", "Sqrt"),
}


@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_no_false_alarm(make):
    assert rules(findings(make())) == []


@pytest.mark.slow
@needs_rtx
@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_what_is_right_builds(make):
    assert not refused_by_rtx(make())


def test_a_clean_fp16_graph_has_no_finding_at_all():
    report = findings(graphs.clean())
    assert report.findings == ()
    assert (report.layers, report.int8_layers) == (2, 2)
    assert not report.has_errors


INFOS = {
    "codes as input": ("QDQ014", "int8 input", "codes come in as x, scale 0.05"),
    "split": ("QDQ112", "split", "from the same input, comes in as float"),
    "narrow": ("QDQ204", "narrow", "^Conv 3 -> 8$"),
    "fp32 rest": ("QDQ205", "conv", "FP32 around 1 of 1 INT8 layers"),
    "float head": ("QDQ206", "head", "^Conv in float$"),
    "float codes": ("QDQ303", "float codes", "in float behind Q and DQ"),
}


def info_graph(name: str) -> onnx.ModelProto:
    g = QdqGraph((1, 3, 8, 8) if name == "narrow" else graphs.IMAGE)
    if name == "int8 input":
        g = QdqGraph(kind=TensorProto.INT8)
        return g.model(g.conv(g.dq("x")))
    if name == "narrow":
        return g.model(g.conv(g.qdq("x"), g.weight(8, 3, 3, 3)))
    if name == "float codes":
        floats = g.constant(np.ones((C, C, 3, 3), F32))
        weight = g.qdq(floats, np.full(C, 0.01, F32), np.zeros(C, I8), axis=0)
        return g.model(g.conv(g.qdq("x"), weight))
    return {
        "split": lambda: graphs.split("conv"),
        "conv": one_conv,
        "head": lambda: graphs.float_conv(last=True),
    }[name]()


@pytest.mark.parametrize(("rule", "graph", "got"), INFOS.values(), ids=INFOS)
def test_infos(rule, graph, got):
    report = findings(info_graph(graph))
    assert rules(report) == []
    assert [re.search(got, f.got) is not None for f in report.findings if f.rule == rule] == [True]
    assert {r.id for r in RULES if r.severity == "info"} == {case[0] for case in INFOS.values()}


def test_channels_of_grouped_and_transposed_layers():
    g = QdqGraph((1, 32, 8, 8))
    depthwise = g.node("Conv", g.qdq("x"), g.weight(32, 1, 3, 3), group=32)
    g.node("ConvTranspose", g.qdq(depthwise), g.weight(32, 4, 2, 2, axis=1), group=2)
    narrow = [f for f in findings(g.model(g.nodes[-1].output[0])).findings if f.rule == "QDQ204"]
    assert [f.got for f in narrow] == ["ConvTranspose 32 -> 8"]  # 32 depthwise channels are enough


def test_a_layer_read_twice_keeps_its_pair_before_the_sum():
    """With another reader of the layer's codes, the pair saves more than the fusion would."""
    g = QdqGraph()
    x = g.qdq(g.block("x"))
    y = g.qdq(g.conv(x), 0.07)
    total = g.node("Relu", g.node("Add", y, x))
    report = findings(g.model(g.conv(g.qdq(total, 0.1)), g.conv(y)))
    assert rules(report) == []


def test_casts_are_looked_through():
    """A scale kept in FP32 inside an FP16 rest: casts stand around its pair."""
    g = QdqGraph(kind=TensorProto.FLOAT16)
    weight = g.weight(C, C, 3, 3, scale=np.full(C, 0.01, F16))
    y = g.conv(g.qdq("x", F16(0.05)), weight)
    pair = g.qdq(g.node("Cast", y, to=TensorProto.FLOAT), 1e-6)
    y = g.node("Relu", g.node("Cast", pair, to=TensorProto.FLOAT16))
    report = findings(g.model(g.conv(g.qdq(y, F16(0.05)), weight), kind=TensorProto.FLOAT16))
    assert rules(report, "error", "warning", "info") == ["QDQ101"]


def test_shape_arithmetic_is_no_island():
    g = QdqGraph((1, C, 8, 8))
    x = g.block("x")
    batch = g.node("Gather", g.node("Shape", x), g.constant(np.array([0])), axis=0)
    shape = g.node("Concat", batch, g.constant(np.array([C * 64])), axis=0)
    flat = g.qdq(g.node("Reshape", x, shape))
    report = findings(g.model(g.node("Gemm", flat, g.weight(C * 64, C, axis=1))))
    assert rules(report) == []


def test_a_float_sum_before_a_float_node_is_right():
    g = QdqGraph()
    x = g.block("x")
    total = g.node("Add", g.conv(g.qdq(x)), x)
    ones = g.constant(np.ones(8, F32))
    normalized = g.node("LayerNormalization", total, ones, axis=-1)
    assert rules(findings(g.model(g.block(normalized)))) == ["QDQ203"]


def test_attention_between_float_tensors_is_one_island():
    g = QdqGraph((1, 4, C))
    x = g.node("MatMul", g.qdq("x"), g.weight(C, C, axis=1))
    scores = g.node("Softmax", g.node("MatMul", x, g.node("Transpose", x, perm=[0, 2, 1])))
    y = g.node("MatMul", scores, x)
    model = g.model(g.node("MatMul", g.qdq(y), g.weight(C, C, axis=1)))
    report = findings(model)
    assert rules(report) == ["QDQ203"]
    assert report.findings[0].got.count("MatMul") == 2
