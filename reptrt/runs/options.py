"""Options of a run; importing this loads nothing heavy."""

from dataclasses import dataclass, field

from reptrt.core.option_fields import described, require_at_least
from reptrt.judge.options import TaskOptions
from reptrt.pipeline.options import CalibrateOptions, ExportOptions
from reptrt.trt.options import BuildOptions


@dataclass(frozen=True, slots=True)
class RunOptions(TaskOptions):
    """Options of every stage of a run, and what the outputs of the net mean."""

    export: ExportOptions = field(default_factory=ExportOptions)
    calibrate: CalibrateOptions = field(default_factory=CalibrateOptions)
    build: BuildOptions = field(default_factory=BuildOptions)
    eval_limit: int | None = described(
        None, "Number of images to judge on, sampled from the data; default: all."
    )
    batches: tuple[int, ...] = described((1, 8), "Batch sizes to time.", flag="--batch")
    threads: int | None = described(None, "CPU threads of onnxruntime; default: one for each core.")
    diagnose: bool = described(
        True, "Measure the effect of quantization on every layer, for the report."
    )
    bench_seconds: float = described(
        2.0,
        "Seconds to measure each file at each batch size, after a quarter of it to warm up.",
    )

    def __post_init__(self) -> None:
        TaskOptions.__post_init__(self)
        require_at_least(1, self, "eval_limit", "threads")
