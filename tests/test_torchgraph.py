"""The executor: whole nets of both exporters, sub-graphs, hooks, gradients, memory, errors."""

import copy
import io
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from reptrt.errors import ConfigError, DataError, RewriteError
from reptrt.graph import net_from_model
from reptrt.torchgraph import TorchGraph
from tests.helpers import ort_run


class Residual(nn.Module):
    """Two residual blocks with batch norm, the second with a strided shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.down = nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(8, 12, 1, 2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        x = F.max_pool2d(F.relu(self.conv3(x) + self.down(x)), 3, 2, 1)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class SqueezeExcite(nn.Module):
    """A depthwise-separable block with squeeze-excite and the activations of mobile nets."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(3, 9, 3, padding=1, groups=3)
        self.reduce, self.expand = nn.Conv2d(9, 5, 1), nn.Conv2d(5, 9, 1)
        self.pointwise = nn.Conv2d(9, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.depthwise(x))
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        x = F.silu(self.pointwise(x * torch.sigmoid(gate)))
        return x.mean((2, 3)).softmax(1)


class Neck(nn.Module):
    """Upsample by a factor and to another map's size, concat, split, a reshape that keeps N."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.head = nn.Conv2d(6 + 8 + 8 + 4, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = F.leaky_relu(self.stem(x), 0.125)
        low = self.down(high).clamp(0, 6)
        doubled = F.interpolate(low, scale_factor=2.0, mode="nearest")
        resized = F.interpolate(low, size=high.shape[2:], mode="bilinear", align_corners=False)
        y = self.head(torch.cat([high, doubled, resized, self.up(low)], 1))
        box, rest = y.split([4, 3], 1)
        return torch.cat([box.sigmoid(), rest], 1).view(x.shape[0], 7, -1).permute(0, 2, 1)


def build(cls: Callable[[], nn.Module]) -> nn.Module:
    """Return a net with seeded weights and batch statistics that are not trivial."""
    torch.manual_seed(0)
    net = cls()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net.eval()


def exported(net: nn.Module, dynamo: bool) -> onnx.ModelProto:
    """Return the ONNX model of a net for inputs (N, 3, 16, 16), N dynamic."""
    x = torch.zeros(2, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters deprecate parts of themselves
        if dynamo:
            shapes = ({0: torch.export.Dim("N")},)
            program = torch.onnx.export(
                net, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False
            )
            assert program is not None
            return program.model_proto
        file = io.BytesIO()
        axes = {"x": {0: "N"}}
        torch.onnx.export(
            net, (x,), file, dynamo=False, input_names=["x"], dynamic_axes=axes, opset_version=17
        )
        return onnx.load_model_from_string(file.getvalue())


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


NETS = [Residual, SqueezeExcite, Neck]


@pytest.fixture(scope="module", params=NETS, ids=lambda cls: cls.__name__)
def classic(request: pytest.FixtureRequest) -> tuple[nn.Module, onnx.ModelProto]:
    net = build(request.param)
    return net, exported(net, dynamo=False)


@pytest.fixture(scope="module")
def residual() -> onnx.ModelProto:
    return exported(build(Residual), dynamo=False)


def assert_equals_onnxruntime(model: onnx.ModelProto) -> None:
    graph = TorchGraph(model)
    for count in (1, 2, 5):
        x = images(count)
        (expected,) = ort_run(model, {graph.input_names[0]: x.numpy()}).values()
        with torch.no_grad():
            got = graph(x).numpy()
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)  # sums of some 100 terms


def test_classic_export_equals_onnxruntime(classic: tuple[nn.Module, onnx.ModelProto]) -> None:
    assert_equals_onnxruntime(classic[1])


@pytest.mark.parametrize("cls", NETS, ids=lambda cls: cls.__name__)
def test_dynamo_export_equals_onnxruntime(cls: type[nn.Module]) -> None:
    assert_equals_onnxruntime(exported(build(cls), dynamo=True))


def test_double_precision_is_the_net_in_float64(
    classic: tuple[nn.Module, onnx.ModelProto],
) -> None:
    net, model = classic
    x = images(3).double()
    with torch.no_grad():
        expected = copy.deepcopy(net).double()(x)
        got = TorchGraph(model).double()(x)
    assert got.dtype == torch.float64
    # The exporter folds batch norm in float32; everything else is exact to float64.
    tolerance = 1e-5 if isinstance(net, Residual) else 1e-12
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_a_copy_in_double_leaves_the_original_in_float() -> None:
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)]
    graph = TorchGraph(model_of(nodes, x_type=TensorProto.UINT8))
    double = copy.deepcopy(graph).double()
    x = torch.arange(6, dtype=torch.uint8).view(1, 6)
    assert (graph(x).dtype, double(x).dtype) == (torch.float32, torch.float64)


def test_images_give_the_same_bits_anywhere_in_a_batch(
    classic: tuple[nn.Module, onnx.ModelProto],
) -> None:
    graph, x = TorchGraph(classic[1]), images(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(graph(x[order]), graph(x)[order])


def test_every_sub_graph_gives_the_bits_of_the_whole(
    classic: tuple[nn.Module, onnx.ModelProto],
) -> None:
    # The given tensor is made contiguous, as one read from a cache would be.
    graph, x = TorchGraph(classic[1]), images(4)
    (output,) = graph.output_names
    names = [name for step in graph.steps for name in step.outputs]
    with torch.no_grad():
        every = graph.run({graph.input_names[0]: x}, names)
        for name in names:
            given = {graph.input_names[0]: x, name: every[name].contiguous()}
            assert torch.equal(graph.run(given, [output])[output], every[output]), name


# --- graphs by hand -------------------------------------------------------------------------------


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


def test_gradients_of_weights_are_those_of_the_net(
    classic: tuple[nn.Module, onnx.ModelProto],
) -> None:
    net, model = classic
    graph, x = TorchGraph(model), images(2)
    parameters = dict(net.named_parameters())
    shared = {
        name: value.clone().requires_grad_()
        for name, value in graph.constants.items()
        if name in parameters and torch.equal(value, parameters[name])
    }
    assert len(shared) >= 2
    graph.run({"x": x, **shared}, graph.output_names)[
        graph.output_names[0]
    ].square().sum().backward()
    net.zero_grad()
    net(x).square().sum().backward()
    for name, value in shared.items():
        torch.testing.assert_close(value.grad, parameters[name].grad, rtol=1e-4, atol=1e-5)


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


# --- shapes, types, names -------------------------------------------------------------------------


def test_shapes_are_computed_on_the_cpu_in_their_own_type() -> None:
    # Size by way of float: Shape -> Cast -> Mul 0.5 -> Cast -> Slice end; constants of a shape stay
    # float32 in a float64 module, as 3 x 0.5 must stay what ONNX says it is.
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], start=1),
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
    constant = net.graph.tensors()["w1"]
    assert isinstance(constant, gs.Constant)
    constant.values = constant.values * 0
    assert graph.constants["w1"].any()


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu(classic: tuple[nn.Module, onnx.ModelProto]) -> None:
    x = images(4)
    with torch.no_grad():
        on_cpu = TorchGraph(classic[1])(x)
        graph = TorchGraph(classic[1], "cuda")
        assert torch.equal(graph(x), graph(x))
        torch.testing.assert_close(graph(x).cpu(), on_cpu, rtol=1e-4, atol=1e-5)


# --- errors ---------------------------------------------------------------------------------------


def test_all_unsupported_nodes_are_named_in_one_line() -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["a"], name="find"),
        helper.make_node("TopK", ["x", "k"], ["b", "i"], name="best"),
        helper.make_node("TopK", ["b", "k"], ["c", "j"], name="best2"),
        helper.make_node("Fancy", ["c"], ["y"], name="own", domain="com.example"),
    ]
    message = (
        r"^graph by_hand: 4 nodes cannot be run: NonZero \(find\); TopK \(best, best2\); "
        r"com\.example\.Fancy \(own\); expected .*replace these nodes, or cut the graph before.*$"
    )
    with pytest.raises(RewriteError, match=message):
        TorchGraph(model_of(nodes, {"k": np.array([1])}))


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


def test_a_fixed_batch_size_inside_the_graph_is_explained() -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["r"], name="reshape"),
        helper.make_node("MatMul", ["r", "w"], ["y"], name="head"),
    ]
    constants = {"shape": np.array([1, -1]), "w": np.ones((6, 2), np.float32)}
    graph = TorchGraph(model_of(nodes, constants, x_shape=(1, 6)))
    assert graph(torch.ones(1, 6)).tolist() == [[6, 6]]
    message = r"^node head \(MatMul\): cannot run on shapes \[\[1, 12\], \[6, 2\]\] .*dynamic one$"
    with pytest.raises(RewriteError, match=message):
        graph(torch.ones(2, 6))


def test_forward_needs_exactly_one_input() -> None:
    model = model_of([helper.make_node("Add", ["x", "z"], ["y"])])
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 6]))
    with pytest.raises(ConfigError, match="has inputs x, z, expected one; use run"):
        TorchGraph(model)(torch.zeros(1, 6))


def test_errors_of_hooks_are_not_disguised(graph: TorchGraph, x: Tensor) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("own mistake")

    for hook in ({"overrides": {"c1": broken}}, {"replace": {"relu1": broken}}):
        with pytest.raises(RuntimeError, match="own mistake"):
            graph.run({"x": x}, ["y"], **hook)
