"""Every operator against onnxruntime, in both precisions, and whatever the order of a batch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from reptrt.errors import RewriteError
from reptrt.torchgraph import TorchGraph
from reptrt.torchops import OPERATORS
from tests.helpers import ort_run

Array = np.ndarray


def data(*shape: int, seed: int = 0, low: float = -3.0, high: float = 3.0) -> Array:
    """Return float32 numbers in [low, high), the same for every call with these arguments."""
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, dtype=np.int64)


@dataclass(frozen=True)
class Case:
    """One node: its computed inputs, its constant ones, attributes, opset."""

    op: str
    x: tuple[Array, ...]
    constants: tuple[Array | None, ...] = ()
    attrs: dict[str, Any] = field(default_factory=dict)
    opset: int = 17
    outputs: int = 1
    name: str = ""

    def model(self) -> onnx.ModelProto:
        names = [f"x{i}" for i in range(len(self.x))]
        consts = [f"c{i}" if c is not None else "" for i, c in enumerate(self.constants)]
        outputs = [f"y{i}" for i in range(self.outputs)]
        node = helper.make_node(self.op, names + consts, outputs, name="node", **self.attrs)
        inputs = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(x.dtype), [None] * x.ndim
            )
            for name, x in zip(names, self.x, strict=True)
        ]
        graph = helper.make_graph(
            [node],
            self.op,
            inputs,
            [onnx.ValueInfoProto(name=name) for name in outputs],
            [
                numpy_helper.from_array(c, name)
                for c, name in zip(self.constants, consts, strict=True)
                if c is not None
            ],
        )
        opsets = [helper.make_opsetid("", self.opset)]
        return onnx.shape_inference.infer_shapes(
            helper.make_model(graph, opset_imports=opsets, ir_version=9)
        )

    def feed(self) -> dict[str, Array]:
        return {f"x{i}": np.asarray(x) for i, x in enumerate(self.x)}


X = data(3, 4, 6, 5)
POSITIVE = data(3, 4, 6, 5, low=0.1, high=4.0)
WIDE = data(3, 4, 6, 5, low=-60.0, high=60.0)
INTS = np.arange(-7, 8, dtype=np.int64).reshape(3, 5)
BOOLS = X > 0

UNARY = [
    *(Case(op, (X,)) for op in ("Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "Neg", "Sign", "Sin")),
    *(Case(op, (X,)) for op in ("Identity", "HardSigmoid", "LeakyRelu", "Elu", "Round", "Relu")),
    *(Case(op, (POSITIVE,)) for op in ("Log", "Sqrt", "Reciprocal")),
    *(Case(op, (WIDE,)) for op in ("Sigmoid", "Tanh", "Softplus")),
    Case("Mish", (WIDE,), opset=18),
    Case("HardSwish", (WIDE,)),
    Case("Gelu", (X,), opset=20),
    Case("Gelu", (X,), attrs={"approximate": "tanh"}, opset=20, name="tanh"),
    Case("HardSigmoid", (X,), attrs={"alpha": 0.3, "beta": 0.1}, name="attrs"),
    Case("LeakyRelu", (X,), attrs={"alpha": 0.3}, name="attrs"),
    Case("Elu", (X,), attrs={"alpha": 0.7}, name="attrs"),
    Case("PRelu", (X,), (data(4, 1, 1, seed=1),)),
    Case("Clip", (X,), (np.float32(-1), np.float32(2))),
    Case("Clip", (X,), (None, np.float32(2)), name="max"),
    Case("Clip", (X,), (np.float32(-1),), name="min"),
    Case("Clip", (X,), name="none"),
    Case("Clip", (X, np.float32(-1), np.float32(1)), name="computed"),
    Case("Clip", (X,), attrs={"min": 0.0, "max": 2.0}, opset=6, name="opset6"),
    Case("Clip", (X,), attrs={"min": -0.5}, opset=6, name="opset6-min"),
    Case("Not", (BOOLS,)),
    Case("Dropout", (X,)),
    Case("Dropout", (X,), (np.float32(0.5), np.bool_(False)), name="inference"),
    Case("Cast", (X,), attrs={"to": TensorProto.INT64}),
    Case("Cast", (INTS,), attrs={"to": TensorProto.FLOAT}, name="float"),
    Case("Cast", (BOOLS,), attrs={"to": TensorProto.FLOAT}, name="from-bool"),
    Case("CastLike", (INTS,), (np.float32(0),)),
    Case("Softmax", (X,)),
    Case("Softmax", (X,), attrs={"axis": 1}, name="axis"),
    Case("Softmax", (X,), opset=11, name="opset11"),
    Case("LogSoftmax", (X,), attrs={"axis": 1}),
]

BINARY = [
    *(Case(op, (X, data(4, 1, 5, seed=1))) for op in ("Add", "Sub", "Mul", "Div", "Min", "Max")),
    *(Case(op, (X,), (data(4, 1, 1, seed=1),), name="const") for op in ("Add", "Mul")),
    *(Case(op, (INTS, ints(3, -3, 2, -2, 5)), name="int") for op in ("Div", "Mod", "Mul")),
    *(Case(op, (np.round(X), np.round(X[:, :1]))) for op in ("Equal", "Less", "Greater")),
    *(Case(op, (np.round(X), np.round(X[:, :1]))) for op in ("LessOrEqual", "GreaterOrEqual")),
    *(Case(op, (BOOLS, BOOLS[:, ::-1].copy())) for op in ("And", "Or", "Xor")),
    Case("Mod", (X, data(5, seed=2)), attrs={"fmod": 1}),
    Case("Pow", (POSITIVE,), (np.float32(2.3),)),
    Case("Pow", (X,), (np.float32(2),), name="square"),
    Case("Pow", (POSITIVE, data(4, 1, 1, seed=3)), name="computed"),
    Case("Where", (BOOLS, X, data(5, seed=4))),
    Case("Sum", (X, X[:1], X[:, :1])),
    Case("Max", (X, X[:1], X[:, :1]), name="three"),
]

C1, C2 = data(3, 6, 11), data(3, 6, 9, 8)
LAYERS = [
    Case("Conv", (C2,), (data(8, 6, 3, 3, seed=1), data(8, seed=2))),
    Case("Conv", (C2,), (data(8, 6, 1, 1, seed=1),), {"strides": [2, 2]}, name="1x1"),
    Case(
        "Conv", (C2,), (data(6, 1, 3, 3, seed=1),), {"group": 6, "pads": [1] * 4}, name="depthwise"
    ),
    Case("Conv", (C1,), (data(4, 3, 3, seed=1),), {"group": 2, "dilations": [2]}, name="1d"),
    Case("Conv", (C1,), (data(4, 6, 4, seed=1),), {"auto_pad": "SAME_UPPER"}, name="1d-same"),
    Case("Conv", (data(2, 3, 5, 6, 7),), (data(4, 3, 2, 3, 3, seed=1),), name="3d"),
    Case("Conv", (C2, data(8, 6, 3, 3, seed=1)), name="computed-weight"),
    Case("ConvTranspose", (C2,), (data(6, 4, 3, 3, seed=1), data(4, seed=2)), {"strides": [2, 2]}),
    Case(
        "ConvTranspose",
        (C2,),
        (data(6, 2, 4, 4, seed=1),),
        {"strides": [2, 2], "pads": [1, 0, 2, 1], "output_padding": [1, 1], "group": 2},
        name="asymmetric",
    ),
    Case(
        "ConvTranspose",
        (C1,),
        (data(6, 4, 3, seed=1),),
        {"pads": [1, 1], "dilations": [2]},
        name="1d",
    ),
    Case("BatchNormalization", (C2,), tuple(data(6, seed=i, low=0.1) for i in range(4))),
    Case("InstanceNormalization", (C2,), (data(6, seed=1), data(6, seed=2)), {"epsilon": 1e-3}),
    Case("LayerNormalization", (C2,), (data(8, seed=1), data(8, seed=2))),
    Case("LayerNormalization", (C2,), (data(9, 8, seed=1),), {"axis": 2}, name="axis"),
    Case("MatMul", (data(5, 7),), (data(7, 6, seed=1),)),
    Case("MatMul", (data(3, 4, 5, 7),), (data(7, 6, seed=1),), name="4d"),
    Case("MatMul", (data(3, 4, 5), data(3, 5, 2, seed=1)), name="batched"),
    Case("Gemm", (data(5, 7),), (data(6, 7, seed=1), data(6, seed=2)), {"transB": 1}),
    Case("Gemm", (data(5, 7),), (data(7, 6, seed=1),), name="no-bias"),
    Case(
        "Gemm",
        (data(7, 5),),
        (data(7, 6, seed=1), data(5, 1, seed=2)),
        {"transA": 1, "alpha": 0.5, "beta": 2.0},
        name="scaled",
    ),
    Case("GlobalAveragePool", (C2,)),
    Case("GlobalMaxPool", (C2,)),
    Case("MaxPool", (C1,), attrs={"kernel_shape": [3], "strides": [2], "pads": [1, 1]}, name="1d"),
    Case("AveragePool", (C1,), attrs={"kernel_shape": [3], "pads": [0, 2]}, name="1d"),
    Case(
        "AveragePool", (C2,), attrs={"kernel_shape": [3, 3], "auto_pad": "SAME_LOWER"}, name="same"
    ),
    Case("MaxPool", (C2,), attrs={"kernel_shape": [2, 2], "auto_pad": "VALID"}, name="valid"),
]

REDUCTIONS = [
    *(
        Case(f"Reduce{kind}", (X,), attrs={"axes": [2, 3], "keepdims": 0}, opset=11, name="attr")
        for kind in ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "SumSquare")
    ),
    *(
        Case(f"Reduce{kind}", (X,), (ints(-1, 1),), opset=18, name="input")
        for kind in ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "SumSquare")
    ),
    Case("ReduceMean", (X,), opset=18, name="all"),
    Case("ReduceMean", (X, ints(2, 3)), opset=18, name="computed"),
    Case("ReduceSum", (X,), attrs={"noop_with_empty_axes": 1}, opset=18, name="noop"),
    Case("ArgMax", (X,), attrs={"axis": 1}),
    Case("ArgMax", (X,), attrs={"axis": -1, "keepdims": 0}, name="last"),
    Case("ArgMin", (X,)),
]

SHAPES = [
    Case("Reshape", (X,), (ints(0, -1),)),
    Case("Reshape", (X,), (ints(6, 0, -1),), name="zero-inside"),
    Case("Reshape", (X, ints(6, -1)), name="computed"),
    Case("Reshape", (data(0, 4),), (ints(3, 0),), {"allowzero": 1}, name="allowzero"),
    Case("Flatten", (X,)),
    Case("Flatten", (X,), attrs={"axis": 0}, name="all"),
    Case("Flatten", (X,), attrs={"axis": -1}, name="negative"),
    Case("Transpose", (X,)),
    Case("Transpose", (X,), attrs={"perm": [0, 2, 3, 1]}, name="perm"),
    Case("Squeeze", (X[:, :1],), (ints(1),)),
    Case("Squeeze", (X[:1, :1],), name="all"),
    Case("Squeeze", (X[:, :1],), attrs={"axes": [1]}, opset=11, name="opset11"),
    Case("Unsqueeze", (X,), (ints(-1, 0),)),
    Case("Unsqueeze", (X,), attrs={"axes": [2]}, opset=11, name="opset11"),
    Case("Concat", (X, X[:, :2]), attrs={"axis": 1}),
    Case("Concat", (X, X), attrs={"axis": -1}, name="last"),
    Case("Split", (X,), (ints(1, 3),), {"axis": 1}, outputs=2),
    Case("Split", (X,), attrs={"axis": 1}, outputs=2, name="equal"),
    Case("Split", (X,), attrs={"axis": 3, "num_outputs": 3}, opset=18, outputs=3, name="uneven"),
    Case("Split", (X,), attrs={"axis": 3, "split": [2, 3]}, opset=11, outputs=2, name="opset11"),
    Case("Slice", (X,), (ints(1), ints(3))),
    Case("Slice", (X,), (ints(1, -4), ints(99, -1), ints(1, -2), ints(2, 1)), name="steps"),
    Case("Slice", (X,), (ints(-1), ints(-(2**63)), ints(2), ints(-1)), name="reverse"),
    Case("Slice", (X,), (ints(4), ints(2), ints(2), ints(1)), name="empty"),
    Case("Slice", (X,), attrs={"starts": [1], "ends": [5], "axes": [2]}, opset=9, name="opset9"),
    Case("Slice", (X, ints(0), ints(2), ints(1)), name="computed"),
    Case("Gather", (X,), (ints(2, 0, -1),), {"axis": 2}),
    Case("Gather", (X,), (np.array(-1),), {"axis": 1}, name="scalar"),
    Case("Gather", (X,), (np.array([[0, 1], [2, -1]]),), name="matrix"),
    Case("Pad", (X,), (ints(0, 0, 1, 2, 0, 0, 3, 0), np.float32(1.5))),
    Case("Pad", (X,), (ints(0, 1, -1, 0, 1, 0, 0, 2),), name="all-axes"),
    Case("Pad", (X,), (ints(0, 0, 1, 2, 0, 0, 3, 0),), {"mode": "reflect"}, name="reflect"),
    Case("Pad", (X,), (ints(0, 0, 1, 0, 0, 0, 3, 0),), {"mode": "edge"}, name="edge"),
    Case("Pad", (X,), (ints(1, 2), None, ints(-1)), opset=18, name="axes"),
    Case("Pad", (X,), attrs={"pads": [0, 0, 1, 1] * 2, "value": 2.0}, opset=10, name="opset10"),
    Case("Pad", (X, ints(0, 0, 1, 2, 0, 0, 3, 0), np.float32(0.5)), name="computed"),
    Case("Shape", (X,)),
    Case("Shape", (X,), attrs={"start": 1, "end": -1}, name="part"),
    Case("Size", (X,)),
    Case("ConstantOfShape", (ints(2, 3),)),
    Case(
        "ConstantOfShape",
        (ints(2, 3),),
        attrs={"value": numpy_helper.from_array(ints(7), "v")},
        name="value",
    ),
    Case("Expand", (X[:, :1],), (ints(4, 1, 1),)),
    Case("Expand", (X[:, :1],), (ints(2, 3, 4, 6, 5),), name="new-axis"),
    Case("Tile", (X,), (ints(1, 2, 1, 3),)),
    Case("Range", (np.array(3), np.array(17), np.array(4))),
    Case("Range", (np.float32(1), np.float32(-2), np.float32(-0.5)), name="float"),
    Case("DepthToSpace", (data(2, 12, 3, 4),), attrs={"blocksize": 2}),
    Case("DepthToSpace", (data(2, 12, 3, 4),), attrs={"blocksize": 2, "mode": "CRD"}, name="CRD"),
    Case("SpaceToDepth", (data(2, 3, 4, 6),), attrs={"blocksize": 2}),
]

SCALE, SCALES = np.float32(0.05), data(4, low=0.01, high=0.1)
QUANTIZE = [
    Case("QuantizeLinear", (X,), (SCALE, np.int8(0))),
    Case("QuantizeLinear", (X,), (SCALE,), name="default-uint8"),
    Case("QuantizeLinear", (X,), (SCALE, np.uint8(131)), name="uint8"),
    Case("QuantizeLinear", (X,), (SCALES, np.zeros(4, np.int8)), {"axis": 1}, name="per-channel"),
    Case("QuantizeLinear", (X,), (SCALES[:3], np.ones(3, np.int8)), {"axis": 0}, name="axis0"),
    Case(
        "QuantizeLinear",
        (X,),
        (SCALE,),
        {"output_dtype": TensorProto.INT8},
        opset=21,
        name="opset21",
    ),
    Case("DequantizeLinear", (np.arange(-128, 128, dtype=np.int8),), (SCALE, np.int8(3))),
    Case("DequantizeLinear", (np.arange(256, dtype=np.uint8),), (SCALE,), name="no-zero-point"),
    Case(
        "DequantizeLinear",
        (np.arange(-60, 60, dtype=np.int8).reshape(3, 4, 10),),
        (SCALES, np.arange(4, dtype=np.int8)),
        {"axis": 1},
        name="per-channel",
    ),
    Case("DequantizeLinear", (np.arange(-5, 5, dtype=np.int32),), (SCALE,), name="int32"),
]


def resize(
    scales: Any = None, sizes: Any = None, opset: int = 17, x: Array = X, **attrs: Any
) -> Case:
    scale = None if scales is None else np.array(scales, np.float32)
    size = None if sizes is None else ints(*sizes)
    name = "-".join(str(v) for v in (*(scales or sizes), *attrs.values()))
    return Case("Resize", (x,), (None, scale, size), attrs, opset, name=name)


ASYMMETRIC = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
RESIZE = [
    resize([1, 1, 2, 2], **ASYMMETRIC),
    resize([1, 1, 2, 3]),
    resize([1, 1, 1.7, 0.7], **ASYMMETRIC),
    resize([1, 1, 1.7, 0.7]),
    resize(sizes=[3, 4, 11, 3], nearest_mode="round_prefer_ceil"),
    resize(sizes=[3, 4, 11, 3], nearest_mode="ceil"),
    resize(sizes=[3, 4, 11, 3], coordinate_transformation_mode="align_corners"),
    resize(sizes=[3, 8, 11, 3]),
    resize(sizes=[11, 3], opset=18, axes=[2, 3]),
    resize([1, 1, 2, 2], mode="linear"),
    resize([1, 1, 1.7, 0.7], mode="linear"),
    resize(sizes=[3, 4, 11, 3], mode="linear", coordinate_transformation_mode="pytorch_half_pixel"),
    resize(sizes=[3, 4, 11, 3], mode="linear", coordinate_transformation_mode="align_corners"),
    resize([1, 1, 2.5], x=C1, mode="linear"),
    Case("Resize", (X,), (np.array([1, 1, 2, 2], np.float32),), opset=10, name="opset10"),
    Case("Upsample", (X,), (np.array([1, 1, 2, 3], np.float32),), opset=9),
]

CASES = [*UNARY, *BINARY, *LAYERS, *REDUCTIONS, *SHAPES, *QUANTIZE, *RESIZE]


def case_id(case: Case) -> str:
    return f"{case.op}-{case.name}" if case.name else case.op


def torch_run(
    case: Case, double: bool = False, feed: dict[str, Array] | None = None
) -> list[Array]:
    graph = TorchGraph(case.model())
    inputs = {name: torch.from_numpy(np.asarray(x)) for name, x in (feed or case.feed()).items()}
    if double:
        graph = graph.double()
    outputs = graph.run(inputs, graph.output_names)
    return [outputs[name].numpy() for name in graph.output_names]


def assert_equals_onnxruntime(case: Case) -> None:
    """Equal shapes, types and values: 5e-6 relative to the largest output covers float32 sums."""
    expected = list(ort_run(case.model(), case.feed(), optimize=False).values())
    for got, want in zip(torch_run(case), expected, strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        scale = max(1.0, float(np.abs(want).max(initial=0)))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-6 * scale)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_operator_equals_onnxruntime(case: Case) -> None:
    assert_equals_onnxruntime(case)


def test_every_operator_has_a_case() -> None:
    assert {case.op for case in CASES} == set(OPERATORS)


FLOAT_CASES = [
    case
    for case in CASES
    if all(x.dtype == np.float32 for x in case.x) and not {"Cast", "Resize"} & {case.op}
]


@pytest.mark.parametrize("case", FLOAT_CASES, ids=case_id)
def test_double_precision_refines_the_same_result(case: Case) -> None:
    feed = {name: x.astype(np.float64) for name, x in case.feed().items()}
    for single, double in zip(torch_run(case), torch_run(case, True, feed), strict=True):
        if single.dtype == np.float32 and not case.op.startswith("ConstantOfShape"):
            assert double.dtype == np.float64
        if case.op != "QuantizeLinear":  # a code may differ where x / scale is near a tie
            scale = max(1.0, float(np.abs(double).max(initial=0)))
            np.testing.assert_allclose(single, double, rtol=1e-5, atol=5e-6 * scale)


def test_float64_is_computed_in_float64() -> None:
    # exp(1) in float32 differs from the float64 value in the eighth digit.
    case = Case("Exp", (np.ones(1, np.float32),))
    assert torch_run(case, double=True, feed={"x0": np.ones(1)})[0][0] == np.exp(np.float64(1))


BATCH = 7
ALONG_BATCH = {  # reads along the batch, or is given something that is no batch
    "Cast-from-bool",
    "Clip-computed",
    "Conv-computed-weight",
    "Gemm-scaled",
    "MatMul-batched",
    "Not",
    "CastLike",
    "Cast-float",
    "Conv-3d",
}
PER_IMAGE = [
    case
    for case in [*UNARY, *LAYERS, *RESIZE, *QUANTIZE[:4], *BINARY]
    if case_id(case) not in ALONG_BATCH and len(case.x) == 1 and case.x[0].dtype == np.float32
]


def _batch_shape(case: Case, large: bool) -> list[int]:
    """Return an odd-sized batch of the case's images, enlarged so that several threads share it."""
    shape = [BATCH, *case.x[0].shape[1:]]
    if case.op == "Resize" and any(c is not None and c.dtype == np.int64 for c in case.constants):
        return [3, *shape[1:]]  # the graph fixes the batch
    if large and len(shape) == 4 and case.op not in ("LayerNormalization", "MatMul", "Resize"):
        return [*shape[:2], 61, 43]
    return shape


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("case", PER_IMAGE, ids=case_id)
def test_an_image_gives_the_same_bits_anywhere_in_a_batch(case: Case, large: bool) -> None:
    x = data(*_batch_shape(case, large), seed=5, low=0.1)
    order = np.random.default_rng(0).permutation(len(x))
    (y,) = torch_run(case, feed={"x0": x})
    (moved,) = torch_run(case, feed={"x0": x[order]})
    np.testing.assert_array_equal(moved, y[order])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "sizes", [(5, 8, 1), (13, 10, 1), (46, 6, 2), (32, 1, 1), (70, 8, 1)], ids=str
)
def test_pointwise_convolutions_give_the_same_bits_anywhere_in_a_batch(
    sizes: tuple[int, int, int], threads: int, torch_threads: Callable[[int], None]
) -> None:
    # Uneven channel counts on one thread: torch's own convolution fails this.
    channels, filters, group = sizes
    torch_threads(threads)
    weight = data(filters, channels // group, 1, 1, seed=1)
    case = Case("Conv", (data(9, channels, 33, 5),), (weight, data(filters)), {"group": group})
    order = np.random.default_rng(1).permutation(9)
    (y,) = torch_run(case)
    (moved,) = torch_run(case, feed={"x0": case.x[0][order]})
    np.testing.assert_array_equal(moved, y[order])
    assert_equals_onnxruntime(case)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 7, 33])
@pytest.mark.parametrize(("inputs", "outputs"), [(7, 6), (100, 7), (256, 10), (48, 12)])
def test_a_row_of_a_matrix_product_is_the_same_in_any_batch(
    inputs: int, outputs: int, rows: int, threads: int, torch_threads: Callable[[int], None]
) -> None:
    torch_threads(threads)
    case = Case("Gemm", (data(40, inputs),), (data(outputs, inputs, seed=1),), {"transB": 1})
    (whole,) = torch_run(case)
    (part,) = torch_run(case, feed={"x0": case.x[0][:rows]})
    np.testing.assert_array_equal(part, whole[:rows])


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@st.composite
def windows(draw: st.DrawFn) -> dict[str, Any]:
    """Return the geometry of a two-dimensional window that fits a 9 x 8 image."""
    kernel = [draw(st.integers(1, 4)) for _ in range(2)]
    return {
        "kernel_shape": kernel,
        "strides": [draw(st.integers(1, 3)) for _ in range(2)],
        "pads": [draw(st.integers(0, kernel[i % 2] - 1)) for i in range(4)],
    }


AUTO_PADS = st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"])


def _auto(window: dict[str, Any], auto: str) -> dict[str, Any]:
    kept = {key: value for key, value in window.items() if key != "pads" or auto == "NOTSET"}
    return {**kept, "auto_pad": auto}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    windows(),
    AUTO_PADS,
    st.sampled_from([(4, 1), (6, 2), (4, 4)]),
    st.integers(1, 2),
    st.booleans(),
)
def test_conv_geometry(
    window: dict[str, Any], auto: str, sizes: tuple[int, int], dilation: int, bias: bool
) -> None:
    channels, group = sizes
    weight = data(2 * group, channels // group, *window["kernel_shape"], seed=1)
    attrs = {**_auto(window, auto), "group": group}
    if auto in ("NOTSET", "VALID"):
        attrs["dilations"] = [dilation, 1]
    constants = (weight, data(2 * group, seed=2)) if bias else (weight,)
    assert_equals_onnxruntime(Case("Conv", (data(2, channels, 9, 8),), constants, attrs))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(windows(), AUTO_PADS, st.booleans(), st.booleans())
def test_average_pool_geometry(
    window: dict[str, Any], auto: str, ceil: bool, include: bool
) -> None:
    attrs = {**_auto(window, auto), "count_include_pad": int(include)}
    if auto == "NOTSET":
        attrs["ceil_mode"] = int(ceil)
    assert_equals_onnxruntime(Case("AveragePool", (data(2, 3, 9, 8),), attrs=attrs, opset=19))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(windows(), AUTO_PADS, st.booleans(), st.integers(1, 2))
def test_max_pool_geometry(window: dict[str, Any], auto: str, ceil: bool, dilation: int) -> None:
    attrs = _auto(window, auto)
    if auto == "NOTSET":
        attrs["ceil_mode"] = int(ceil)
    if auto in ("NOTSET", "VALID"):
        attrs["dilations"] = [1, dilation]
    else:  # onnxruntime ignores dilations here, and fails where a stride exceeds its kernel
        attrs["strides"] = list(map(min, attrs["strides"], attrs["kernel_shape"]))
    assert_equals_onnxruntime(Case("MaxPool", (data(2, 3, 9, 8),), attrs=attrs, opset=19))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 12),
    st.sampled_from(["half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel"]),
    st.sampled_from(["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"]),
)
def test_nearest_resize_geometry(size: int, coordinates: str, rounding: str) -> None:
    case = resize(
        sizes=[3, 4, size, 10], coordinate_transformation_mode=coordinates, nearest_mode=rounding
    )
    assert_equals_onnxruntime(case)


REFUSED = {
    "cubic": (resize([1, 1, 2, 2], mode="cubic"), "Resize with mode cubic"),
    "antialias": (resize([1, 1, 2, 2], opset=18, antialias=1), "antialias 1"),
    "crop": (
        resize([1, 1, 2, 2], coordinate_transformation_mode="tf_crop_and_resize"),
        "tf_crop_and_resize",
    ),
    "asymmetric linear": (
        resize([1, 1, 2, 2], mode="linear", coordinate_transformation_mode="asymmetric"),
        "mode linear with coordinate_transformation_mode asymmetric",
    ),
    "indices": (
        Case("MaxPool", (X,), attrs={"kernel_shape": [2, 2]}, outputs=2),
        "MaxPool with 2 outputs in use",
    ),
    "training": (
        Case("Dropout", (X,), (np.float32(0.5), np.bool_(True))),
        "Dropout with training mode",
    ),
    "output_shape": (
        Case("ConvTranspose", (C2,), (data(6, 4, 3, 3),), {"output_shape": [20, 20]}),
        "auto_pad or output_shape",
    ),
    "wrap": (Case("Pad", (X,), (ints(0, 0, 1, 1, 0, 0, 1, 1),), {"mode": "wrap"}, 19), "mode wrap"),
    "string": (Case("Cast", (X,), attrs={"to": TensorProto.STRING}), "Cast with type STRING"),
    "block": (
        Case("DequantizeLinear", (INTS.astype(np.int8),), (SCALE,), {"block_size": 2}, 21),
        "DequantizeLinear with block_size 2",
    ),
    "fp8": (
        Case("QuantizeLinear", (X,), (SCALE,), {"output_dtype": TensorProto.FLOAT8E4M3FN}, 21),
        "QuantizeLinear with",
    ),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_a_form_that_cannot_be_run_is_named_before_anything_runs(refused: str) -> None:
    case, reason = REFUSED[refused]
    with pytest.raises(RewriteError, match=rf"1 nodes cannot be run: .*{reason}.*\(node\)"):
        TorchGraph(case.model())
