"""Train the demo's YOLOv6 on pictures with digits, in about ten minutes on one core.

    python tools/train_digit_detector.py        writes reptrt/demo/digits_yolov6.pt

The pictures are those of `reptrt.demo.scenes`, with training digits and a seed of their own. Cells
are assigned to digits as in TOOD (Feng et al., 2021), which YOLOv6 uses too: those whose score and
box fit a digit best. The loss of scores is varifocal (Zhang et al., 2021), that of boxes GIoU
(Rezatofighi et al., 2019). As in tools/train_digits.py, each block with an identity branch
starts as the identity.
"""

import argparse
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from train_digits import start_as_identity

from reptrt.data.images import resized
from reptrt.demo import detector, scenes
from reptrt.demo.digits import Digits, load_digits
from reptrt.graph.preprocess import fit_of
from reptrt.sources.models import build
from reptrt.sources.models.yolov6.head import STRIDES

SEED = 2  # of the pictures: the sets of the demo have others
PICTURES, PASSES, BATCH = 6000, 8, 16
PEAK_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
CANDIDATES = 10  # cells that learn from a digit, at most
SCORE_POWER, OVERLAP_POWER = 1.0, 6.0  # of the fit between a cell and a digit
NEGATIVE_WEIGHT, NEGATIVE_POWER = 0.75, 2.0
BOX_WEIGHT = 2.5  # of the loss of boxes, relative to that of scores
MOST = scenes.MOST_DIGITS


class Pictures(NamedTuple):
    """Pictures as the net takes them, and up to M = `MOST` digits in each."""

    x: torch.Tensor  # (N, 3, H, W), uint8
    boxes: torch.Tensor  # (N, M, 4): x1, y1, x2, y2 in pixels of the input
    classes: torch.Tensor  # (N, M), -1: unused

    def chosen(self, indices: torch.Tensor) -> "Pictures":
        """Return some of the pictures."""
        return Pictures(*(values[indices] for values in self))


class Cells(NamedTuple):
    """The cells of all levels."""

    centres: torch.Tensor  # (A, 2): x, y in pixels
    strides: torch.Tensor  # (A,)


class Targets(NamedTuple):
    """What the cells should say."""

    scores: torch.Tensor  # (N, A, C): 0..1, 0 for all but the assigned class
    boxes: torch.Tensor  # (N, A, 4); of any value where all scores are 0


def main() -> None:
    """Train, and write the state dict in half precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=detector.WEIGHTS)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--passes", type=int, default=PASSES)
    given = parser.parse_args()
    torch.manual_seed(SEED)
    net = build("yolov6", replace(detector.ARCHITECTURE, head="raw"), deploy=False)
    start_as_identity(net)
    train(net, make_pictures(given.pictures), given.passes)
    state = {
        name: value.half() for name, value in net.state_dict().items() if value.is_floating_point()
    }  # without the counters of batch norms, which only training reads
    torch.save(state, given.output)
    print(f"{given.output}  {given.output.stat().st_size / 1024:.0f} KiB")


def make_pictures(count: int) -> Pictures:
    """Return so many letterboxed pictures."""
    draw = partial(make_picture, load_digits().train)
    with ProcessPoolExecutor() as pool:
        made = list(pool.map(draw, range(count), chunksize=50))
    x, boxes, classes = (np.stack(parts) for parts in zip(*made, strict=True))
    return Pictures(*(torch.from_numpy(values) for values in (x, boxes, classes)))


def make_picture(digits: Digits, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return one picture (3, H, W), its boxes (M, 4) and classes (M,)."""
    scene = scenes.make_scene(digits, SEED, index)
    size = detector.INPUT_SIZE[1:]
    image = resized(Image.fromarray(scene.pixels), *size, "letterbox")
    fit = fit_of("letterbox", *scene.pixels.shape[:2], *size)
    boxes, classes = np.zeros((MOST, 4), np.float32), np.full(MOST, -1)
    boxes[: len(scene.boxes)] = fit.boxes_in_input(scene.boxes)
    classes[: len(scene.boxes)] = scene.classes
    return np.asarray(image).transpose(2, 0, 1), boxes, classes


def train(net: nn.Module, pictures: Pictures, passes: int) -> None:
    """Train in place."""
    optimizer = torch.optim.SGD(
        net.parameters(), lr=PEAK_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    batches = len(pictures.x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, total_steps=passes * batches, pct_start=0.1
    )
    cells = make_cells(*detector.INPUT_SIZE[1:])
    net.train()
    for number in range(passes):
        total = 0.0
        for chosen in torch.randperm(len(pictures.x))[: batches * BATCH].split(BATCH):
            batch = pictures.chosen(chosen)
            loss = loss_of(net(recoloured(batch.x)), batch, cells)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"pass {number + 1} of {passes}: loss {total / batches:.3f}", flush=True)


def recoloured(x: torch.Tensor) -> torch.Tensor:
    """Return x / 255 with colours exchanged, and some pictures inverted or of another contrast."""
    count = len(x)
    values = x[torch.arange(count)[:, None], torch.rand(count, 3).argsort(dim=1)] / 255
    inverted = torch.rand(count, 1, 1, 1) < 0.5
    values = torch.where(inverted, 1 - values, values)
    contrast = torch.empty(count, 1, 1, 1).uniform_(0.7, 1.2)
    return ((values - 0.5) * contrast + 0.5).clamp(0, 1)


def make_cells(height: int, width: int) -> Cells:
    """Return the cells of an input of this size, finest level first, row by row."""
    centres, strides = [], []
    for stride in STRIDES:
        y, x = torch.meshgrid(
            torch.arange(height // stride), torch.arange(width // stride), indexing="ij"
        )
        centres.append((torch.stack((x, y), dim=-1).reshape(-1, 2) + 0.5) * stride)
        strides.append(torch.full((x.numel(),), float(stride)))
    return Cells(torch.cat(centres), torch.cat(strides))


def loss_of(outputs: Mapping[str, torch.Tensor], batch: Pictures, cells: Cells) -> torch.Tensor:
    """Return the loss of the raw heads on a batch, a number."""
    logits, distances = (
        torch.cat([outputs[f"{name}{level}"].flatten(2) for level in range(3)], dim=2).mT
        for name in ("cls", "reg")
    )
    near, far = (distances * cells.strides[:, None]).split(2, dim=2)
    boxes = torch.cat((cells.centres - near, cells.centres + far), dim=2)
    scores = logits.sigmoid()
    with torch.no_grad():
        targets = assign(scores, boxes, batch, cells)
    weight = torch.where(
        targets.scores > 0, targets.scores, NEGATIVE_WEIGHT * scores.detach() ** NEGATIVE_POWER
    )
    entropy = F.binary_cross_entropy_with_logits(logits, targets.scores, reduction="none")
    certainty = targets.scores.sum(dim=2)
    positive = certainty > 0
    shape = 1 - generalized_iou(boxes[positive], targets.boxes[positive])
    total = (entropy * weight).sum() + BOX_WEIGHT * (shape * certainty[positive]).sum()
    return total / certainty.sum().clamp(min=1)


def assign(scores: torch.Tensor, boxes: torch.Tensor, batch: Pictures, cells: Cells) -> Targets:
    """Let the cells that fit a digit best learn from it.

    The fit is score^a * IoU^b, of cells in the middle of a digit's box. The best cells of each
    digit are taken; their target score is the fit, scaled so that the best of a digit gets its IoU.

    Args:
        scores: (N, A, C), 0..1.
        boxes: (N, A, 4).
        batch: the pictures with their digits.
        cells: the A cells.
    """
    real = batch.classes >= 0  # (N, M)
    classes = batch.classes.clamp(min=0)
    overlap = generalized_iou(boxes[:, None], batch.boxes[:, :, None], plain=True)  # (N, M, A)
    of_class = scores.mT.gather(1, classes[..., None].expand(-1, -1, scores.shape[1]))
    usable = is_inside(cells, batch.boxes) & real[..., None]
    fit = of_class**SCORE_POWER * overlap**OVERLAP_POWER * usable
    least = fit.topk(CANDIDATES, dim=2).values[..., -1:]
    taken = (fit >= least) & (fit > 0)
    owner = torch.where(taken, overlap, -1.0).argmax(dim=1)  # (N, A): a cell has one digit
    own = F.one_hot(owner, MOST).mT.bool() & taken
    peak = (fit * own).amax(dim=2, keepdim=True).clamp(min=1e-12)
    best = (overlap * own).amax(dim=2, keepdim=True)
    certainty = (fit * own / peak * best).amax(dim=1)  # (N, A)
    target = F.one_hot(classes.gather(1, owner), scores.shape[2]) * certainty[..., None]
    return Targets(target, batch.boxes.gather(1, owner[..., None].expand(-1, -1, 4)))


def is_inside(cells: Cells, boxes: torch.Tensor) -> torch.Tensor:
    """Return whether the centre of a cell is in a box, (N, M, A); the nearest cells always are."""
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2
    half_sides = ((boxes[..., 2:] - boxes[..., :2]) / 2).clamp(min=STRIDES[0] / 2)
    away = (cells.centres - middle[:, :, None]).abs()
    return (away <= half_sides[:, :, None]).all(dim=-1)


def generalized_iou(one: torch.Tensor, other: torch.Tensor, *, plain: bool = False) -> torch.Tensor:
    """Return the GIoU, or the plain IoU, of boxes (..., 4) that broadcast, (...)."""
    common = torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(
        one[..., :2], other[..., :2]
    )
    areas = [(box[..., 2:] - box[..., :2]).prod(dim=-1) for box in (one, other)]
    intersection = common.clamp(min=0).prod(dim=-1)
    union = (areas[0] + areas[1] - intersection).clamp(min=1e-6)
    iou = intersection / union
    if plain:
        return iou.clamp(0, 1)
    around = (
        (torch.maximum(one[..., 2:], other[..., 2:]) - torch.minimum(one[..., :2], other[..., :2]))
        .clamp(min=0)
        .prod(dim=-1)
    )
    return iou - (around - union) / around.clamp(min=1e-6)


if __name__ == "__main__":
    main()
