"""The values that options with a fixed set of values can take; importing this is cheap."""

from typing import Literal

OPSETS = range(13, 21)  # that TensorRT 10.x and 11.x take

BoxForm = Literal["auto", "xyxy", "xywh"]  # reptrt.graph.detector_layouts
DetectorForm = Literal[  # reptrt.graph.detector_layouts
    "auto", "xywh-obj-cls", "ultralytics", "boxes-scores", "raw", "xyxy-score-class", "nms"
]
DetectorHead = Literal["decoded", "raw"]  # reptrt.sources.models.yolov6
Device = Literal["cpu", "cuda", "tensorrt"]  # execution provider of onnxruntime
Effort = Literal["fast", "balanced", "accurate"]  # our recipes, by the work that is spent
HighPrecision = Literal["fp32", "fp16"]  # reptrt.rewrite.to_fp16
InputValues = Literal["normalized", "pixels", "bytes"]  # reptrt.graph.preprocess
Layout = Literal["NCHW", "NHWC"]  # of a network's input
Metric = Literal["auto", "top1", "map", "miou", "agreement", "sqnr"]  # reptrt.search.judging
Recipe = Literal[Effort, "cfws", "repapq"]  # reptrt.pipeline.recipes
Rounding = Literal["nearest", "gptq", "learned", "adaround"]  # quantize.{rounding,reconstruct}
Rule = Literal["max", "percentile", "mse", "mae", "entropy", "kl"]  # quantize.calib.thresholds
TargetName = Literal["tensorrt", "onnxruntime"]  # reptrt.quantize.targets
TaskName = Literal["classify", "detect", "segment", "any"]  # reptrt.judge.tasks
Threshold = Literal["auto", Rule]
Resize = Literal["none", "stretch", "crop", "letterbox"]  # reptrt.graph.preprocess
RunnerKind = Literal["auto", "ort", "tensorrt"]  # reptrt.execute.runner
SplitForm = Literal["none", "identity-scalar", "identity", "coarse-fine"]
SplitMode = Literal["auto", SplitForm]  # reptrt.quantize.choose
SplitPrecision = Literal["float", "int8"]  # reptrt.graph.splits
TorchDevice = Literal["cpu", "cuda"]
