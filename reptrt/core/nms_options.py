"""Options of non-maximum suppression; importing this loads nothing heavy."""

from dataclasses import dataclass

from reptrt.core.choices import BoxForm, DetectorForm
from reptrt.core.option_fields import check_bounds, described

PLUGIN = "EfficientNMS_TRT"  # of TensorRT's own plugins


@dataclass(frozen=True, slots=True)
class NmsOptions:
    """Whether NMS is appended to a detector, how it suppresses, and what the outputs mean."""

    append: bool = described(
        False,
        "Append NMS to a detector: the outputs become num_detections, detection_boxes, "
        "detection_scores and detection_classes.",
        flag="--nms",
    )
    confidence: float = described(
        0.25, "Score above which NMS keeps a box.", minimum=0.0, maximum=1.0
    )
    iou: float = described(
        0.65,
        "Overlap (intersection over union) above which NMS drops the box with the lower score.",
        minimum=0.0,
        maximum=1.0,
    )
    max_boxes: int = described(100, "Boxes that NMS returns for an image, at most.", minimum=1)
    class_agnostic: bool = described(
        False, "Let boxes suppress those of other classes too; default: each class alone."
    )
    layout: DetectorForm = described(
        "auto", "What the outputs of the detector mean; auto finds it by their shapes."
    )
    boxes: BoxForm = described(
        "auto",
        "How the detector writes a box: xyxy for two corners, xywh for centre and size; auto is "
        "what is usual for the layout.",
    )

    def __post_init__(self) -> None:
        check_bounds(self)
