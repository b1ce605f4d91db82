"""The pieces that the architectures share. Children carry the official repositories' names."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class ConvSpec:
    """The convolution that a rep block becomes when it is fused: weight (O, I / groups, k, k)."""

    in_channels: int
    out_channels: int
    kernel_size: int = 3
    stride: int = 1
    groups: int = 1

    @property
    def keeps_shape(self) -> bool:
        """Whether the output has the input's shape, so that the block gets an identity branch."""
        return self.in_channels == self.out_channels and self.stride == 1


def conv(spec: ConvSpec, kernel_size: int, bias: bool) -> nn.Conv2d:
    """Return a convolution with the spec's channels, stride and groups, padded by k // 2."""
    return nn.Conv2d(
        spec.in_channels,
        spec.out_channels,
        kernel_size,
        stride=spec.stride,
        padding=kernel_size // 2,
        groups=spec.groups,
        bias=bias,
    )


def conv_bn(spec: ConvSpec, kernel_size: int) -> nn.Sequential:
    """Return a branch: ``conv`` without bias, then ``bn``."""
    return nn.Sequential(
        OrderedDict(conv=conv(spec, kernel_size, bias=False), bn=nn.BatchNorm2d(spec.out_channels))
    )


def fused_block(conv_name: str, spec: ConvSpec, se: nn.Module) -> nn.Sequential:
    """Return the deploy form of a rep block: one convolution with bias, squeeze-excite, ReLU."""
    fused = conv(spec, spec.kernel_size, bias=True)
    initialize(fused, num_branches=1)
    layers = OrderedDict([(conv_name, fused), ("se", se), ("activation", nn.ReLU())])
    return nn.Sequential(layers)


def initialize(branches: nn.Module, num_branches: int) -> None:
    """Draw the weights of parallel branches so that activations neither grow nor fade with depth.

    Convolutions are N(0, 2 / fan_in); every branch of a sum is scaled by 1 / sqrt(num_branches),
    in the weight of its BatchNorm, so that the sum keeps the mean square of one branch.
    """
    for module in branches.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, num_branches**-0.5)


def classifier(stages: Sequence[nn.Module], width: int, num_classes: int) -> nn.Sequential:
    """Return ``stage0``, ``stage1``, ..., global average pooling ``gap`` and the head ``linear``.

    Args:
        stages: (N, C, H, W) -> (N, width, h, w), in order.
        width: channels of the last stage.
        num_classes: logits; the net maps (N, C, H, W) to (N, num_classes).
    """
    layers = OrderedDict((f"stage{index}", stage) for index, stage in enumerate(stages))
    layers["gap"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["linear"] = nn.Linear(width, num_classes)
    return nn.Sequential(layers)
