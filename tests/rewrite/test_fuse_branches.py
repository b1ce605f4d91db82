"""Blocks are found by algebra and merged exactly; onnxruntime on the unfused graph is judge."""

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reptrt.core.errors import RewriteError
from reptrt.exporter.from_module import ExportSettings, onnx_from_module
from reptrt.exporter.fuse import fuse
from reptrt.graph.net import Net, model_from_net, net_from_model
from reptrt.graph.preprocess import Preprocess
from reptrt.graph.provenance import read_provenance
from reptrt.rewrite.contract import RewriteReport
from reptrt.rewrite.fuse_branches import fuse_branches
from tests.support.helpers import ort_run
from tests.support.onnx_nets import Builder

SIZE = 12


def conv_bn(
    inputs: int, outputs: int, size: int | tuple[int, int], pad: int | tuple[int, int], **more: int
) -> nn.Sequential:
    """A convolution without bias and a batch norm with statistics that matter."""
    norm = batch_norm(outputs)
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, padding=pad, bias=False, **more), norm)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return norm


class Sum(nn.Module):
    """relu(sum of branches(x))."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return torch.relu(total)


class Acnet(nn.Module):
    """3x3 + (1x3 + 3x1): the inner sum alone would cost more as one kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.square = conv_bn(4, 6, 3, 1)
        self.row, self.column = conv_bn(4, 6, (1, 3), (0, 1)), conv_bn(4, 6, (3, 1), (1, 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.square(x) + (self.row(x) + self.column(x)))


class Residual(nn.Module):
    """A ResNet basic block: the skip is not a linear branch of what its Add's convolution reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv_bn(4, 4, 3, 1), conv_bn(4, 4, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(x)
        return torch.relu(self.second(torch.relu(self.first(x))) + x)


class RepPlusSkip(nn.Module):
    """A rep block whose sum also holds a residual from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(4, 4, 3, 1)
        self.dense, self.point = conv_bn(4, 4, 3, 1), conv_bn(4, 4, 1, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.stem(x))
        return torch.relu(self.dense(y) + x + self.point(y))


class Scale(nn.Module):
    """x * gamma + beta per channel, written out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma / 2.0 + self.beta


class Formula(nn.Module):
    """relu(formula(x, wide branch, narrow branch, batch norm of x, alpha))."""

    def __init__(self, formula: Callable[..., torch.Tensor], shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.formula = formula
        self.wide, self.narrow = conv_bn(4, 4, 3, 1), conv_bn(4, 4, 1, 0)
        self.norm, self.outer = batch_norm(4), batch_norm(4)
        self.alpha = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (self.wide(x), self.narrow(x), self.norm(x), self.alpha)
        return torch.relu(self.formula(self, x, *parts))


FORMULAS: dict[str, Callable[..., torch.Tensor]] = {
    "alpha first": lambda net, x, a, b, n, k: a + k * b + x,
    "alpha last": lambda net, x, a, b, n, k: a + b * k + x,
    "everything scaled": lambda net, x, a, b, n, k: k * (a + k * b) - x * k,
    "difference": lambda net, x, a, b, n, k: a - b - n,
    "negated": lambda net, x, a, b, n, k: -(a + b) - x,
    "nested differences": lambda net, x, a, b, n, k: x - (a - (b - n)),
    "stack and sum": lambda net, x, a, b, n, k: torch.stack([a, b, n, x]).sum(0),
    "stack on the last axis": lambda net, x, a, b, n, k: torch.stack([a, b], -1).sum(-1),
    "stack of sums": lambda net, x, a, b, n, k: torch.stack([a + n, k * b], 1).sum(1),
    "mean": lambda net, x, a, b, n, k: torch.stack([a, b, n]).mean(0),
    "norm of the sum": lambda net, x, a, b, n, k: net.outer(a + b + x),
    "norm of the sum in a sum": lambda net, x, a, b, n, k: x + k * net.outer(a + b + n),
    "mixer": lambda net, x, a, b, n, k: x + k * ((a + b) - n),
    "divided": lambda net, x, a, b, n, k: (a + b) / 2.0 + x / 4.0,
    "shifted": lambda net, x, a, b, n, k: (a + 1.0) + (0.5 - b) + 0.0 * x,
    "sum of a list": lambda net, x, a, b, n, k: sum([a, b, n]),
}


class Up(nn.Module):
    """relu(sum of transposed convolutions), each with its batch norm, and one behind them."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        shapes = ((4, 1, 0), (2, 0, 0), (3, 1, 1))  # size, padding, output padding: all double
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(4, 8, k, 2, p, output_padding=o, groups=groups), batch_norm(8)
            )
            for k, p, o in shapes
        )
        self.outer = batch_norm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *others = self.branches
        total = first(x)
        for branch in others:
            total = total + branch(x)
        return torch.relu(self.outer(total))


class Lines(nn.Module):
    """A rep block of one-dimensional convolutions over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lines = x.mean(2)
        return torch.relu(self.wide(lines) + self.narrow(lines) + lines)


class Heads(nn.Module):
    """The mean of two heads, each a batch norm and a matrix product (RepViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 7)) for _ in range(2)
        )
        for head in self.heads:
            nn.init.normal_(head[0].running_mean)
            nn.init.uniform_(head[0].running_var, 0.5, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = x.mean((2, 3))
        return (self.heads[0](pooled) + self.heads[1](pooled)) / 2


class ReadTwice(nn.Module):
    """conv(x) + branch(x), where a sigmoid reads the branch too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.branch = conv_bn(4, 6, 3, 1), conv_bn(4, 6, 1, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.branch(x)
        return torch.relu(self.conv(x) + branch) * torch.sigmoid(branch)


def export_block(module: nn.Module, exporter: str = "torchscript") -> onnx.ModelProto:
    torch.manual_seed(0)
    settings = ExportSettings(opset=19, exporters=(exporter,))
    return onnx_from_module(module.eval(), Preprocess.plain(4, SIZE, SIZE), settings)


def fused(model: onnx.ModelProto) -> tuple[Net, RewriteReport]:
    return fuse(model, Preprocess.plain(4, SIZE, SIZE))


def assert_same_outputs(before: onnx.ModelProto, after: onnx.ModelProto, seed: int = 0) -> None:
    shape = [d.dim_value or 3 for d in before.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    expected = ort_run(before, {before.graph.input[0].name: x})
    got = ort_run(after, {after.graph.input[0].name: x})
    for name, value in expected.items():
        # float32 sums of at most a few hundred terms in another order: 1e-5 of the largest value
        np.testing.assert_allclose(got[name], value, rtol=0, atol=1e-5 * np.abs(value).max())


def ops(net: Net) -> list[str]:
    return [node.op for node in net.graph.nodes]


MERGED = {
    "repvgg": lambda: Sum(conv_bn(4, 4, 3, 1), conv_bn(4, 4, 1, 0), batch_norm(4)),
    "repvgg stride 2": lambda: Sum(conv_bn(4, 6, 3, 1, stride=2), conv_bn(4, 6, 1, 0, stride=2)),
    "repvgg grouped": lambda: Sum(
        conv_bn(4, 4, 3, 1, groups=2), conv_bn(4, 4, 1, 0, groups=2), batch_norm(4)
    ),
    "mobileone depthwise": lambda: Sum(
        *(conv_bn(4, 4, 3, 1, groups=4) for _ in range(3)),
        conv_bn(4, 4, 1, 0, groups=4),
        batch_norm(4),
    ),
    "mobileone pointwise": lambda: Sum(conv_bn(4, 4, 1, 0), conv_bn(4, 4, 1, 0), batch_norm(4)),
    "missing 1x1": lambda: Sum(conv_bn(4, 4, 3, 1), batch_norm(4)),
    "missing identity": lambda: Sum(conv_bn(4, 6, 3, 1), conv_bn(4, 6, 1, 0)),
    "plain identity": lambda: Sum(conv_bn(4, 4, 3, 1), nn.Identity()),
    "acnet": Acnet,
    "5x5 and 3x3": lambda: Sum(conv_bn(4, 6, 5, 2), conv_bn(4, 6, 3, 1)),
    "dilated": lambda: Sum(
        conv_bn(4, 4, 5, 2, groups=4), conv_bn(4, 4, 3, 2, groups=4, dilation=2)
    ),
    "1x1 then 3x3": lambda: Sum(
        conv_bn(4, 6, 3, 1), nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), conv_bn(8, 6, 3, 1))
    ),
    "1x1 with bias then unpadded 3x3": lambda: Sum(
        conv_bn(4, 6, 3, 0), nn.Sequential(conv_bn(4, 8, 1, 0), conv_bn(8, 6, 3, 0))
    ),
    "3x3 then average pool": lambda: Sum(
        conv_bn(4, 6, 5, 1), nn.Sequential(conv_bn(4, 6, 3, 1), nn.AvgPool2d(3, 1))
    ),
    "zero pad then 3x3": lambda: Sum(
        conv_bn(4, 6, 3, 1), nn.Sequential(nn.ZeroPad2d(1), conv_bn(4, 6, 3, 0))
    ),
    "scaled identity": lambda: Sum(conv_bn(4, 4, 3, 1), Scale(4)),
    "lines": lambda: Lines(),
    **{f"formula: {name}": partial(Formula, formula) for name, formula in FORMULAS.items()},
    **{
        f"alpha of shape {shape}": partial(Formula, FORMULAS["alpha first"], shape)
        for shape in ((1,), (4, 1, 1), (1, 4, 1, 1))
    },
}


# The dynamo exporter takes seconds a net: three blocks stand for all.
EXPORTS = [(name, "torchscript") for name in MERGED]
EXPORTS += [(name, "dynamo") for name in ("repvgg", "acnet", "mobileone depthwise")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "exporter"), EXPORTS)
def test_block_becomes_one_convolution(name: str, exporter: str) -> None:
    torch.manual_seed(1)
    model = export_block(MERGED[name](), exporter)
    net, report = fused(model)
    assert sorted(set(ops(net)) - {"ReduceMean"}) == ["Conv", "Relu"], report
    assert ops(net).count("Conv") == 1
    assert len(report.changed) == 1
    assert report.skipped == ()
    assert_same_outputs(model, model_from_net(net))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_branches_of_transposed_convolutions(groups: int) -> None:
    torch.manual_seed(1)
    model = export_block(Up(groups))
    net, report = fused(model)
    assert ops(net) == ["ConvTranspose", "Relu"], report
    assert_same_outputs(model, model_from_net(net))


def test_the_mean_of_two_heads_is_one_matrix_product() -> None:
    torch.manual_seed(1)
    model = export_block(Heads())
    net, report = fused(model)
    assert ops(net) == ["ReduceMean", "Gemm"], report
    assert_same_outputs(model, model_from_net(net))


def test_a_sum_of_any_number_of_tensors() -> None:
    b = Builder(channels=4)
    k = b.parameter("k", 4, 1, 1)
    parts = [b.conv("x", 4, "c1"), b.conv("x", 4, "c2", size=1), "x", k]
    model = b.model(b.relu(b.node("Sum", parts, "sum")))
    net, report = fused(model)
    assert ops(net) == ["Conv", "Relu"], report
    assert_same_outputs(model, model_from_net(net))


class RepMinusSkip(RepPlusSkip):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.stem(x))
        return torch.relu(x - self.dense(y) - torch.sigmoid(x) - self.point(y))


def test_what_is_left_of_a_difference_keeps_its_sign() -> None:
    model = export_block(RepMinusSkip())
    net, report = fused(model)
    assert sorted(ops(net)) == ["Add", "Conv", "Conv", "Relu", "Relu", "Sigmoid", "Sub"], report
    assert_same_outputs(model, model_from_net(net))


class MeanWithSkip(RepPlusSkip):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.stem(x))
        return torch.relu(torch.stack([self.dense(y), x, self.point(y)]).mean(0))


def test_what_is_left_of_a_mean_keeps_its_factor() -> None:
    model = export_block(MeanWithSkip())
    net, report = fused(model)
    assert sorted(ops(net)) == ["Add", "Conv", "Conv", "Mul", "Relu", "Relu"], report
    assert_same_outputs(model, model_from_net(net))


def test_provenance_follows_what_is_merged_later() -> None:
    """The branches of x + k * (wide + narrow - norm) are those of the inner sum, times k, and x."""
    torch.manual_seed(5)
    block = Formula(FORMULAS["mixer"], (4, 1, 1))
    net, report = fused(export_block(block))
    (name,) = report.changed
    branches = {branch.kind: branch for branch in read_provenance(net)[name]}
    assert sorted(b.kind for b in read_provenance(net)[name]) == [
        *("1x1", "3x3", "identity", "identity")
    ]
    gain = block.alpha.detach().numpy().reshape(-1)
    norm = block.wide[1]
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    weight = (block.wide[0].weight * scale[:, None, None, None]).detach().numpy()
    amax = np.abs(weight).max(axis=(1, 2, 3)) * np.abs(gain)
    np.testing.assert_allclose(branches["3x3"].amax, amax, rtol=1e-5)
    diagonals = [b.diagonal for b in read_provenance(net)[name] if b.diagonal is not None]
    scale = block.norm.weight / torch.sqrt(block.norm.running_var + block.norm.eps)
    np.testing.assert_allclose(sum(diagonals), 1 - gain * scale.detach().numpy(), rtol=1e-5)


LEFT_ALONE = {
    "biased 1x1 then padded 3x3": (
        lambda: Sum(conv_bn(4, 6, 3, 1), nn.Sequential(conv_bn(4, 8, 1, 0), conv_bn(8, 6, 3, 1))),
        "pads with zeros where the bias",
    ),
    "two padded 3x3 in series": (
        lambda: Sum(
            conv_bn(4, 6, 3, 1),
            conv_bn(4, 6, 1, 0),
            nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), conv_bn(8, 6, 3, 1)),
        ),
        "pads what the first has already padded",
    ),
    "costs more": (
        lambda: Sum(conv_bn(4, 6, (1, 3), (0, 1)), conv_bn(4, 6, (3, 1), (1, 0))),
        "would cost more: 216 instead of 144 MACs",
    ),
    "a branch that is read elsewhere": (
        lambda: ReadTwice(),
        " is read elsewhere too",
    ),
}


@pytest.mark.parametrize("name", list(LEFT_ALONE))
def test_inexact_branch_is_left_alone_with_the_reason(name: str) -> None:
    make, reason = LEFT_ALONE[name]
    torch.manual_seed(1)
    model = export_block(make())
    net, report = fused(model)
    assert any(reason in skip.reason for skip in report.skipped), report
    assert ops(net).count("Add") == 1
    assert_same_outputs(model, model_from_net(net))


def test_residual_add_of_another_input_stays() -> None:
    model = export_block(Residual())
    net, report = fused(model)
    assert ops(net).count("Add") == 1
    assert ops(net).count("Conv") == 2
    assert report.changed == ()
    assert_same_outputs(model, model_from_net(net))


def test_rep_block_inside_a_residual_sum_is_fused_and_the_skip_stays() -> None:
    model = export_block(RepPlusSkip())
    net, report = fused(model)
    assert (ops(net).count("Add"), ops(net).count("Conv")) == (1, 2)
    assert len(report.changed) == 1
    assert_same_outputs(model, model_from_net(net))


def test_names_come_from_parameters_and_are_stable() -> None:
    module = nn.Sequential(conv_bn(4, 4, 3, 1), nn.ReLU(), MERGED["repvgg"]())
    nets = [fused(export_block(module))[0] for _ in range(2)]
    names = [[node.name for node in net.graph.nodes if node.op == "Conv"] for net in nets]
    assert names[0] == names[1] == ["0.0", "2.branches"]
    tensors = [sorted(net.graph.tensors()) for net in nets]
    assert tensors[0] == tensors[1]
    assert {"2.branches.weight", "2.branches.bias"} <= set(tensors[0])


def test_a_factor_without_a_module_does_not_cost_a_block_its_name() -> None:
    b = Builder(channels=4)
    wide, narrow = b.conv("x", 4, "stem.block.wide"), b.conv("x", 4, "stem.block.narrow", size=1)
    b.channels[b.constant("onnx::Mul_7", np.float32(0.5))] = 0
    scaled = b.node("Mul", ["onnx::Mul_7", narrow], "mul")
    net, _ = fused(b.model(b.relu(b.node("Sub", [wide, scaled], "sub"))))
    assert [node.name for node in net.graph.nodes] == ["stem.block", "sub.relu"]


def test_provenance_says_which_branch_is_which() -> None:
    torch.manual_seed(2)
    norm = batch_norm(4)
    point = conv_bn(4, 4, 1, 0)
    net, report = fused(export_block(Sum(conv_bn(4, 4, 3, 1), point, norm)))
    branches = read_provenance(net)[report.changed[0]]
    assert [branch.kind for branch in branches] == ["3x3", "1x1", "identity"]
    assert [branch.name for branch in branches] == [f"branches.{i}" for i in range(3)]
    expected = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach().numpy()
    np.testing.assert_allclose(branches[2].diagonal, expected, rtol=1e-6)
    scale = point[1].weight / torch.sqrt(point[1].running_var + point[1].eps)
    weight = (point[0].weight * scale[:, None, None, None]).detach().numpy()
    np.testing.assert_allclose(branches[1].amax, np.abs(weight).max(axis=(1, 2, 3)), rtol=1e-6)


def test_fused_kernel_is_the_float64_sum_of_its_branches() -> None:
    torch.manual_seed(3)
    block = MERGED["repvgg"]().eval()
    net, _ = fused(export_block(block))
    weight = next(node for node in net.graph.nodes if node.op == "Conv").inputs[1].values
    basis = torch.eye(4 * 9, dtype=torch.float64).reshape(36, 4, 3, 3)  # impulses: one tap each
    block = block.double()
    linear = sum(branch(basis) - branch(torch.zeros_like(basis)) for branch in block.branches)
    expected = linear[:, :, 1, 1].reshape(4, 3, 3, 4).permute(3, 0, 1, 2).detach().numpy()
    np.testing.assert_array_equal(weight, expected.astype(np.float32))


def test_training_mode_is_refused() -> None:
    model = export_block(MERGED["repvgg"]())
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            node.attribute.append(onnx.helper.make_attribute("training_mode", 1))
            node.output.extend([f"{node.name}.mean", f"{node.name}.var"])
    with pytest.raises(RewriteError, match=r"training mode.*export the net after net\.eval"):
        fused(model)


@st.composite
def random_blocks(draw: st.DrawFn) -> nn.Module:
    """Any sum of linear branches with common channels, stride and output size."""
    groups = draw(st.sampled_from([1, 2, 4]))
    stride = draw(st.sampled_from([1, 2]))
    outputs = 4 if stride == 1 and draw(st.booleans()) else 8
    branches: list[nn.Module] = []
    for size in draw(st.lists(st.sampled_from([1, 3, 5, (1, 3), (5, 1)]), min_size=1, max_size=3)):
        pair = (size, size) if isinstance(size, int) else size
        pad = (pair[0] // 2, pair[1] // 2)
        branches.append(conv_bn(4, outputs, pair, pad, groups=groups, stride=stride))
    branches.append(conv_bn(4, outputs, 5, 2, stride=stride))  # its kernel covers all others
    if stride == 1 and outputs == 4:
        makers = [lambda: batch_norm(4), nn.Identity, lambda: Scale(4)]
        branches += [make() for make in draw(st.lists(st.sampled_from(makers), max_size=3))]
    return Sum(*draw(st.permutations(branches)))


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(block=random_blocks(), seed=st.integers(0, 9))
def test_random_blocks_become_one_convolution(block: nn.Module, seed: int) -> None:
    model = export_block(block)
    net, _ = fused(model)
    assert sorted(ops(net)) == ["Conv", "Relu"]
    assert_same_outputs(model, model_from_net(net), seed)


def test_a_fused_net_is_left_as_it_is() -> None:
    net, _ = fused(export_block(MERGED["repvgg"]()))
    again = net_from_model(model_from_net(net))
    assert fuse_branches(again).changed == ()
