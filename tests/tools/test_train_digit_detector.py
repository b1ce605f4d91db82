"""tools/train_digit_detector.py: cells against loops over cells and digits, IoU against pixels."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from reptrt.demo import detector, scenes
from reptrt.demo.digits import load_digits
from reptrt.sources.models import build
from tests.support.helpers import load_tool

tool = load_tool("train_digit_detector")
SIZE = detector.INPUT_SIZE[1:]
DIGITS = load_digits().train


def covered(box: np.ndarray) -> np.ndarray:
    pixels = np.zeros((40, 40), bool)
    x1, y1, x2, y2 = box.astype(int)
    pixels[y1:y2, x1:x2] = True
    return pixels


def test_iou_is_that_of_pixels() -> None:
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 20, (2, 30, 2))
    one, other = np.concatenate([corners, corners + rng.integers(1, 20, (2, 30, 2))], axis=2)
    boxes = [torch.from_numpy(values.astype(np.float32)) for values in (one, other)]
    plain, generalized = (
        tool.generalized_iou(*boxes, plain=plain).numpy() for plain in (True, False)
    )
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        first, second = covered(a), covered(b)
        union = (first | second).sum()
        iou = (first & second).sum() / union
        rows, columns = np.nonzero(first | second)
        around = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert plain[index] == pytest.approx(iou, abs=1e-6)
        assert generalized[index] == pytest.approx(iou - (around - union) / around, abs=1e-5)


def test_cells_are_assigned_as_loops_would_assign_them() -> None:
    torch.manual_seed(0)
    made = [tool.make_picture(DIGITS, index) for index in range(6)]
    batch = tool.Pictures(*(torch.from_numpy(np.stack(p)) for p in zip(*made, strict=True)))
    cells = tool.make_cells(*SIZE)
    sides = torch.rand(6, len(cells.centres), 2) * 40 + 10
    middles = cells.centres + torch.randn(6, len(cells.centres), 2) * 3
    boxes = torch.cat((middles - sides / 2, middles + sides / 2), dim=2)
    scores = torch.rand(6, len(cells.centres), 10)
    got = tool.assign(scores, boxes, batch, cells)
    for n in range(6):
        digits = [i for i in range(scenes.MOST_DIGITS) if batch.classes[n, i] >= 0]
        overlap = np.zeros((len(digits), len(cells.centres)))
        fit = np.zeros_like(overlap)
        for i, digit in enumerate(digits):
            box = batch.boxes[n, digit]
            half = ((box[2:] - box[:2]) / 2).clamp(min=4)
            for a, centre in enumerate(cells.centres):
                overlap[i, a] = tool.generalized_iou(boxes[n, a], box, plain=True)
                if ((centre - (box[:2] + box[2:]) / 2).abs() <= half).all():
                    fit[i, a] = scores[n, a, batch.classes[n, digit]] * overlap[i, a] ** 6
        taken = [set(np.argsort(-row)[:10]) & set(np.flatnonzero(row)) for row in fit]
        owner = {}
        for a in set().union(*taken):
            owner[a] = max(
                (i for i in range(len(digits)) if a in taken[i]), key=lambda i: overlap[i, a]
            )
        target = np.zeros((len(cells.centres), 10))
        for a, i in owner.items():
            own = [b for b, owner_of_b in owner.items() if owner_of_b == i]
            scale = max(overlap[i, own]) / max(fit[i, own])
            target[a, batch.classes[n, digits[i]]] = fit[i, a] * scale
            np.testing.assert_array_equal(got.boxes[n, a], batch.boxes[n, digits[i]])
        np.testing.assert_allclose(got.scores[n], target, atol=1e-5)


def test_cells_are_those_that_the_net_decodes() -> None:
    """Oracle: the decoded output of an untrained net, whose boxes are about cells."""
    torch.manual_seed(0)
    cells = tool.make_cells(*SIZE)
    nets = {}
    for head in ("raw", "decoded"):
        torch.manual_seed(0)
        nets[head] = build("yolov6", replace(detector.ARCHITECTURE, head=head), deploy=False).eval()
    x = torch.rand(1, *detector.INPUT_SIZE)
    with torch.inference_mode():
        raw, decoded = nets["raw"](x), nets["decoded"](x)
    distances = torch.cat([raw[f"reg{level}"].flatten(2) for level in range(3)], dim=2).mT
    near, far = (distances * cells.strides[:, None]).split(2, dim=2)
    corners = cells.centres - near, cells.centres + far
    torch.testing.assert_close(decoded[..., :2], (corners[0] + corners[1]) / 2, atol=1e-3, rtol=0)
    torch.testing.assert_close(decoded[..., 2:4], corners[1] - corners[0], atol=1e-3, rtol=0)


def test_pictures_are_letterboxed_with_their_boxes() -> None:
    x, boxes, classes = tool.make_picture(DIGITS, 3)
    scene = scenes.make_scene(DIGITS, tool.SEED, 3)
    assert x.shape == detector.INPUT_SIZE
    count = len(scene.boxes)
    assert classes.tolist() == [*scene.classes.tolist(), *[-1] * (scenes.MOST_DIGITS - count)]
    height, width = scene.pixels.shape[:2]
    scale = 96 / max(height, width)
    border = np.array([(96 - width * scale) / 2, (96 - height * scale) / 2] * 2)
    np.testing.assert_allclose(boxes[:count], scene.boxes * scale + border, atol=1e-3)


def test_the_seed_is_that_of_no_set() -> None:
    assert tool.SEED not in scenes.SEEDS.values()


@pytest.mark.slow
def test_a_little_training_lowers_the_loss(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    net = build("yolov6", replace(detector.ARCHITECTURE, head="raw"), deploy=False)
    tool.start_as_identity(net)
    made = [tool.make_picture(DIGITS, index) for index in range(64)]
    pictures = tool.Pictures(*(torch.from_numpy(np.stack(p)) for p in zip(*made, strict=True)))
    tool.train(net, pictures, passes=4)
    losses = [float(line.rsplit(" ", 1)[1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < losses[0]
