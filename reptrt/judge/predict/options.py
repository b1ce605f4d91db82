"""Options of predict; importing this loads nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reptrt.core.choices import BoxForm, DetectorForm, Resize
from reptrt.core.option_fields import check_bounds, described, require_at_least
from reptrt.judge.options import RunnerOptions


@dataclass(frozen=True, slots=True)
class PredictOptions(RunnerOptions):
    """Options of `predict`."""

    task: Literal["auto", "classify", "detect"] = described(
        "auto",
        "Meaning of the outputs: scores of classes, or boxes; auto finds it by their shapes.",
    )
    labels: Path | None = described(
        None,
        "Names of the classes: a text file with one a line, in the order of the outputs, or a COCO "
        "file; default: class 0, class 1...",
    )
    confidence: float = described(
        0.25, "detect: score above which a box is drawn.", minimum=0.0, maximum=1.0
    )
    iou: float = described(
        0.65,
        "detect: overlap above which the box with the lower score is left out, in each class.",
        minimum=0.0,
        maximum=1.0,
    )
    max_boxes: int = described(100, "detect: boxes in an image, at most.", minimum=1)
    layout: DetectorForm = described(
        "auto", "detect: what the outputs mean; auto finds it by their shapes."
    )
    boxes: BoxForm = described(
        "auto", "detect: how a box is written: two corners (xyxy), or centre and size (xywh)."
    )
    resize: Resize | None = described(
        None,
        "How an image is fitted to the input; default: as the file says, and letterbox for a "
        "detector that says nothing.",
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        require_at_least(1, self, "threads")
