"""MobileOne: An Improved One millisecond Mobile Backbone (Vasu et al., CVPR 2023).

A block sums its branches, then squeeze-excite where there is one, then ReLU; parameter names as in
apple/ml-mobileone:

    rbr_conv.0, .1, ...   conv k x k -> bn, ``branches`` of them (the stem has one)
    rbr_scale             conv 1x1 -> bn, where k > 1
    rbr_skip              bn, where the block keeps its input's shape
    se                    reduce, expand: squeeze-excite with 1/16 of the channels
    reparam_conv          the one convolution with bias of the deploy form, instead of the branches

``stage0`` is one 3x3 block (the stem). ``stage1``, ``stage2``, ... are flat lists of pairs: a
depthwise 3x3 block, then a pointwise 1x1 block; ``blocks`` counts pairs, and the first pair has the
stage's stride in its depthwise block. Then ``gap`` and ``linear``.
"""

from collections.abc import Iterator
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
from reptrt.sources.options import (
    IMAGENET,
    Architecture,
    ArchitectureOptions,
    check_length,
    show,
)

_BLOCKS = (2, 8, 10, 1)
_S0_WIDTHS = (48, 128, 256, 1024)
_S0_BRANCHES = 4
_SE_REDUCTION = 16


class SqueezeExcite(nn.Module):
    """Scale each channel by sigmoid(expand(relu(reduce(mean over H, W)))); shape unchanged."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        reduced = max(1, channels // _SE_REDUCTION)
        self.reduce = nn.Conv2d(channels, reduced, 1)
        self.expand = nn.Conv2d(reduced, channels, 1)
        # Gates start near 0.9: at 0.5 a dozen of them in a row would fade every activation away.
        nn.init.constant_(self.expand.bias, 2.0)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (N, C, H, W) times one gate per image and channel."""
        gate = torch.sigmoid(self.expand(torch.relu(self.reduce(self.pool(x)))))
        return x * gate


class MobileOneBlock(nn.Module):
    """The train form of one block: (N, I, H, W) -> (N, O, H / stride, W / stride)."""

    def __init__(self, spec: ConvSpec, branches: int, se: nn.Module) -> None:
        super().__init__()
        self.rbr_skip = nn.BatchNorm2d(spec.in_channels) if spec.keeps_shape else None
        self.rbr_conv = nn.ModuleList(conv_bn(spec, spec.kernel_size) for _ in range(branches))
        self.rbr_scale = conv_bn(spec, 1) if spec.kernel_size > 1 else None
        initialize(self, num_branches=len(self._branches()))
        self.se = se
        self.activation = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return relu(se(sum of rbr_conv(x) [+ rbr_scale(x)] [+ rbr_skip(x)]))."""
        first, *others = self._branches()
        total = first(x)
        for branch in others:
            total = total + branch(x)
        activated: torch.Tensor = self.activation(self.se(total))
        return activated

    def _branches(self) -> list[nn.Module]:
        optional = (self.rbr_scale, self.rbr_skip)
        return [*self.rbr_conv, *(branch for branch in optional if branch is not None)]


@dataclass(frozen=True, slots=True)
class _Design:
    """Every choice made: widths and strides have the stem first, blocks and se_blocks do not."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    strides: tuple[int, ...]
    se_blocks: tuple[int, ...]
    branches: int

    def __post_init__(self) -> None:
        stages = len(self.blocks)
        check_length("se_blocks", self.se_blocks, (stages,), f"one per entry of {option('blocks')}")
        if any(se > count for se, count in zip(self.se_blocks, self.blocks, strict=True)):
            raise ConfigError(
                f"{option('se_blocks')}: got {show(self.se_blocks)}, expected at most "
                f"{show(self.blocks)}"
            )


def build(options: ArchitectureOptions, deploy: bool) -> nn.Module:
    """Return a MobileOne; an option left out has the value of MobileOne-S0, strides are 2.

    ``widths`` and ``strides`` have one entry per entry of ``blocks``; one more, in front, is the
    stem's. By default the stem has min(64, widths[0]) channels and stride 2.

    Raises:
        ConfigError: lists that do not fit each other.
    """
    design = _design_from_options(options)
    stem = ConvSpec(options.in_channels or 3, design.widths[0], 3, design.strides[0])
    stages: list[nn.Module] = [_block(stem, 1, nn.Identity(), deploy)]
    for index in range(len(design.blocks)):
        stages.append(nn.Sequential(*_stage(design, index, deploy)))
    return classifier(stages, design.widths[-1], options.num_classes or 1000)


def _design_from_options(options: ArchitectureOptions) -> _Design:
    blocks = options.blocks or _BLOCKS
    stages = len(blocks)
    widths = options.widths or _S0_WIDTHS
    strides = options.strides or (2,) * stages
    why = f"one per entry of {option('blocks')}; one more: the stem's in front"
    check_length("widths", widths, (stages, stages + 1), why)
    check_length("strides", strides, (stages, stages + 1), why)
    if len(widths) == stages:
        widths = (min(64, widths[0]), *widths)
    if len(strides) == stages:
        strides = (2, *strides)
    return _Design(
        widths=widths,
        blocks=blocks,
        strides=strides,
        se_blocks=options.se_blocks or (0,) * len(blocks),
        branches=options.branches or _S0_BRANCHES,
    )


def _stage(design: _Design, index: int, deploy: bool) -> Iterator[nn.Module]:
    """Yield the blocks of the stage that ``blocks[index]`` counts: depthwise, pointwise, ..."""
    in_channels, width = design.widths[index], design.widths[index + 1]
    count = design.blocks[index]
    for pair in range(count):
        stride = design.strides[index + 1] if pair == 0 else 1
        depthwise = ConvSpec(in_channels, in_channels, 3, stride, groups=in_channels)
        pointwise = ConvSpec(in_channels, width, kernel_size=1)
        for spec in (depthwise, pointwise):
            has_se = pair >= count - design.se_blocks[index]
            se = SqueezeExcite(spec.out_channels) if has_se else nn.Identity()
            yield _block(spec, design.branches, se, deploy)
        in_channels = width


def _block(spec: ConvSpec, branches: int, se: nn.Module, deploy: bool) -> nn.Module:
    return fused_block("reparam_conv", spec, se) if deploy else MobileOneBlock(spec, branches, se)


def _official(
    multipliers: tuple[float, float, float, float],
    branches: int = 1,
    se_blocks: tuple[int, ...] = (0, 0, 0, 0),
) -> ArchitectureOptions:
    """Return the paper's net with these multipliers of the widths 64, 128, 256, 512."""
    widths = tuple(int(64 * 2**i * multiplier) for i, multiplier in enumerate(multipliers))
    return ArchitectureOptions(
        widths=widths, blocks=_BLOCKS, branches=branches, se_blocks=se_blocks
    )


ARCHITECTURE = Architecture(
    build=build,
    variants={
        "mobileone_s0": _official((0.75, 1.0, 1.0, 2.0), branches=_S0_BRANCHES),
        "mobileone_s1": _official((1.5, 1.5, 2.0, 2.5)),
        "mobileone_s2": _official((1.5, 2.0, 2.5, 4.0)),
        "mobileone_s3": _official((2.0, 2.5, 3.0, 4.0)),
        "mobileone_s4": _official((3.0, 3.5, 3.5, 4.0), se_blocks=(0, 0, 5, 1)),
    },
    takes=("widths", "blocks", "strides", "branches", "se_blocks", "num_classes", "in_channels"),
    deploy_marker=".reparam_conv.",
    head_weight="linear.weight",
    reads=IMAGENET,
)
