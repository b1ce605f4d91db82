"""The head of YOLOv6: three levels, class and box branches apart, and their decoding to boxes."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from reptrt.core.choices import DetectorHead
from reptrt.sources.models.layers import ConvSpec
from reptrt.sources.models.yolov6.blocks import Blocks

STRIDES = (8, 16, 32)
BINS = 17  # of a distribution over distances 0..16, in cells
_PRIOR = 0.01  # the score of every class before training


class Head(nn.Module):
    """Features of three levels -> boxes and scores, or what each level says about them.

    ``decoded`` is one tensor (N, A, 5 + C) over all A cells of all levels: centre x and y, width,
    height in pixels of the input, 1, scores. ``raw`` are ``cls0``, ``reg0``, ``cls1``, ...: logits
    (N, C, h, w), and distances (N, 4, h, w) from the middle of a cell to left, top, right, bottom,
    in cells. The grid is a constant, so that the graph holds for one input size and any batch.

    With distributions (DFL), a distance is the mean of softmax over bins. The official code writes
    this sum as a convolution, ``proj_conv``; here it stays a product and a sum, which no quantizer
    takes for a layer.

    Args:
        blocks: how blocks are built.
        widths: channels of the three levels.
        num_classes: C.
        dfl: each distance is a distribution over `BINS` bins.
        form: what is returned.
    """

    def __init__(
        self,
        blocks: Blocks,
        widths: Sequence[int],
        num_classes: int,
        *,
        dfl: bool,
        form: DetectorHead,
    ) -> None:
        super().__init__()
        self.form, self.dfl = form, dfl
        distances = torch.arange(BINS, dtype=torch.float32)
        self.proj = nn.Parameter(distances, requires_grad=False)
        self.proj_conv = nn.Conv2d(BINS, 1, 1, bias=False)
        self.proj_conv.weight = nn.Parameter(distances.reshape(1, BINS, 1, 1), requires_grad=False)
        self.stems = nn.ModuleList(blocks.pointwise(width, width, "silu") for width in widths)
        specs = [ConvSpec(width, width) for width in widths]
        self.cls_convs = nn.ModuleList(blocks.conv(spec, "silu") for spec in specs)
        self.reg_convs = nn.ModuleList(blocks.conv(spec, "silu") for spec in specs)
        prior, sides = math.log(_PRIOR / (1 - _PRIOR)), 4 * (BINS if dfl else 1)
        self.cls_preds = nn.ModuleList(_predict(width, num_classes, prior) for width in widths)
        self.reg_preds = nn.ModuleList(_predict(width, sides, 1.0) for width in widths)

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return what ``form`` says; features are (N, width, H / stride, W / stride)."""
        levels = [self._level(index, x) for index, x in enumerate(features)]
        if self.form == "raw":
            pairs = [zip(("cls", "reg"), level, strict=True) for level in levels]
            return {f"{name}{i}": x for i, pair in enumerate(pairs) for name, x in pair}
        return _decoded(levels)

    def _level(self, index: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits (N, C, h, w) and distances (N, 4, h, w) of one level."""
        x = self.stems[index](x)
        logits = self.cls_preds[index](self.cls_convs[index](x))
        distances = self.reg_preds[index](self.reg_convs[index](x))
        if self.dfl:
            height, width = int(x.shape[2]), int(x.shape[3])
            bins = distances.reshape(-1, 4, BINS, height * width).softmax(dim=2)
            weights = self.proj_conv.weight.reshape(1, 1, BINS, 1)
            distances = (bins * weights).sum(dim=2).reshape(-1, 4, height, width)
        return logits, distances


def _predict(in_channels: int, out_channels: int, bias: float) -> nn.Conv2d:
    """Return a 1x1 convolution that starts near a constant."""
    layer = nn.Conv2d(in_channels, out_channels, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.constant_(layer.bias, bias)  # type: ignore[arg-type]
    return layer


def _decoded(levels: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return boxes and scores (N, A, 5 + C) of the logits and distances of all levels."""
    doubled, scales = _grid([(int(x.shape[2]), int(x.shape[3])) for x, _ in levels])
    logits, distances = (
        torch.cat([x.reshape(-1, int(x.shape[1]), x[0, 0].numel()) for x in tensors], dim=2)
        for tensors in zip(*levels, strict=True)
    )
    near, far = distances[:, :2], distances[:, 2:]
    cells = torch.cat((doubled.to(near.device) + far - near, near + far), dim=1)
    boxes = cells * scales.to(near.device)
    with_objectness = nn.functional.pad(boxes, (0, 0, 0, 1), value=1.0)
    return torch.cat((with_objectness, logits.sigmoid()), dim=1).transpose(1, 2)


def _grid(sizes: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the constants of the decoding, for A cells.

    They are twice the middles x, y of the cells (1, 2, A), in cells; and the pixels of one step of
    twice x and y, and of width and height (1, 4, A): half the stride twice, the stride twice.
    """
    doubled, scales = [], []
    for (height, width), stride in zip(sizes, STRIDES, strict=True):
        y, x = np.mgrid[:height, :width].reshape(2, -1)
        doubled.append(2 * np.stack([x, y]) + 1)
        scales.append(stride * np.tile([[0.5], [0.5], [1.0], [1.0]], height * width))
    first, second = (np.concatenate(arrays, axis=1)[None] for arrays in (doubled, scales))
    return torch.from_numpy(first.astype(np.float32)), torch.from_numpy(second.astype(np.float32))
