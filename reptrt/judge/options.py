"""Options of evaluate, rank_layers and bench; importing this loads nothing heavy."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from reptrt.core.choices import BoxForm, DetectorForm, Device, RunnerKind, TaskName
from reptrt.core.errors import ConfigError, option
from reptrt.core.option_fields import check_bounds, described, require_at_least
from reptrt.pipeline.options import CalibrateOptions

BATCH = 64  # images that are run at a time


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """How files are run."""

    runner: RunnerKind = described(
        "auto",
        "Runtime: ort (onnxruntime) for .onnx files, tensorrt for .engine files; auto decides by "
        "the suffix of each file.",
    )
    device: Device = described(
        "cpu",
        "Where onnxruntime runs: cpu, cuda, or tensorrt (its TensorRT provider, which builds an "
        "engine from the .onnx file itself).",
    )
    threads: int | None = described(None, "CPU threads of onnxruntime; default: one for each core.")


# No slots: classes with options of two kinds inherit from this one too.
@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What the outputs mean, and what is right."""

    task: TaskName = described(
        "classify",
        "Meaning of the outputs: classify for scores of classes; detect for boxes, judged by mAP; "
        "segment for classes of pixels, judged by mIoU; any compares with the reference "
        "alone.",
    )
    annotations: Path | None = described(
        None,
        "detect: COCO json with the boxes of the images; default: instances_NAME.json beside the "
        "folder NAME, or one of the other usual names. segment: folder of PNG masks, each named "
        "as its image, with a class for each pixel, 255 for none.",
    )
    layout: DetectorForm = described(
        "auto", "detect: where boxes and scores stand in the outputs; auto finds it by shapes."
    )
    boxes: BoxForm = described(
        "auto",
        "detect: numbers of a box: two corners (xyxy), or centre and size (xywh); auto is the "
        "usual form of the layout, of boxes-scores what the values say.",
    )
    confidence: float = described(
        0.001, "detect: detections with a lower score are left out.", minimum=0, maximum=1
    )
    iou: float = described(
        0.65,
        "detect: of two boxes of one class that overlap more, the one with the lower score is "
        "left out (non-maximum suppression).",
        minimum=0,
        maximum=1,
    )
    max_boxes: int = described(100, "detect: most detections in an image.")
    clip: bool = described(
        False, "detect: cut boxes off at the border of the image before they are judged."
    )
    subset: bool = described(
        False,
        "detect: judge by the images of the folder alone if the annotations list more, as COCO's "
        "tools do; without it, they are refused.",
    )

    def __post_init__(self) -> None:
        require_at_least(1, self, "max_boxes")
        check_bounds(self)

    @property
    def of_task(self) -> "TaskOptions":
        """These options without those of a subclass."""
        return TaskOptions(**{item.name: getattr(self, item.name) for item in fields(TaskOptions)})


@dataclass(frozen=True, slots=True)
class EvaluateOptions(TaskOptions, RunnerOptions):
    """Options of `evaluate`."""

    reference: Path | None = described(
        None, "Float file to compare the outputs with; it does not have to be one of FILES."
    )
    limit: int | None = described(None, "Number of images, sampled from the data; default: all.")
    batch_size: int = described(BATCH, "Number of images that are run at a time.")
    seed: int = 0  # for sampling images

    def __post_init__(self) -> None:
        TaskOptions.__post_init__(self)
        require_at_least(1, self, "limit", "batch_size", "threads")
        require_at_least(0, self, "seed")


@dataclass(frozen=True)  # no slots: as TaskOptions
class RankOptions(TaskOptions):
    """Options of `rank_layers`."""

    layers: int = described(
        10,
        "Number of layers that are judged by the task, those with the largest error of the "
        "outputs; each costs half a forward pass for every image.",
    )
    eval_limit: int | None = described(
        None, "Number of images to judge on, sampled from the data; default: all."
    )
    calibrate: CalibrateOptions = field(default_factory=CalibrateOptions)

    def __post_init__(self) -> None:
        TaskOptions.__post_init__(self)
        require_at_least(1, self, "layers", "eval_limit")


@dataclass(frozen=True, slots=True)
class BenchOptions(RunnerOptions):
    """Options of `bench`."""

    batches: tuple[int, ...] | None = described(
        None,
        "Batch sizes to time; default: the one that a file has fixed, or 1.",
        flag="--batch",
    )
    baseline: Path | None = described(None, "File that the ratios of latencies refer to.")
    min_seconds: float = described(
        2.0, "Seconds to measure each file at each batch size, in 10 rounds or more."
    )
    warmup_seconds: float = described(
        0.5, "Seconds to warm up each file at each batch size before it is measured."
    )
    host_copies: bool = described(True, "Include host-GPU copies in the time of engines.")
    seed: int = 0  # for inputs, the order of runs and the bootstrap

    def __post_init__(self) -> None:
        if self.batches is not None and min(self.batches, default=0) < 1:
            raise ConfigError(
                f"{option('batches')}: got {self.batches}, expected positive batch sizes"
            )
        require_at_least(1, self, "threads")
        require_at_least(0, self, "min_seconds", "warmup_seconds", "seed")
