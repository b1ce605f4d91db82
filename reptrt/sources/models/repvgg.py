"""RepVGG: Making VGG-style ConvNets Great Again (Ding et al., CVPR 2021), classification nets.

A block sums three branches, then ReLU; parameter names as in DingXiaoH/RepVGG:

    rbr_dense      conv 3x3 -> bn
    rbr_1x1        conv 1x1 -> bn
    rbr_identity   bn, where the block keeps its input's shape
    rbr_reparam    the one 3x3 convolution with bias of the deploy form, instead of all three

``stage0`` is one block (the stem), ``stage1``, ``stage2``, ... are lists of blocks whose first one
has the stage's stride; then ``gap`` and ``linear``. Layers are numbered over the whole net, the
stem being 0; with groups, every even layer from 2 on is a grouped convolution.
"""

from dataclasses import dataclass

import torch
from torch import nn

from reptrt.core.errors import ConfigError, option
from reptrt.sources.models.layers import (
    ConvSpec,
    classifier,
    conv_bn,
    fused_block,
    initialize,
)
from reptrt.sources.options import IMAGENET, Architecture, ArchitectureOptions, check_length

_BLOCKS_A = (2, 4, 14, 1)
_BLOCKS_B = (4, 6, 16, 1)


class RepVGGBlock(nn.Module):
    """The train form of one block: (N, I, H, W) -> (N, O, H / stride, W / stride)."""

    def __init__(self, spec: ConvSpec) -> None:
        super().__init__()
        self.rbr_identity = nn.BatchNorm2d(spec.in_channels) if spec.keeps_shape else None
        self.rbr_dense = conv_bn(spec, spec.kernel_size)
        self.rbr_1x1 = conv_bn(spec, 1)
        self.activation = nn.ReLU()
        initialize(self, num_branches=3 if spec.keeps_shape else 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return relu(dense(x) + conv1x1(x) [+ identity(x)])."""
        total = self.rbr_dense(x) + self.rbr_1x1(x)
        if self.rbr_identity is not None:
            total = total + self.rbr_identity(x)
        activated: torch.Tensor = self.activation(total)
        return activated


@dataclass(frozen=True, slots=True)
class _Design:
    """Every choice made: widths and strides have the stem first, blocks do not count it."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    strides: tuple[int, ...]
    groups: int

    def __post_init__(self) -> None:
        stages = len(self.blocks) + 1
        why = f"the stem, then one per entry of {option('blocks')}"
        check_length("widths", self.widths, (stages,), why)
        check_length("strides", self.strides, (stages,), why)


def build(options: ArchitectureOptions, deploy: bool) -> nn.Module:
    """Return a RepVGG; an option left out has the value of RepVGG-A0, strides are 2 by default.

    Raises:
        ConfigError: lists that do not fit each other, or widths that do not divide into groups.
    """
    widths = options.widths or _A0_WIDTHS
    design = _Design(
        widths=widths,
        blocks=options.blocks or _BLOCKS_A,
        strides=options.strides or (2,) * len(widths),
        groups=options.groups or 1,
    )
    blocks = [rep_block(spec, deploy) for spec in _specs(design, options.in_channels or 3)]
    stages, first = [blocks[0]], 1
    for count in design.blocks:
        stages.append(nn.Sequential(*blocks[first : first + count]))
        first += count
    return classifier(stages, widths[-1], options.num_classes or 1000)


def rep_block(spec: ConvSpec, deploy: bool) -> nn.Module:
    """Return a block in train or deploy form."""
    return fused_block("rbr_reparam", spec, se=nn.Identity()) if deploy else RepVGGBlock(spec)


def _specs(design: _Design, in_channels: int) -> list[ConvSpec]:
    """Return the convolution of every block, the stem first."""
    specs: list[ConvSpec] = []
    for width, count, stride in zip(
        design.widths, (1, *design.blocks), design.strides, strict=True
    ):
        for index in range(count):
            layer = len(specs)
            groups = design.groups if layer >= 2 and layer % 2 == 0 else 1
            spec = ConvSpec(in_channels, width, 3, stride if index == 0 else 1, groups)
            if in_channels % groups or width % groups:
                raise ConfigError(
                    f"{option('groups')}: layer {layer} has {in_channels} -> {width} channels, "
                    f"which do not divide into {groups} groups; choose other "
                    f"{option('widths')} or {option('groups')}"
                )
            specs.append(spec)
            in_channels = width
    return specs


def _official(blocks: tuple[int, ...], a: float, b: float, groups: int = 1) -> ArchitectureOptions:
    """Return the paper's net with width multipliers ``a`` (stages 0 to 3) and ``b`` (stage 4)."""
    widths = (min(64, int(64 * a)), int(64 * a), int(128 * a), int(256 * a), int(512 * b))
    return ArchitectureOptions(widths=widths, blocks=blocks, groups=groups)


_A0_WIDTHS = (48, 48, 96, 192, 1280)

ARCHITECTURE = Architecture(
    build=build,
    variants={
        "repvgg_a0": _official(_BLOCKS_A, 0.75, 2.5),
        "repvgg_a1": _official(_BLOCKS_A, 1.0, 2.5),
        "repvgg_a2": _official(_BLOCKS_A, 1.5, 2.75),
        "repvgg_b0": _official(_BLOCKS_B, 1.0, 2.5),
        "repvgg_b1": _official(_BLOCKS_B, 2.0, 4.0),
        "repvgg_b1g2": _official(_BLOCKS_B, 2.0, 4.0, groups=2),
        "repvgg_b1g4": _official(_BLOCKS_B, 2.0, 4.0, groups=4),
        "repvgg_b2": _official(_BLOCKS_B, 2.5, 5.0),
        "repvgg_b2g2": _official(_BLOCKS_B, 2.5, 5.0, groups=2),
        "repvgg_b2g4": _official(_BLOCKS_B, 2.5, 5.0, groups=4),
        "repvgg_b3": _official(_BLOCKS_B, 3.0, 5.0),
        "repvgg_b3g2": _official(_BLOCKS_B, 3.0, 5.0, groups=2),
        "repvgg_b3g4": _official(_BLOCKS_B, 3.0, 5.0, groups=4),
    },
    takes=("widths", "blocks", "strides", "groups", "num_classes", "in_channels"),
    deploy_marker=".rbr_reparam.",
    head_weight="linear.weight",
    reads=IMAGENET,
)
