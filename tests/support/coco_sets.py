"""Small sets of images with boxes: files, COCO json, and the outputs of a detector for them."""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from PIL import Image

from reptrt.graph.preprocess import Fit, Preprocess, fit_of

NAMES = ("cat", "dog", "owl")
IDS = (7, 3, 11)  # of the categories, not in order: dog is class 0, cat 1, owl 2
ORDERED = ("dog", "cat", "owl")
SIZE = 64  # of the net's input
SIZES = ((96, 64), (64, 96), (48, 48), (150, 120), (64, 64))  # height, width


def preprocess(resize: str = "letterbox") -> Preprocess:
    return Preprocess(3, SIZE, SIZE, (0.0,) * 3, (1.0,) * 3, resize)  # type: ignore[arg-type]


def write_set(folder: Path, count: int = 12, seed: int = 0, same_size: bool = False) -> Path:
    """Write images into ``folder`` and their json beside it; return the json."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        high, wide = (SIZE, SIZE) if same_size else SIZES[index % len(SIZES)]
        name = f"{index:02d}.png"
        Image.fromarray(rng.integers(0, 256, (high, wide, 3), np.uint8)).save(folder / name)
        images.append({"id": 100 - index, "file_name": name, "height": high, "width": wide})
        for number in range(int(rng.integers(1, 6))):
            w, h = rng.uniform(6, 45, 2)
            if number == 0 and high == 150:
                w, h = rng.uniform(98, 110, 2)  # large, in COCO's sense
            x, y = rng.uniform(0, wide - w), rng.uniform(0, high - h)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 100 - index,
                    "category_id": int(rng.choice(IDS)),
                    "bbox": [float(x), float(y), float(w), float(h)],
                    "area": float(w * h),
                    "iscrowd": int(len(annotations) % 9 == 8),
                }
            )
    categories = [{"id": i, "name": n} for i, n in zip(IDS, NAMES, strict=True)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = folder.parent / f"instances_{folder.name}.json"
    path.write_text(json.dumps(content))
    return path


def fits_of(path: Path, resize: str = "letterbox") -> list[Fit]:
    images = sorted(json.loads(path.read_text())["images"], key=lambda image: image["file_name"])
    return [fit_of(resize, i["height"], i["width"], SIZE, SIZE) for i in images]  # type: ignore[arg-type]


def outputs_for(
    path: Path, resize: str = "letterbox", noise: float = 2.0, seed: int = 1, boxes: int = 30
) -> np.ndarray:
    """Return (N, A, 5 + C) in pixels of the input: centre, size, objectness, scores.

    Near each object is a box, of a random score; the other boxes are anywhere.
    """
    rng = np.random.default_rng(seed)
    content = json.loads(path.read_text())
    images = sorted(content["images"], key=lambda image: image["file_name"])
    rows = np.zeros((len(images), boxes, 5 + len(IDS)), np.float32)
    for index, (image, fit) in enumerate(zip(images, fits_of(path, resize), strict=True)):
        found = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        for number in range(boxes):
            row = rows[index, number]
            w, h = rng.uniform(6, 45, 2)
            box = np.array([*rng.uniform(0, 40, 2), w, h])
            scores = rng.uniform(0, 0.4, len(IDS))
            if number < len(found):
                box = np.array(found[number]["bbox"]) + rng.normal(0, noise, 4)
                scores[sorted(IDS).index(found[number]["category_id"])] = rng.uniform(0.2, 1)
            box[2:] += box[:2]
            x1, y1, x2, y2 = fit.boxes_in_input(box)
            row[:4] = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
            row[4] = rng.uniform(0.5, 1)
            row[5:] = scores
    return rows


def slow_detections(
    rows: np.ndarray, fits: Sequence[Fit], confidence: float, iou: float, most: int
) -> list[list[tuple[list[float], float, int]]]:
    """Return (x y w h, score, class) of each image, one box at a time, in plain Python."""
    result = []
    for image, fit in zip(rows.astype(np.float64), fits, strict=True):
        pairs = [
            (float(np.float32(row[4]) * np.float32(row[5 + k])), list(row[:4]), k)
            for row in image
            for k in range(len(row) - 5)
        ]
        kept: list[tuple[float, list[float], int]] = []
        for score, (cx, cy, w, h), k in sorted(pairs, key=lambda pair: -pair[0]):
            box = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
            if score <= confidence or len(kept) == most:
                break
            if all(k != other or _iou(box, kept_box) <= iou for _, kept_box, other in kept):
                kept.append((score, box, k))
        found = []
        for score, box, k in kept:
            sx, sy = fit.image_width / fit.scaled_width, fit.image_height / fit.scaled_height
            x1, x2 = ((value - fit.left) * sx for value in box[::2])
            y1, y2 = ((value - fit.top) * sy for value in box[1::2])
            found.append(([x1, y1, x2 - x1, y2 - y1], score, k))
        result.append(found)
    return result


def _iou(a: Sequence[float], b: Sequence[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def pycocotools_map(
    path: Path, found: Sequence[Sequence[tuple[list[float], float, int]]]
) -> tuple[np.ndarray, list[float]]:
    """Return the first six numbers of pycocotools' summary, and the mAP of each class."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        images = sorted(truth.dataset["images"], key=lambda image: image["file_name"])
        results = [
            {"image_id": image["id"], "category_id": sorted(IDS)[k], "bbox": box, "score": score}
            for image, of_image in zip(images, found, strict=True)
            for box, score, k in of_image
        ]
        judge = COCOeval(truth, truth.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    by_class = [judge.eval["precision"][:, :, k, 0, 2] for k in range(len(IDS))]
    return judge.stats[:6], [float(p[p > -1].mean()) for p in by_class]


def constant_detector(outputs: np.ndarray) -> onnx.ModelProto:
    """A net that gives the same ``outputs`` (A, K) for every image, plus its mean times 1e-6."""
    constants = [
        onnx.numpy_helper.from_array(outputs[None], "boxes"),
        onnx.numpy_helper.from_array(np.float32(1e-6), "tiny"),
    ]
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("ReduceMean", ["mean"], ["one"], axes=[1], keepdims=1),
        helper.make_node("Unsqueeze", ["one", "axis"], ["deep"]),
        helper.make_node("Mul", ["deep", "tiny"], ["small"]),
        helper.make_node("Add", ["small", "boxes"], ["y"]),
    ]
    constants.append(onnx.numpy_helper.from_array(np.array([2]), "axis"))
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", *outputs.shape])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(
        model, {"reptrt.preprocess": json.dumps(preprocess("letterbox").to_dict())}
    )
    return model
