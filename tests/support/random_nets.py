"""Plans of random rep-nets for hypothesis; the repr of a plan is code that makes the same net."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

ACTIVATIONS = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "relu6": nn.ReLU6,
    "none": nn.Identity,
}
FORMS = ("add", "sub", "stack", "mean", "view", "alpha first", "alpha last")
OUTER = ("none", "norm", "frozen")
HEADS = ("average", "mean", "maximum", "flatten", "1x1")
SIZE = 8


@dataclass(frozen=True)
class BlockPlan:
    """activation(outer(sum of branches)); the widest kernel is at most as grouped as any other."""

    outputs: int
    kernels: tuple[int, ...]  # odd sizes of the k x k branches
    grouped: tuple[int, ...]  # groups of each
    identity: str = "none"  # "none" | "plain" | "norm"
    stride: int = 1
    norm: bool = True  # after each k x k branch, which then has no bias
    activation: str = "relu"
    pooled: bool = False  # a 2 x 2 max pool behind it
    form: str = "add"  # of the sum: one of FORMS
    outer: str = "none"  # between sum and activation: one of OUTER


@dataclass(frozen=True)
class Plan:
    """A whole net: input (N, channels, 8, 8) -> logits (N, classes)."""

    channels: int
    blocks: tuple[BlockPlan, ...]
    head: str
    classes: int
    seed: int

    def build(self) -> nn.Module:
        """Return the train-form net in eval mode, batch norms with statistics that matter."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return RepNet(self).eval()

    @property
    def fused_parameters(self) -> int:
        """Number of weights and biases when every block is fused into one convolution."""
        total, inputs, size = 0, self.channels, SIZE
        for block in self.blocks:
            widest = max(range(len(block.kernels)), key=lambda i: block.kernels[i])
            taps = block.kernels[widest] ** 2
            total += block.outputs * (inputs // block.grouped[widest] * taps + 1)
            inputs, size = block.outputs, size_behind(block, size)
        features = inputs * size**2 if self.head == "flatten" else inputs
        return total + self.classes * (features + 1)


class RepBlock(nn.Module):
    def __init__(self, inputs: int, plan: BlockPlan) -> None:
        super().__init__()
        branches: list[nn.Module] = []
        for kernel, groups in zip(plan.kernels, plan.grouped, strict=True):
            conv = nn.Conv2d(
                *(inputs, plan.outputs, kernel, plan.stride, kernel // 2),
                groups=groups,
                bias=not plan.norm,
            )
            branches.append(nn.Sequential(conv, norm(plan.outputs)) if plan.norm else conv)
        if plan.identity == "plain":
            branches.append(nn.Identity())
        elif plan.identity == "norm":
            branches.append(norm(plan.outputs))
        self.branches = nn.ModuleList(branches)
        self.form = plan.form
        shape = (plan.outputs, 1, 1)
        self.alphas = nn.ParameterList(torch.rand(shape) + 0.5 for _ in branches[1:])
        outer = {"none": nn.Identity, "norm": norm, "frozen": Frozen}[plan.outer]
        self.outer = outer(plan.outputs)
        self.activation = ACTIVATIONS[plan.activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.outer(self.summed([branch(x) for branch in self.branches])))

    def summed(self, parts: list[Tensor]) -> Tensor:
        if self.form == "view" and len(parts) > 1:
            n, *sizes = parts[0].shape
            return torch.cat(parts, 1).view(n, len(parts), *sizes).sum(1)
        if self.form in ("stack", "mean") and len(parts) > 1:
            stacked = torch.stack(parts)
            return stacked.sum(0) if self.form == "stack" else stacked.mean(0)
        total = parts[0]
        for part, alpha in zip(parts[1:], self.alphas, strict=True):
            if self.form == "sub":
                total = total - part
            elif self.form == "add":
                total = total + part
            else:
                total = total + (alpha * part if self.form == "alpha first" else part * alpha)
        return total


class Frozen(nn.Module):
    """A batch norm as detection nets freeze it: a factor and a shift per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)
        self.shift = nn.Parameter(torch.randn(1, channels, 1, 1) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class RepNet(nn.Module):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs, size = plan.channels, SIZE
        for block in plan.blocks:
            layers.append(RepBlock(inputs, block))
            layers += [nn.MaxPool2d(2)] if block.pooled else []
            inputs, size = block.outputs, size_behind(block, size)
        self.body = nn.Sequential(*layers)
        self.kind = plan.head
        features = inputs * size**2 if plan.head == "flatten" else inputs
        if plan.head == "1x1":
            self.last: nn.Module = nn.Conv2d(features, plan.classes, 1)
        else:
            self.last = nn.Linear(features, plan.classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.kind in ("average", "1x1"):
            y = nn.functional.adaptive_avg_pool2d(y, 1)
        elif self.kind == "maximum":
            y = nn.functional.adaptive_max_pool2d(y, 1)
        elif self.kind == "mean":
            y = y.mean((2, 3))
        if self.kind == "1x1":
            return self.last(y).flatten(1)
        return self.last(y.flatten(1))


def norm(channels: int) -> nn.BatchNorm2d:
    """A batch norm with different random statistics in each channel, as after training."""
    made = nn.BatchNorm2d(channels)
    nn.init.uniform_(made.weight, 0.5, 1.5)
    nn.init.normal_(made.bias, std=0.3)
    nn.init.normal_(made.running_mean, std=0.3)
    nn.init.uniform_(made.running_var, 0.5, 2.0)
    return made


def size_behind(block: BlockPlan, size: int) -> int:
    """The height and width behind a block and its pool."""
    size = -(-size // block.stride)
    return size // 2 if block.pooled else size


@st.composite
def block_plans(draw: st.DrawFn, inputs: int, size: int, activations: Sequence[str]) -> BlockPlan:
    """Any block of ``inputs`` channels and a map of ``size``."""
    outputs = draw(st.sampled_from([inputs, 4, 8, 12] if inputs % 4 == 0 else [4, 8]))
    divisors = [g for g in (1, 2, 4, inputs) if inputs % g == 0 and outputs % g == 0]
    widest = draw(st.sampled_from([1, 3, 3, 5]))
    if widest == 1 and outputs == inputs:  # a 1x1 of single channels is a scaling, no convolution
        divisors = [g for g in divisors if g < inputs]
    groups = draw(st.sampled_from(divisors))
    others = draw(st.lists(st.sampled_from([k for k in (1, 3) if k <= widest]), max_size=3))
    # The fused kernel has `groups` groups, so every branch needs a multiple of that number.
    finer = [g for g in divisors if g % groups == 0]
    grouped = [draw(st.sampled_from(finer)) for _ in others]
    stride = draw(st.sampled_from([1, 1, 2])) if size >= 4 else 1
    kept = stride == 1 and outputs == inputs
    identity = draw(st.sampled_from(["none", "plain", "norm"])) if kept else "none"
    return BlockPlan(
        outputs=outputs,
        kernels=(widest, *others),
        grouped=(groups, *grouped),
        identity=identity,
        stride=stride,
        norm=draw(st.booleans()),
        activation=draw(st.sampled_from(activations)),
        pooled=size >= 8 and draw(st.booleans()),
        form=draw(st.sampled_from(FORMS)),
        outer=draw(st.sampled_from(OUTER)),
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any net of one to four blocks."""
    channels, size = draw(st.sampled_from([1, 3])), SIZE
    blocks: list[BlockPlan] = []
    inputs = channels
    depth = draw(st.integers(1, 4))
    for _ in range(depth):
        block = draw(block_plans(inputs, size, list(ACTIVATIONS)))
        blocks.append(block)
        inputs, size = block.outputs, size_behind(block, size)
    return Plan(
        channels,
        tuple(blocks),
        draw(st.sampled_from(HEADS)),
        draw(st.integers(2, 7)),
        draw(st.integers(0, 999)),
    )
