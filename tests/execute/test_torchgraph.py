"""The executor on small graphs: sub-graphs, hooks, memory, types, names, errors."""

import copy
import weakref
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional as F

from reptrt.core.errors import ConfigError, DataError, RewriteError
from reptrt.execute.torchgraph import TorchGraph, compute, exact_math
from reptrt.execute.torchops.program import Step
from reptrt.graph.net import net_from_model
from tests.support.helpers import ort_run


def model_of(
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray] | None = None,
    x_shape: tuple[Any, ...] = ("N", 6),
    x_type: int = TensorProto.FLOAT,
    outputs: tuple[str, ...] = ("y",),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "by_hand",
        [helper.make_tensor_value_info("x", x_type, x_shape)],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def chain() -> onnx.ModelProto:
    """Return x -> conv1 -> relu1 -> conv2 -> add (with relu1) -> y, images of (4, 5, 5)."""
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal((4, 4, 3, 3)).astype(np.float32) for name in ("w1", "w2.weight")
    }
    bias = {"b1": rng.standard_normal(4).astype(np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="conv1", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2.weight"], ["c2"], name="conv2", pads=[1] * 4),
        helper.make_node("Add", ["c2", "r1"], ["y"], name="add"),
    ]
    return model_of(nodes, {**weights, **bias}, x_shape=("N", 4, 5, 5))


@pytest.fixture
def graph() -> TorchGraph:
    return TorchGraph(chain())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(2))


def fail(*_: Any) -> Any:
    raise AssertionError("must not run")


def test_only_the_nodes_in_between_run(graph: TorchGraph, x: Tensor) -> None:
    # conv1 and relu1 lie before the given tensor, add behind the wanted one.
    replace = {"conv1": fail, "relu1": fail, "add": fail}
    result = graph.run({"r1": x}, ["c2"], replace=replace)
    expected = F.conv2d(x, graph.constants["w2.weight"], padding=1)
    torch.testing.assert_close(result["c2"], expected)
    assert list(result) == ["c2"]


def test_several_inputs_and_outputs(graph: TorchGraph, x: Tensor) -> None:
    result = graph.run({"c2": x, "r1": 2 * x}, ["y", "r1"])
    torch.testing.assert_close(result["y"], 3 * x)
    torch.testing.assert_close(result["r1"], 2 * x)


def test_a_given_output_of_a_split_is_kept() -> None:
    nodes = [
        helper.make_node("Split", ["x"], ["a", "b"], axis=1),
        helper.make_node("Sub", ["a", "b"], ["y"]),
    ]
    graph = TorchGraph(model_of(nodes))
    x, a = torch.arange(6.0).view(1, 6), torch.full((1, 3), 10.0)
    assert graph.run({"x": x, "a": a}, ["y"])["y"].tolist() == [[7, 6, 5]]


def test_a_constant_can_be_given_for_one_run(graph: TorchGraph, x: Tensor) -> None:
    weight = torch.zeros(4, 4, 3, 3)
    result = graph.run({"r1": x, "w2.weight": weight}, ["y"])
    torch.testing.assert_close(result["y"], x)
    assert graph.constants["w2.weight"].abs().sum() > 0


def test_overrides_change_what_readers_and_the_caller_see(graph: TorchGraph, x: Tensor) -> None:
    overrides = {"r1": lambda t: t + 1, "w2.weight": torch.zeros_like, "x": lambda t: t * 0}
    result = graph.run({"x": x}, ["r1", "y"], overrides=overrides)
    bias = graph.constants["b1"].clamp(min=0).view(1, 4, 1, 1)
    torch.testing.assert_close(result["r1"], (bias + 1).expand(3, 4, 5, 5))
    torch.testing.assert_close(result["y"], result["r1"])


def test_an_override_applies_once_to_a_given_tensor(graph: TorchGraph, x: Tensor) -> None:
    result = graph.run({"c2": x, "r1": x}, ["y"], overrides={"r1": lambda t: t + 1})
    torch.testing.assert_close(result["y"], 2 * x + 1)


def test_replace_runs_in_place_of_an_operator(graph: TorchGraph, x: Tensor) -> None:
    seen: list[Any] = []

    def conv(value: Tensor, weight: Tensor) -> Tensor:
        seen.extend([value, weight])
        return -value

    result = graph.run({"r1": x}, ["y"], replace={"conv2": conv})
    torch.testing.assert_close(result["y"], torch.zeros_like(x))
    torch.testing.assert_close(seen, [x, graph.constants["w2.weight"]])


def test_observers_see_each_tensor_once_and_need_no_outputs(graph: TorchGraph, x: Tensor) -> None:
    seen: dict[str, Tensor] = {}
    observe = {
        name: lambda value, name=name: seen.setdefault(name, value)
        for name in ("x", "c1", "r1", "w1")
    }
    assert graph.run({"x": x}, [], observe=observe, replace={"conv2": fail}) == {}
    assert set(seen) == {"x", "c1", "r1", "w1"}
    torch.testing.assert_close(seen["r1"], seen["c1"].relu())


def test_observers_see_the_overridden_value(graph: TorchGraph, x: Tensor) -> None:
    seen: list[Tensor] = []
    graph.run({"x": x}, [], observe={"r1": seen.append}, overrides={"r1": torch.zeros_like})
    assert not seen[0].any()


def test_tensors_are_dropped_after_their_last_reader() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["t0"])]
    nodes += [helper.make_node("Exp", [f"t{i}"], [f"t{i + 1}"]) for i in range(8)]
    graph = TorchGraph(model_of(nodes, outputs=("t8",)))
    alive: list[int] = []
    known: list[weakref.ref[Tensor]] = []

    def count(value: Tensor) -> None:
        known.append(weakref.ref(value))
        alive.append(sum(ref() is not None for ref in known))

    graph.run({"x": torch.zeros(1, 6)}, ["t8"], observe={f"t{i}": count for i in range(9)})
    assert max(alive) == 2  # a node's input and its output


def test_a_block_learns_through_overrides_and_replaced_nodes(graph: TorchGraph, x: Tensor) -> None:
    # An affine behind the replaced conv2 and an added offset on r1 must find the float block again.
    with torch.no_grad():
        target = graph.run({"r1": x}, ["y"])["y"]
    gain, offset = torch.full((4, 1, 1), 0.5, requires_grad=True), torch.ones(1, requires_grad=True)
    hooks: dict[str, Any] = {
        "replace": {"conv2": lambda v, w: gain * F.conv2d(v, w, padding=1)},
        "overrides": {"r1": lambda v: v + offset},
    }
    optimizer = torch.optim.Adam([gain, offset], lr=0.1)
    losses = []
    for _ in range(60):
        loss = (graph.run({"r1": x}, ["y"], **hooks)["y"] - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert not any(value.requires_grad for value in graph.constants.values())


# --- Q/DQ -----------------------------------------------------------------------------------------


def test_a_quantized_block_gives_the_codes_of_onnxruntime() -> None:
    # Scales are powers of two: both runtimes compute exactly, and many results are ties.
    rng = np.random.default_rng(3)
    constants: dict[str, Any] = {
        "sx": np.float32(2**-5),
        "sr": np.float32(2**-2),
        "sw": np.array([2**-7, 2**-6, 2**-8, 2**-7], np.float32),
        "zero": np.int8(0),
        "zeros": np.zeros(4, np.int8),
        "w": rng.integers(-127, 128, (4, 4, 3, 3), dtype=np.int8),
        "b": (rng.integers(-64, 64, 4) * 2**-6).astype(np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "sx", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "sx", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "sw", "zeros"], ["wd"], axis=0),
        helper.make_node("Conv", ["xd", "wd", "b"], ["c"], pads=[1] * 4),
        helper.make_node("Add", ["c", "xd"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "sr", "zero"], ["rq"]),
        helper.make_node("DequantizeLinear", ["rq", "sr", "zero"], ["y"]),
    ]
    arrays = {name: np.asarray(value) for name, value in constants.items()}
    model = model_of(nodes, arrays, ("N", 4, 5, 5), outputs=("xq", "rq", "y"))
    model = onnx.shape_inference.infer_shapes(model)
    x = rng.integers(-300, 300, (6, 4, 5, 5)).astype(np.float32) * 2**-6
    expected = ort_run(model, {"x": x}, optimize=False)
    got = TorchGraph(model).run({"x": torch.from_numpy(x)}, ["xq", "rq", "y"])
    for name, value in got.items():
        assert value.numpy().dtype == expected[name].dtype
        np.testing.assert_array_equal(value.numpy(), expected[name])
    assert len(np.unique(expected["rq"])) > 50


# --- shapes, types, names -------------------------------------------------------------------------


def test_shapes_are_computed_on_the_cpu_in_their_own_type() -> None:
    # Size by way of float: Shape -> Cast -> Mul 0.5 -> Cast -> Slice end; constants of a shape stay
    # float32 in a float64 module, as 3 x 0.5 must stay what ONNX says it is.
    nodes = [
        helper.make_node("Identity", ["one"], ["unit"]),
        helper.make_node("Shape", ["x"], ["n"], start=1),
        helper.make_node("Mul", ["n", "unit"], ["s"]),
        helper.make_node("Cast", ["s"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "half"], ["h"]),
        helper.make_node("Cast", ["h"], ["end"], to=TensorProto.INT64),
        helper.make_node("Slice", ["x", "zero", "end", "one"], ["p"]),
        helper.make_node("Mul", ["p", "scale"], ["y"]),
    ]
    constants = {
        "half": np.array([0.5], np.float32),
        "zero": np.array([0]),
        "one": np.array([1]),
        "scale": np.array([3.0], np.float32),
    }
    graph = TorchGraph(model_of(nodes, constants)).double()
    seen: list[Tensor] = []
    x = torch.ones(2, 6, dtype=torch.float64)
    result = graph.run({"x": x}, ["y"], observe={"h": seen.append})
    assert result["y"].tolist() == [[3.0] * 3] * 2
    assert (seen[0].dtype, result["y"].dtype) == (torch.float32, torch.float64)
    assert graph.constants["scale"].dtype == torch.float64


def test_a_copy_in_double_leaves_the_original_in_float() -> None:
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)]
    graph = TorchGraph(model_of(nodes, x_type=TensorProto.UINT8))
    double = copy.deepcopy(graph).double()
    x = torch.arange(6, dtype=torch.uint8).view(1, 6)
    assert (graph(x).dtype, double(x).dtype) == (torch.float32, torch.float64)


def test_cached_inputs_in_half_precision_are_computed_in_the_module_type(
    graph: TorchGraph, x: Tensor
) -> None:
    half = x.half()
    assert torch.equal(graph(half), graph(half.float()))


def test_fp16_graphs_are_computed_in_the_module_type() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Mul", ["h", "k"], ["y"]),
    ]
    graph = TorchGraph(model_of(nodes, {"k": np.array([0.1], np.float16)}))
    assert graph(torch.ones(1, 6)).dtype == torch.float32


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("value", numpy_helper.from_array(np.array([2.0], np.float32), "v"), 2.0),
        ("value_float", 2.0, 2.0),
        ("value_floats", [2.0] * 6, 2.0),
    ],
    ids=["tensor", "float", "floats"],
)
def test_constant_nodes_are_constants(field: str, value: Any, expected: float) -> None:
    nodes = [
        helper.make_node("Constant", [], ["k"], **{field: value}),
        helper.make_node("Mul", ["x", "k"], ["y"]),
    ]
    graph = TorchGraph(model_of(nodes))
    assert graph(torch.ones(1, 6)).tolist() == [[expected] * 6]
    assert graph.constants["k"].dtype == torch.float32


def test_an_output_may_be_a_constant_or_the_input() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    graph = TorchGraph(model_of(nodes, {"k": np.ones(2, np.float32)}, outputs=("y", "k")))
    result = graph.run({"x": -torch.ones(1, 6)}, ["k", "x", "y"])
    assert result["k"].tolist() == [1, 1]
    assert result["x"].tolist() == [[-1] * 6]


def test_a_net_is_not_changed_and_may_be_out_of_order() -> None:
    net = net_from_model(chain())
    net.graph.nodes.reverse()
    before = [node.name for node in net.graph.nodes]
    graph = TorchGraph(net)
    assert [node.name for node in net.graph.nodes] == before
    assert [step.name for step in graph.steps] == ["conv1", "relu1", "conv2", "add"]


def test_later_changes_of_a_net_are_not_seen() -> None:
    net = net_from_model(chain())
    constant = net.graph.tensors()["w1"]
    assert isinstance(constant, gs.Constant)
    constant.values = constant.values.copy()
    graph = TorchGraph(net)
    constant.values[...] = 0
    assert graph.constants["w1"].all()


def test_nodes_without_or_with_equal_names_can_be_told_apart() -> None:
    nodes = [
        helper.make_node("Neg", ["x"], ["a"], name="n"),
        helper.make_node("Neg", ["a"], ["b"], name="n"),
        helper.make_node("Neg", ["b"], ["y"]),
    ]
    graph = TorchGraph(model_of(nodes))
    assert [step.name for step in graph.steps] == ["n", "n_1", "y"]
    x = torch.ones(1, 6)
    assert torch.equal(graph.run({"x": x}, ["y"], replace={"n_1": lambda t: t})["y"], x)


def test_exact_math_turns_tf32_off_and_gives_the_flags_back() -> None:
    flags = torch.backends.cudnn
    before = (flags.allow_tf32, flags.deterministic, flags.benchmark, flags.enabled)
    with exact_math(torch.device("cuda")):
        assert (flags.allow_tf32, flags.deterministic) == (False, True)
        assert (flags.benchmark, flags.enabled) == (False, True)
    assert (flags.allow_tf32, flags.deterministic, flags.benchmark, flags.enabled) == before
    with exact_math(torch.device("cpu")):
        assert flags.allow_tf32 == before[0]


# --- errors ---------------------------------------------------------------------------------------


UNKNOWN = [  # TopK runs; what reads the others does not
    helper.make_node("LRN", ["x"], ["a"], name="norm", size=3),
    helper.make_node("LRN", ["a"], ["b"], name="norm2", size=3),
    helper.make_node("TopK", ["b", "k"], ["c", "i"], name="best"),
    helper.make_node("Fancy", ["c"], ["y"], name="own", domain="com.example"),
]


def test_all_unsupported_nodes_that_a_run_needs_are_named_in_one_line() -> None:
    graph = TorchGraph(model_of(UNKNOWN, {"k": np.array([1])}))
    message = (
        r"^graph by_hand: 3 nodes cannot be run: LRN \(norm, norm2\); com\.example\.Fancy \(own\); "
        r"expected .*replace these nodes, or cut the graph before.*$"
    )
    with pytest.raises(RewriteError, match=message):
        graph.run({"x": torch.zeros(2, 4, 5, 5)}, ["y"])
    with pytest.raises(RewriteError, match=r"1 nodes cannot be run: LRN \(norm\)"):
        graph.run({"x": torch.zeros(2, 4, 5, 5)}, [], observe={"a": fail})


def test_what_a_run_does_not_need_need_not_be_supported() -> None:
    graph = TorchGraph(model_of(UNKNOWN, {"k": np.array([1])}))
    b = torch.rand(2, 4, 5, 5)
    assert torch.equal(graph.run({"b": b}, ["c"])["c"], b.amax(-1, keepdim=True))
    assert graph.steps == ()  # every node needs one that cannot be run


# --- what stands in for outputs that cannot be compared -------------------------------------------


def tail_model(*tail: onnx.NodeProto, outputs: dict[str, int]) -> onnx.ModelProto:
    """Relu and Sigmoid of one input, and nodes behind them."""
    nodes = [
        helper.make_node("Relu", ["x"], ["boxes"], name="relu"),
        helper.make_node("Sigmoid", ["x"], ["scores"], name="sigmoid"),
        *tail,
    ]
    graph = helper.make_graph(
        nodes,
        "tail",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 6])],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [numpy_helper.from_array(np.array([3]), "k")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def branches() -> onnx.NodeProto:
    """An If: both branches read tensors around them, one of them through a node."""
    branch = [
        helper.make_graph(
            [helper.make_node(op, [source], ["taken"], name=op)],
            op,
            [],
            [helper.make_tensor_value_info("taken", TensorProto.FLOAT, None)],
        )
        for op, source in (("Neg", "boxes"), ("Identity", "scores"))
    ]
    return helper.make_node("If", ["flag"], ["y"], then_branch=branch[0], else_branch=branch[1])


FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
SHAPE_TAIL = [
    helper.make_node("Shape", ["x"], ["size"]),
    helper.make_node("Plugin", ["scores"], ["p"], domain="TRT"),
    helper.make_node("Reshape", ["p", "size"], ["y"]),
]
TAILS = {
    "a plain output": ([], {"scores": FLOAT}, ["scores"]),
    "an NMS": (
        [helper.make_node("NonMaxSuppression", ["boxes", "scores"], ["y"])],
        {"y": INT64},
        ["boxes", "scores"],
    ),
    "a plugin beside an output": (
        [helper.make_node("EfficientNMS_TRT", ["boxes", "scores"], ["n", "y"], domain="TRT")],
        {"scores": FLOAT, "y": FLOAT, "n": INT64},
        ["scores", "boxes"],
    ),
    "classes": (
        [helper.make_node("ArgMax", ["scores"], ["i"]), helper.make_node("Neg", ["i"], ["y"])],
        {"y": INT64},
        ["scores"],
    ),
    "a mask": (
        [
            helper.make_node("Greater", ["scores", "boxes"], ["m"]),
            helper.make_node("Cast", ["m"], ["y"], to=INT64),
        ],
        {"y": INT64},
        ["scores", "boxes"],
    ),
    "the best": (
        [helper.make_node("TopK", ["scores", "k"], ["v", "i"])],
        {"v": FLOAT, "i": INT64},
        ["v", "scores"],
    ),
    "a shape": (SHAPE_TAIL, {"y": FLOAT}, ["scores"]),
    "branches": (
        [helper.make_node("IsNaN", ["x"], ["flag"]), branches()],
        {"y": FLOAT},
        ["boxes", "scores"],
    ),
}


@pytest.mark.parametrize(("tail", "outputs", "expected"), TAILS.values(), ids=TAILS)
def test_what_is_compared(
    tail: list[onnx.NodeProto], outputs: dict[str, int], expected: list[str]
) -> None:
    graph = TorchGraph(tail_model(*tail, outputs=outputs))
    assert sorted(graph.comparable_names) == sorted(expected)
    x = torch.randn(2, 4, 6)
    values = graph.run({"x": x}, graph.comparable_names)
    assert all(values[name].is_floating_point() for name in expected)


def test_a_wrong_input_shape_is_refused(graph: TorchGraph) -> None:
    message = (
        r"input x: shape is \[2, 3, 5, 5\], expected \['N', 4, 5, 5\] \(the first axis is free\)"
    )
    with pytest.raises(DataError, match=message):
        graph(torch.zeros(2, 3, 5, 5))
    with pytest.raises(DataError, match=r"shape is \[4, 5, 5\]"):
        graph(torch.zeros(4, 5, 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": {"X": torch.zeros(1)}}, r"inputs: graph by_hand has no tensor 'X'; expected "),
        ({"outputs": ["c9"]}, r"outputs: graph by_hand has no tensor 'c9'; .*'c[12]'"),
        ({"observe": {"relu1": fail}}, r"observe: graph by_hand has no tensor 'relu1'; .*'r1'"),
        ({"overrides": {"w2": fail}}, r"overrides: graph by_hand has no tensor 'w2'; .*'w1'"),
        ({"replace": {"conv3": fail}}, r"replace: graph by_hand has no node 'conv3'; .*'conv2'"),
        ({"inputs": {"c2": torch.zeros(1, 4, 5, 5)}}, r"x is not among the inputs, but y needs it"),
    ],
    ids=["inputs", "outputs", "observe", "overrides", "replace", "missing"],
)
def test_unknown_and_missing_names_are_refused(
    graph: TorchGraph, x: Tensor, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        graph.run(**{"inputs": {"x": x}, "outputs": ["y"], **arguments})


def test_a_compiled_constant_cannot_be_changed() -> None:
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"], name="reshape")]
    graph = TorchGraph(model_of(nodes, {"shape": np.array([-1, 3])}))
    x, message = torch.zeros(1, 6), "constant shape is compiled into its operator"
    with pytest.raises(ConfigError, match=f"inputs: {message}"):
        graph.run({"x": x, "shape": torch.tensor([-1, 2])}, ["y"])
    with pytest.raises(ConfigError, match=f"overrides: {message}"):
        graph.run({"x": x}, ["y"], overrides={"shape": fail})
    assert graph.run({}, ["shape"])["shape"].tolist() == [-1, 3]


def flattening_net(batch: int | str) -> onnx.ModelProto:
    """Reshape to (1, -1), then MatMul: wrong or impossible for several images at once."""
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["r"], name="reshape"),
        helper.make_node("MatMul", ["r", "w"], ["y"], name="head"),
    ]
    constants = {"shape": np.array([1, -1]), "w": np.ones((6, 2), np.float32)}
    return model_of(nodes, constants, x_shape=(batch, 6))


def test_a_fixed_batch_size_inside_the_graph_is_explained() -> None:
    graph = TorchGraph(flattening_net("N"))
    assert graph(torch.ones(1, 6)).tolist() == [[6, 6]]
    message = r"^node head \(MatMul\): cannot run on shapes \[\[1, 12\], \[6, 2\]\] .*dynamic one$"
    with pytest.raises(RewriteError, match=message):
        graph(torch.ones(2, 6))


def test_a_declared_batch_size_is_run_again_and_again() -> None:
    graph = TorchGraph(flattening_net(1))
    x, seen = torch.arange(18.0).reshape(3, 6), []
    run = graph.run({"x": x}, ["y"], overrides={"x": torch.neg}, observe={"r": seen.append})
    assert run["y"].tolist() == [[-total, -total] for total in x.sum(1).tolist()]
    assert [value.tolist() for value in seen] == [(-x).tolist()]
    assert graph.run({"r": x}, ["y"])["y"].tolist() == [[t, t] for t in x.sum(1).tolist()]


def test_a_broken_last_batch_is_filled_up_and_cut() -> None:
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[0]),
        helper.make_node("Sub", ["x", "m"], ["y"]),
    ]
    graph = TorchGraph(model_of(nodes, {}, x_shape=(2, 1)))
    x = torch.tensor([[1.0], [3.0], [5.0]])
    assert graph(x).tolist() == [[-1], [1], [0]]


def test_forward_needs_exactly_one_input() -> None:
    model = model_of([helper.make_node("Add", ["x", "z"], ["y"])])
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 6]))
    with pytest.raises(ConfigError, match="has inputs x, z, expected one; use run"):
        TorchGraph(model)(torch.zeros(1, 6))


def test_running_out_of_device_memory_is_not_disguised() -> None:
    # Reconstruction catches it to go on with smaller caches.
    def greedy(_: Tensor) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    step = Step("conv", "Conv", ("x",), ("y",), greedy)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        compute(step, [torch.zeros(1)])


def test_errors_of_hooks_are_not_disguised(graph: TorchGraph, x: Tensor) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("own mistake")

    for hook in ({"overrides": {"c1": broken}}, {"replace": {"relu1": broken}}):
        with pytest.raises(RuntimeError, match="own mistake"):
            graph.run({"x": x}, ["y"], **hook)
