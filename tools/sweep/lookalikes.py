"""Small nets in the forms of detectors and segmentation nets, written from their papers.

They have the forms that matter for export and calibration (rep blocks in a pyramid, decoupled
heads, boxes that are decoded behind the last layer, transposed convolutions, bilinear upsampling,
dilations), and few channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reptrt.sources.models.layers import ConvSpec
from reptrt.sources.models.repvgg import RepVGGBlock

CLASSES = 10
_BINS = 16  # of the distribution of a box side
_STRIDES = (8, 16)


class ConvAct(nn.Sequential):
    """conv -> bn -> activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        *,
        dilation: int = 1,
        act: nn.Module | None = None,
    ) -> None:
        padding = dilation * (kernel // 2)
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False),
            nn.BatchNorm2d(outputs),
            nn.SiLU() if act is None else act,
        )


class Bottleneck(nn.Module):
    """Two 3x3 convolutions and the sum with the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvAct(width, width, 3), ConvAct(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + cv2(cv1(x))."""
        y: Tensor = x + self.cv2(self.cv1(x))
        return y


class C2f(nn.Module):
    """The block of YOLOv8: every bottleneck's output goes into one concatenation."""

    def __init__(self, inputs: int, outputs: int, count: int = 1) -> None:
        super().__init__()
        half = outputs // 2
        self.cv1 = ConvAct(inputs, outputs)
        self.cv2 = ConvAct((2 + count) * half, outputs)
        self.m = nn.ModuleList(Bottleneck(half) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """Return cv2 of both halves and of all that follows from the second."""
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            parts.append(block(parts[-1]))
        y: Tensor = self.cv2(torch.cat(parts, 1))
        return y


class C3(nn.Module):
    """The block of YOLOv5: bottlenecks beside a plain convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.cv1, self.cv2 = ConvAct(inputs, half), ConvAct(inputs, half)
        self.cv3, self.m = ConvAct(2 * half, outputs), Bottleneck(half)

    def forward(self, x: Tensor) -> Tensor:
        """Return cv3 of both ways."""
        y: Tensor = self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))
        return y


class SPPF(nn.Module):
    """Three max pools in a row, concatenated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvAct(width, width // 2), ConvAct(2 * width, width)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return cv2 of the input and its pools."""
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(self.m(parts[-1]))
        y: Tensor = self.cv2(torch.cat(parts, 1))
        return y


class Pyramid(nn.Module):
    """A backbone with two scales, and the way down and up between them."""

    def __init__(self, kind: str, up: nn.Module) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Module:
            if kind == "rep":
                return RepVGGBlock(ConvSpec(inputs, outputs, 3))
            return (C2f if kind == "c2f" else C3)(inputs, outputs)

        def down(inputs: int, outputs: int) -> nn.Module:
            if kind == "rep":
                return RepVGGBlock(ConvSpec(inputs, outputs, 3, 2))
            return ConvAct(inputs, outputs, 3, 2)

        self.stem = nn.Sequential(down(3, 16), down(16, 32), block(32, 32))
        self.p3 = nn.Sequential(down(32, 64), block(64, 64))
        self.p4 = nn.Sequential(down(64, 96), block(96, 96), SPPF(96))
        self.lateral, self.up = ConvAct(96, 64), up
        self.n3, self.down, self.n4 = block(128, 64), down(64, 64), block(128, 96)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps of stride 8 (64 channels) and 16 (96 channels)."""
        p3 = self.p3(self.stem(x))
        p4 = self.lateral(self.p4(p3))
        n3 = self.n3(torch.cat((self.up(p4), p3), 1))
        return n3, self.n4(torch.cat((self.down(n3), p4), 1))


def _grids(maps: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return the centres (2, A) and strides (1, A) of all places, in the order of the maps."""
    centres, strides = [], []
    for stride, value in zip(_STRIDES, maps, strict=True):
        rows, columns = torch.arange(value.shape[2]) + 0.5, torch.arange(value.shape[3]) + 0.5
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        centres.append(torch.stack((x, y)).flatten(1))
        strides.append(torch.full((1, x.numel()), float(stride)))
    return torch.cat(centres, 1), torch.cat(strides, 1)


class Yolo8(nn.Module):
    """C2f, and a head that decodes boxes from distributions: (N, 4 + classes, A)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Pyramid("c2f", nn.Upsample(scale_factor=2, mode="nearest"))
        self.cv2 = nn.ModuleList(
            nn.Sequential(ConvAct(c, 64, 3), nn.Conv2d(64, 4 * _BINS, 1)) for c in (64, 96)
        )
        self.cv3 = nn.ModuleList(
            nn.Sequential(ConvAct(c, 64, 3), nn.Conv2d(64, CLASSES, 1)) for c in (64, 96)
        )
        self.dfl = nn.Conv2d(_BINS, 1, 1, bias=False)
        self.dfl.weight.data = torch.arange(_BINS, dtype=torch.float32).view(1, _BINS, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return boxes in pixels and scores, concatenated."""
        return self.decode(self.body(x))

    def decode(self, maps: tuple[Tensor, Tensor]) -> Tensor:
        """Return the same of the pyramid's maps."""
        sides = [head(m).flatten(2) for head, m in zip(self.cv2, maps, strict=True)]
        scores = [head(m).flatten(2) for head, m in zip(self.cv3, maps, strict=True)]
        boxes = torch.cat(sides, 2).unflatten(1, (4, _BINS)).transpose(1, 2).softmax(1)
        left_top, right_bottom = self.dfl(boxes).squeeze(1).chunk(2, 1)
        centres, strides = _grids(maps)
        first, last = centres - left_top, centres + right_bottom
        pixels = torch.cat(((first + last) / 2, last - first), 1) * strides
        return torch.cat((pixels, torch.cat(scores, 2).sigmoid()), 1)


class Yolo5(nn.Module):
    """C3, and a head with anchors: (N, places x anchors, 5 + classes)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Pyramid("c3", nn.Upsample(scale_factor=2, mode="nearest"))
        self.m = nn.ModuleList(nn.Conv2d(c, 3 * (5 + CLASSES), 1) for c in (64, 96))
        self.register_buffer("anchors", torch.rand(2, 1, 3, 1, 1, 2) * 60 + 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return centre, size, objectness and class scores of every anchor."""
        rows = []
        for head, value, anchors, stride in zip(
            self.m, self.body(x), self.anchors, _STRIDES, strict=True
        ):
            ny, nx = value.shape[2:]
            y = head(value).view(-1, 3, 5 + CLASSES, ny, nx).permute(0, 1, 3, 4, 2).sigmoid()
            grid_y, grid_x = torch.meshgrid(torch.arange(ny), torch.arange(nx), indexing="ij")
            grid = torch.stack((grid_x, grid_y), 2).view(1, 1, ny, nx, 2) - 0.5
            xy, wh, conf = y.split((2, 2, 1 + CLASSES), 4)
            parts = ((xy * 2 + grid) * stride, (wh * 2) ** 2 * anchors, conf)
            rows.append(torch.cat(parts, 4).flatten(1, 3))
        return torch.cat(rows, 1)


class Yolo6(nn.Module):
    """RepVGG blocks in backbone and neck, transposed convolution, decoupled head: dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Pyramid("rep", nn.ConvTranspose2d(64, 64, 2, 2))
        self.stems = nn.ModuleList(ConvAct(c, 64) for c in (64, 96))
        self.ways = nn.ModuleList(
            nn.ModuleList(ConvAct(64, 64, 3) for _ in range(2)) for _ in range(2)
        )
        self.cls = nn.ModuleList(nn.Conv2d(64, CLASSES, 1) for _ in range(2))
        self.reg = nn.ModuleList(nn.Conv2d(64, 4, 1) for _ in range(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return boxes (N, A, 4) in pixels and scores (N, A, classes)."""
        maps = self.body(x)
        boxes, scores = [], []
        for index, value in enumerate(maps):
            y = self.stems[index](value)
            scores.append(self.cls[index](self.ways[index][0](y)).sigmoid().flatten(2))
            boxes.append(self.reg[index](self.ways[index][1](y)).flatten(2))
        centres, strides = _grids(maps)
        left_top, right_bottom = torch.cat(boxes, 2).chunk(2, 1)
        corners = torch.cat((centres - left_top, centres + right_bottom), 1) * strides
        return {"boxes": corners.transpose(1, 2), "scores": torch.cat(scores, 2).transpose(1, 2)}


class Yolo8Seg(nn.Module):
    """A detection head with mask coefficients, and prototypes of the masks: nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.detect = Yolo8()
        self.proto = nn.Sequential(
            ConvAct(64, 32, 3), nn.ConvTranspose2d(32, 32, 2, 2), ConvAct(32, 32, 3), ConvAct(32, 8)
        )
        self.coefficients = nn.ModuleList(
            nn.Sequential(ConvAct(c, 32, 3), nn.Conv2d(32, 8, 1)) for c in (64, 96)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return detections, coefficients (N, 8, A) and prototypes (N, 8, H / 4, W / 4)."""
        maps = self.detect.body(x)
        parts = [head(m).flatten(2) for head, m in zip(self.coefficients, maps, strict=True)]
        return self.detect.decode(maps), (torch.cat(parts, 2), self.proto(maps[0]))


class UNet(nn.Module):
    """Double convolutions, max pools, transposed convolutions and skips."""

    def __init__(self) -> None:
        super().__init__()

        def double(inputs: int, outputs: int) -> nn.Module:
            first = ConvAct(inputs, outputs, 3, act=nn.ReLU())
            return nn.Sequential(first, ConvAct(outputs, outputs, 3, act=nn.ReLU()))

        self.d1, self.d2, self.d3 = double(3, 16), double(16, 32), double(32, 64)
        self.up2, self.up1 = nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
        self.u2, self.u1 = double(64, 32), double(32, 16)
        self.head = nn.Conv2d(16, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes, H, W)."""
        a = self.d1(x)
        b = self.d2(F.max_pool2d(a, 2))
        c = self.d3(F.max_pool2d(b, 2))
        b = self.u2(torch.cat((b, self.up2(c)), 1))
        y: Tensor = self.head(self.u1(torch.cat((a, self.up1(b)), 1)))
        return y


class DeepLab(nn.Module):
    """RepVGG backbone, dilated convolutions beside a pooled one, bilinear upsampling: dict."""

    def __init__(self) -> None:
        super().__init__()
        specs = (ConvSpec(3, 32, 3, 2), ConvSpec(32, 32, 3), ConvSpec(32, 64, 3, 2))
        self.low = nn.Sequential(*map(RepVGGBlock, specs))
        self.high = nn.Sequential(
            RepVGGBlock(ConvSpec(64, 96, 3, 2)), RepVGGBlock(ConvSpec(96, 96, 3))
        )
        relu = nn.ReLU()
        self.aspp = nn.ModuleList(
            [ConvAct(96, 32, act=relu)]
            + [ConvAct(96, 32, 3, dilation=rate, act=relu) for rate in (2, 4)]
        )
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(96, 32, 1), nn.ReLU())
        self.project, self.reduce = ConvAct(128, 64, act=relu), ConvAct(64, 16, act=relu)
        self.last, self.head = ConvAct(80, 64, 3, act=relu), nn.Conv2d(64, CLASSES, 1)
        self.aux = nn.Conv2d(96, CLASSES, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return logits of the net ("out") and of its auxiliary head ("aux"), in full size."""
        low = self.low(x)
        high = self.high(low)
        size = high.shape[2:]
        pooled = F.interpolate(self.pooled(high), size=size, mode="bilinear", align_corners=False)
        y = self.project(torch.cat([*(way(high) for way in self.aspp), pooled], 1))
        y = F.interpolate(y, size=low.shape[2:], mode="bilinear", align_corners=False)
        logits = self.head(self.last(torch.cat((y, self.reduce(low)), 1)))
        maps = {"out": logits, "aux": self.aux(high)}
        return {
            name: F.interpolate(value, size=x.shape[2:], mode="bilinear", align_corners=False)
            for name, value in maps.items()
        }


def fused(module: nn.Module) -> nn.Module:
    """Return a net in the structure that the authors' ``fuse()`` leaves: for counting only.

    A rep block becomes one convolution, and a batch norm behind a convolution is gone.
    """
    for name, child in module.named_children():
        if isinstance(child, RepVGGBlock):
            setattr(module, name, nn.Conv2d(1, 1, 3))
        elif isinstance(child, ConvAct):
            child[1] = nn.Identity()
        else:
            fused(child)
    return module
