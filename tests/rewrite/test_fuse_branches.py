"""Blocks are found by algebra and merged exactly; onnxruntime on the unfused graph is judge."""

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
}


# The dynamo exporter takes seconds a net: three blocks stand for all.
EXPORTS = [(name, "torchscript") for name in MERGED]
EXPORTS += [(name, "dynamo") for name in ("repvgg", "acnet", "mobileone depthwise")]


@pytest.mark.parametrize(("name", "exporter"), EXPORTS)
def test_block_becomes_one_convolution(name: str, exporter: str) -> None:
    torch.manual_seed(1)
    model = export_block(MERGED[name](), exporter)
    net, report = fused(model)
    assert sorted(ops(net)) == ["Conv", "Relu"], report
    assert len(report.changed) == 1
    assert_same_outputs(model, model_from_net(net))


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
