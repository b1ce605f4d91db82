"""YOLOv6 v3.0: A Full-Scale Reloading (Li et al., 2023), the detectors N, S, M and L with P5.

Parameter names as in meituan/YOLOv6:

    backbone   stem, ERBlock_2 to ERBlock_5: a block with stride 2, a stage; then pyramid pooling
    neck       reduce_layer0, Bifusion0, Rep_p4, reduce_layer1, Bifusion1, Rep_p3 (top down);
               downsample2, Rep_n3, downsample1, Rep_n4 (bottom up)
    detect     stems, cls_convs, reg_convs, cls_preds, reg_preds, with one entry for each level

Blocks of the stages are rep blocks (``rbr_dense``, ``rbr_1x1``, ``rbr_identity``; in deploy form
``rbr_reparam``), in L convolutions with SiLU. Other layers are ``block.conv`` and ``block.bn``; in
deploy form ``block.conv`` has the bias. N and S have plain stages, M and L CSP stages. M and L
predict each distance as a distribution over bins (DFL). ``widths`` are five of the backbone, then
six of the neck; ``blocks`` four of the backbone's stages, then four of the neck's.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from reptrt.core.choices import DetectorHead
from reptrt.sources.models.layers import ConvSpec
from reptrt.sources.models.yolov6.blocks import BiFusion, Block, Blocks, CspSppf, CspStage, Sppf
from reptrt.sources.models.yolov6.head import BINS, STRIDES, Head
from reptrt.sources.options import (
    Architecture,
    ArchitectureOptions,
    PublishedInput,
    check_length,
)

_WIDTHS = (64, 128, 256, 512, 1024, 256, 128, 128, 256, 256, 512)
_COUNTS = (6, 12, 18, 6, 12, 12, 12, 12)
_EPS = 1e-3  # of batch norms
_NUM_CLASSES = 80


@dataclass(frozen=True, slots=True)
class _Design:
    """Every choice made."""

    widths: tuple[int, ...]  # 5 of the backbone, 6 of the neck
    counts: tuple[int, ...]  # blocks in the 4 stages of the backbone, in the 4 of the neck
    blocks: Blocks
    part: float | None  # of a CSP stage's channels; None: plain stages
    in_channels: int

    def __post_init__(self) -> None:
        check_length("widths", self.widths, (11,), "5 of the backbone, 6 of the neck")
        check_length("blocks", self.counts, (8,), "4 stages of the backbone, 4 of the neck")

    def stage(self, index: int, in_channels: int, out_channels: int) -> nn.Module:
        """Return the stage that ``counts[index]`` counts."""
        count = self.counts[index]
        if self.part is None:
            return self.blocks.stage(in_channels, out_channels, count)
        return CspStage(self.blocks, in_channels, out_channels, count, self.part)


class _Backbone(nn.Module):
    """(N, I, H, W) -> features at 1/4, 1/8, 1/16 and 1/32 of the size."""

    def __init__(self, design: _Design) -> None:
        super().__init__()
        widths, blocks = design.widths[:5], design.blocks
        self.stem = blocks.basic(design.in_channels, widths[0], stride=2)
        stages = [
            nn.Sequential(
                blocks.basic(widths[index], widths[index + 1], stride=2),
                design.stage(index, widths[index + 1], widths[index + 1]),
            )
            for index in range(4)
        ]
        if design.part is None:
            stages[3].append(nn.Sequential(OrderedDict(cspsppf=CspSppf(blocks, widths[4]))))
        else:
            stages[3].append(nn.Sequential(OrderedDict(sppf=Sppf(blocks, widths[4]))))
        self.ERBlock_2, self.ERBlock_3, self.ERBlock_4, self.ERBlock_5 = stages

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        p2 = self.ERBlock_2(self.stem(x))
        p3 = self.ERBlock_3(p2)
        p4 = self.ERBlock_4(p3)
        return p2, p3, p4, self.ERBlock_5(p4)


class _Neck(nn.Module):
    """Features at 1/4 to 1/32 of the size -> features at 1/8, 1/16 and 1/32."""

    def __init__(self, design: _Design) -> None:
        super().__init__()
        _, p2, p3, p4, p5, top, bottom, down2, n3, down1, n4 = design.widths
        blocks = design.blocks
        self.reduce_layer0 = blocks.pointwise(p5, top, "relu")
        self.Bifusion0 = BiFusion(blocks, same=p4, shallower=p3, channels=top)
        self.Rep_p4 = design.stage(4, top, top)
        self.reduce_layer1 = blocks.pointwise(top, bottom, "relu")
        self.Bifusion1 = BiFusion(blocks, same=p3, shallower=p2, channels=bottom)
        self.Rep_p3 = design.stage(5, bottom, bottom)
        self.downsample2 = blocks.conv(ConvSpec(bottom, down2, 3, 2))
        self.Rep_n3 = design.stage(6, bottom + down2, n3)
        self.downsample1 = blocks.conv(ConvSpec(n3, down1, 3, 2))
        self.Rep_n4 = design.stage(7, top + down1, n4)

    def forward(self, features: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        p2, p3, p4, p5 = features
        top = self.reduce_layer0(p5)
        middle = self.reduce_layer1(self.Rep_p4(self.Bifusion0(top, p4, p3)))
        fine = self.Rep_p3(self.Bifusion1(middle, p3, p2))
        medium = self.Rep_n3(torch.cat((self.downsample2(fine), middle), dim=1))
        coarse = self.Rep_n4(torch.cat((self.downsample1(medium), top), dim=1))
        return fine, medium, coarse


def build(options: ArchitectureOptions, deploy: bool) -> nn.Module:
    """Return a YOLOv6; an option left out has the value of YOLOv6-N.

    Raises:
        ConfigError: lists of another length.
    """
    kind: Block = options.block or "repvgg"
    design = _Design(
        widths=options.widths or _widths(0.25),
        counts=options.blocks or _counts(0.33),
        blocks=Blocks(kind, deploy),
        part=options.csp,
        in_channels=options.in_channels or 3,
    )
    form: DetectorHead = options.head or "decoded"
    head = Head(
        design.blocks,
        [design.widths[index] for index in (6, 8, 10)],
        options.num_classes or _NUM_CLASSES,
        dfl=bool(options.dfl),
        form=form,
    )
    parts = OrderedDict[str, nn.Module](backbone=_Backbone(design), neck=_Neck(design), detect=head)
    for module in nn.ModuleList(parts.values()).modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = _EPS
    return nn.Sequential(parts)


def _with_dfl(
    options: ArchitectureOptions, state: Mapping[str, torch.Tensor]
) -> ArchitectureOptions:
    """Let the weights say whether distances are distributions, if the options leave it open."""
    lengths = {
        len(value) for name, value in state.items() if name.endswith("detect.reg_preds.0.weight")
    }
    if options.dfl is not None or len(lengths) != 1:
        return options
    return replace(options, dfl=lengths == {4 * BINS})


def _widths(multiple: float) -> tuple[int, ...]:
    return tuple(8 * math.ceil(channels * multiple / 8) for channels in _WIDTHS)


def _counts(multiple: float) -> tuple[int, ...]:
    return tuple(max(1, round(count * multiple)) for count in _COUNTS)


def _csp(width: float, depth: float, block: Block, part: float) -> ArchitectureOptions:
    return ArchitectureOptions(
        widths=_widths(width), blocks=_counts(depth), block=block, csp=part, dfl=True
    )


ARCHITECTURE = Architecture(
    build=build,
    variants={
        "yolov6n": ArchitectureOptions(widths=_widths(0.25), blocks=_counts(0.33)),
        "yolov6s": ArchitectureOptions(widths=_widths(0.5), blocks=_counts(0.33)),
        "yolov6m": _csp(0.75, 0.6, "repvgg", part=2 / 3),
        "yolov6l": _csp(1.0, 1.0, "conv_silu", part=1 / 2),
    },
    takes=("widths", "blocks", "block", "csp", "dfl", "head", "num_classes", "in_channels"),
    variant_takes=("dfl", "head", "num_classes", "in_channels"),
    deploy_marker=".block.conv.bias",
    head_weight="detect.cls_preds.0.weight",
    infer=_with_dfl,
    training_only=("detect.cls_preds_ab.", "detect.reg_preds_ab.", "detect.reg_preds_dist."),
    reads=PublishedInput(640, 640, resize="letterbox", multiple=max(STRIDES), also_free=True),
)
