"""The blocks of YOLOv6, with the names of meituan/YOLOv6; `Blocks` builds train or deploy form."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from reptrt.sources.models.layers import ConvSpec, conv, conv_bn, initialize
from reptrt.sources.models.repvgg import rep_block

Activation = Literal["relu", "silu"]
Block = Literal["repvgg", "conv_silu"]  # the training_mode of the official configurations

_ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}


@dataclass(frozen=True, slots=True)
class Blocks:
    """How the blocks of one net are built."""

    kind: Block  # of the stages
    deploy: bool

    def conv(self, spec: ConvSpec, activation: Activation = "relu") -> nn.Sequential:
        """Return ``block``: convolution, batch norm (folded in deploy form), activation."""
        if self.deploy:
            layers = OrderedDict[str, nn.Module](conv=conv(spec, spec.kernel_size, bias=True))
        else:
            layers = OrderedDict(conv_bn(spec, spec.kernel_size).named_children())
        layers["act"] = _ACTIVATIONS[activation]()
        block = nn.Sequential(OrderedDict(block=nn.Sequential(layers)))
        initialize(block, num_branches=1)
        return block

    def pointwise(self, in_channels: int, out_channels: int, activation: Activation) -> nn.Module:
        """Return ``block`` with a 1x1 convolution."""
        return self.conv(ConvSpec(in_channels, out_channels, 1), activation)

    def basic(self, in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
        """Return a 3x3 block of the stages: a rep block with ReLU, or a convolution with SiLU."""
        spec = ConvSpec(in_channels, out_channels, 3, stride)
        return rep_block(spec, self.deploy) if self.kind == "repvgg" else self.conv(spec, "silu")

    @property
    def activation(self) -> Activation:
        """The activation of the stages."""
        return "relu" if self.kind == "repvgg" else "silu"

    def stage(self, in_channels: int, out_channels: int, count: int) -> nn.Sequential:
        """Return ``conv1`` and, of more than one block, ``block.0``, ``block.1``, ..."""
        others = (self.basic(out_channels, out_channels) for _ in range(count - 1))
        return _listed(self.basic(in_channels, out_channels), *others)

    def residual_stage(self, channels: int, count: int) -> nn.Sequential:
        """Return count // 2 pairs of blocks with a skip each, at least one."""
        return _listed(*(_ResidualPair(self, channels) for _ in range(max(1, count // 2))))


def _listed(first: nn.Module, *others: nn.Module) -> nn.Sequential:
    stage = nn.Sequential(OrderedDict(conv1=first))
    if others:
        stage.add_module("block", nn.Sequential(*others))
    return stage


class _ResidualPair(nn.Module):
    """conv2(conv1(x)) + alpha * x with a learned number alpha; shape unchanged."""

    def __init__(self, blocks: Blocks, channels: int) -> None:
        super().__init__()
        self.conv1 = blocks.basic(channels, channels)
        self.conv2 = blocks.basic(channels, channels)
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skipped: torch.Tensor = self.conv2(self.conv1(x)) + self.alpha * x
        return skipped


class CspStage(nn.Module):
    """cv3(m(cv1(x)) beside cv2(x)): a part of the channels goes through the residual stage ``m``.

    Args:
        blocks: how blocks are built.
        in_channels: of x.
        out_channels: of the result.
        count: blocks in ``m``.
        part: of ``out_channels``, the channels in ``m``.
    """

    def __init__(
        self, blocks: Blocks, in_channels: int, out_channels: int, count: int, part: float
    ) -> None:
        super().__init__()
        inner = int(out_channels * part)
        self.cv1 = blocks.pointwise(in_channels, inner, blocks.activation)
        self.cv2 = blocks.pointwise(in_channels, inner, blocks.activation)
        self.cv3 = blocks.pointwise(2 * inner, out_channels, blocks.activation)
        self.m = blocks.residual_stage(inner, count)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, O, H, W) of x (N, I, H, W)."""
        joined: torch.Tensor = self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), dim=1))
        return joined


def pyramid(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return x beside itself pooled once, twice and three times by ``m``."""
    once = m(x)
    twice = m(once)
    return torch.cat((x, once, twice, m(twice)), dim=1)


class Sppf(nn.Module):
    """cv2(pyramid(cv1(x))): spatial pyramid pooling; (N, C, H, W) unchanged in shape."""

    def __init__(self, blocks: Blocks, channels: int) -> None:
        super().__init__()
        self.cv1 = blocks.pointwise(channels, channels // 2, blocks.activation)
        self.cv2 = blocks.pointwise(channels // 2 * 4, channels, blocks.activation)
        self.m = nn.MaxPool2d(5, stride=1, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, C, H, W)."""
        pooled: torch.Tensor = self.cv2(pyramid(self.m, self.cv1(x)))
        return pooled


class CspSppf(nn.Module):
    """Pyramid pooling of half of the channels: cv7(cv2(x) beside cv6(cv5(pyramid(cv4 to cv1))))."""

    def __init__(self, blocks: Blocks, channels: int) -> None:
        super().__init__()
        inner, act = channels // 2, blocks.activation
        self.cv1 = blocks.pointwise(channels, inner, act)
        self.cv2 = blocks.pointwise(channels, inner, act)
        self.cv3 = blocks.conv(ConvSpec(inner, inner), act)
        self.cv4 = blocks.pointwise(inner, inner, act)
        self.m = nn.MaxPool2d(5, stride=1, padding=2)
        self.cv5 = blocks.pointwise(4 * inner, inner, act)
        self.cv6 = blocks.conv(ConvSpec(inner, inner), act)
        self.cv7 = blocks.pointwise(2 * inner, channels, act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, C, H, W)."""
        pooled = self.cv6(self.cv5(pyramid(self.m, self.cv4(self.cv3(self.cv1(x))))))
        joined: torch.Tensor = self.cv7(torch.cat((self.cv2(x), pooled), dim=1))
        return joined


class BiFusion(nn.Module):
    """Join three levels at the middle one: the deeper one upsampled, the shallower one downsampled.

    Args:
        blocks: how blocks are built.
        same: channels of the level at this resolution.
        shallower: channels of the level at twice this resolution.
        channels: of the deeper level and of the result.
    """

    def __init__(self, blocks: Blocks, same: int, shallower: int, channels: int) -> None:
        super().__init__()
        self.cv1 = blocks.pointwise(same, channels, "relu")
        self.cv2 = blocks.pointwise(shallower, channels, "relu")
        self.cv3 = blocks.pointwise(3 * channels, channels, "relu")
        up = nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
        self.upsample = nn.Sequential(OrderedDict(upsample_transpose=up))
        self.downsample = blocks.conv(ConvSpec(channels, channels, 3, 2))

    def forward(
        self, deeper: torch.Tensor, same: torch.Tensor, shallower: torch.Tensor
    ) -> torch.Tensor:
        """Return (N, channels, H, W) at the resolution of ``same``."""
        parts = (self.upsample(deeper), self.cv1(same), self.downsample(self.cv2(shallower)))
        joined: torch.Tensor = self.cv3(torch.cat(parts, dim=1))
        return joined
