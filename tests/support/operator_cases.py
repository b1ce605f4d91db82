"""One-node graphs for every operator that reptrt.execute.torchops can run."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray


def data(*shape: int, seed: int = 0, low: float = -3.0, high: float = 3.0) -> Array:
    """Return float32 numbers in [low, high), the same for every call with these arguments."""
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, dtype=np.int64)


@dataclass(frozen=True)
class Case:
    """One node with its computed inputs, constant inputs, attributes and opset."""

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
    Case("Celu", (X,)),
    Case("Celu", (X,), attrs={"alpha": 1.5}, name="attrs"),
    Case("Selu", (X,)),
    Case("Selu", (X,), attrs={"alpha": 1.5, "gamma": 0.9}, name="attrs"),
    Case("Softsign", (X,)),
    Case("ThresholdedRelu", (X,), attrs={"alpha": 0.7}),
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
    *(
        Case("CumSum", (X,), (axis,), attrs, name=name)
        for name, axis, attrs in (
            ("plain", ints(2).reshape(()), {}),
            ("vector", ints(-1), {"exclusive": 1}),
            ("reverse", ints(1).reshape(()), {"reverse": 1}),
            ("both", ints(1).reshape(()), {"reverse": 1, "exclusive": 1}),
        )
    ),
    Case("CumSum", (X, ints(1).reshape(())), name="computed"),
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

WHERE = np.random.default_rng(0).permuted(
    np.tile(np.arange(-6, 0), (3, 4, 5, 1)).swapaxes(2, 3), axis=2
)  # (3, 4, 6, 5), each row of axis 2 once, counted from the end
PLACES = np.array([[0, 3], [2, -1], [1, 0]])
AGAIN = np.array([[1], [0], [1], [-2]])
TIES = np.round(X)
INDEXING = [
    Case("GatherElements", (X,), (WHERE,), {"axis": 2}),
    Case("GatherElements", (X, WHERE[:, :2]), attrs={"axis": -2}, name="computed"),
    Case("ScatterElements", (X,), (WHERE, data(3, 4, 6, 5, seed=1)), {"axis": 2}),
    *(
        Case(
            "ScatterElements",
            (X,),
            (np.abs(WHERE) % 2, data(3, 4, 6, 5, seed=1)),
            {"axis": 2, "reduction": reduction},
            opset=18,
            name=reduction,
        )
        for reduction in ("add", "mul", "min", "max")
    ),
    Case("GatherND", (X,), (PLACES,)),
    Case("GatherND", (X, PLACES[:, None]), name="computed"),
    Case("GatherND", (X,), (np.array([[0, 1, 2, 3], [2, -4, -1, 0]]),), name="elements"),
    Case("ScatterND", (X, PLACES, data(3, 6, 5, seed=1)), name="computed"),
    Case("ScatterND", (X,), (PLACES, data(3, 6, 5, seed=1))),
    Case("ScatterND", (X,), (np.array([[0, 1, 2, 3], [2, -4, -1, 0]]), data(2)), name="elements"),
    *(
        Case(
            "ScatterND",
            (X,),
            (AGAIN, data(4, 4, 6, 5, seed=1)),
            {"reduction": reduction},
            opset=18,
            name=reduction,
        )
        for reduction in ("add", "mul", "min", "max")
    ),
    Case("TopK", (X,), (ints(3),), outputs=2),
    Case("TopK", (X,), (ints(2),), {"axis": 1, "largest": 0}, outputs=2, name="smallest"),
    Case("TopK", (TIES,), (ints(4),), {"axis": 2}, outputs=2, name="ties"),
    Case("TopK", (X, ints(5)), outputs=2, name="computed"),
]

GRID = data(3, 7, 4, 2, low=-1.3, high=1.3)
SAMPLING = [
    *(
        Case("GridSample", (X,), (GRID,), {"mode": mode, "padding_mode": padding}, name=name)
        for mode in ("bilinear", "nearest", "bicubic")
        for padding in ("zeros", "border", "reflection")
        for name in [f"{mode}-{padding}"]
    ),
    Case("GridSample", (X, GRID), attrs={"align_corners": 1}, name="corners"),
    Case("GridSample", (X,), (GRID,), {"mode": "linear"}, opset=20, name="opset20"),
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

CASES = [
    *(*UNARY, *BINARY, *LAYERS, *REDUCTIONS, *SHAPES),
    *(*INDEXING, *SAMPLING, *QUANTIZE, *RESIZE),
]


def case_id(case: Case) -> str:
    return f"{case.op}-{case.name}" if case.name else case.op
