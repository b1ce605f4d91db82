"""What detectors find, as the report of a run shows it: pictures of a few images, and curves.

    {"classes": ["cat", ...],
     "pictures": [{"name": "01.jpg", "width": 640, "height": 480, "jpeg": base64,
                   "objects": [[x1, y1, x2, y2, class], ...]}, ...],
     "results": [{"file": "float.onnx",
                  "curves": [[precision at recall 0, 0.01, ..., 1] or null for each class],
                  "boxes": [[[x1, y1, x2, y2, class, score], ...] for each picture]}, ...]}

The images are spread evenly over those that were judged. Boxes are in pixels of the image; those
with a score below ``CONFIDENCE`` are left out.
"""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reptrt.core.arrays import Float64Array
from reptrt.judge.detect.boxes import Detections
from reptrt.judge.evaluate import EvalReport
from reptrt.judge.tasks.detect import Found

PICTURES = 6
CONFIDENCE = 0.25
_LONG_SIDE = 480  # pixels of a picture
_QUALITY = 80  # of JPEG


def shown_detections(report: EvalReport, images: Path) -> dict[str, Any]:
    """Return what a report shows of the detections in a folder of images.

    Args:
        report: of detectors, judged on the same images.
        images: the folder.
    """
    found: list[Found] = [result.findings for result in report.results]
    first, length = found[0], len(found[0].files)
    chosen = [index * length // PICTURES for index in range(PICTURES)]
    chosen = list(dict.fromkeys(chosen))
    return {
        "classes": list(first.class_names),
        "pictures": [_picture(images, first, index) for index in chosen],
        "results": [
            {
                "file": result.file,
                "curves": [_curve(curve) for curve in of.scores.curves],
                "boxes": [_boxes(of.detections[index]) for index in chosen],
            }
            for result, of in zip(report.results, found, strict=True)
        ],
    }


def _picture(folder: Path, found: Found, index: int) -> dict[str, Any]:
    with Image.open(folder / found.files[index]) as image:
        width, height = image.size
        small = image.convert("RGB")
    small.thumbnail((_LONG_SIDE, _LONG_SIDE))
    content = io.BytesIO()
    small.save(content, "JPEG", quality=_QUALITY)
    objects = found.objects[index]
    return {
        "name": found.files[index],
        "width": width,
        "height": height,
        "jpeg": base64.b64encode(content.getvalue()).decode(),
        "objects": [
            [*_rounded(box), int(kind)]
            for box, kind in zip(objects.boxes, objects.classes, strict=True)
        ],
    }


def _boxes(found: Detections) -> list[list[float]]:
    return [
        [*_rounded(box), int(kind), round(float(score), 3)]
        for box, score, kind in zip(found.boxes, found.scores, found.classes, strict=True)
        if score >= CONFIDENCE
    ]


def _rounded(box: Float64Array) -> list[float]:
    return [round(float(side), 1) for side in box]


def _curve(precision: Float64Array) -> list[float] | None:
    """Return the precisions of one class; None if there was nothing to find."""
    return None if precision.min() < 0 else np.round(precision, 4).tolist()
