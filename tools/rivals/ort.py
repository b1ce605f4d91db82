"""onnxruntime.quantization, with the options its documentation and examples give for TensorRT.

These are symmetric INT8 activations and weights, weights per channel, float biases, and Q/DQ pairs
before the layers but not behind Conv, Gemm, MatMul and Add, after `quant_pre_process`. Its
calibrators get one batch at a time, as in its examples, so that they do not have to keep the
activations of all images.

Options: ``method`` is MinMax, Entropy or Percentile. ``num_bins`` is the number of bins of the
histogram (Entropy cannot clip with its default of 128 bins, which are as many as codes).
``unsigned`` uses UINT8 activations with a zero point and INT32 biases, which it recommends for CPUs
with VNNI.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
from job import Job, run
from onnxruntime.quantization import (  # noqa: TID251  # an environment of its own
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    create_calibrator,
    quantize_static,
)
from onnxruntime.quantization.calibrate import save_tensors_data  # noqa: TID251
from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: TID251

_TENSORRT = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "QuantizeBias": False,
    "OpTypesToExcludeOutputQuantization": ["Conv", "Gemm", "MatMul", "Add"],
}


class OneBatch(CalibrationDataReader):
    """One batch of images."""

    def __init__(self, feeds: dict[str, Any]) -> None:
        self._feeds: dict[str, Any] | None = feeds

    def get_next(self) -> dict[str, Any] | None:
        """Return the batch by input name, then None."""
        feeds, self._feeds = self._feeds, None
        return feeds


def calibrate(job: Job, prepared: Path, folder: Path) -> Path:
    """Write the ranges of all activations; return the path of the file."""
    extra = {name: job.options[name] for name in ("num_bins",) if name in job.options}
    calibrator = create_calibrator(
        prepared,
        augmented_model_path=str(folder / "augmented.onnx"),
        calibrate_method=CalibrationMethod[job.options["method"]],
        providers=["CPUExecutionProvider"],
        extra_options=extra,
    )
    name = onnx.load(prepared).graph.input[0].name
    for batch in job.batches():
        calibrator.collect_data(OneBatch({name: batch}))
    ranges = folder / "ranges.json"
    save_tensors_data(calibrator.compute_data(), ranges)
    return ranges


def quantize(job: Job) -> None:
    """Write the INT8 file of a job."""
    unsigned = bool(job.options.get("unsigned"))
    with TemporaryDirectory() as name:
        folder = Path(name)
        prepared = folder / "prepared.onnx"
        quant_pre_process(str(job.model), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            prepared,
            job.output,
            calibration_cache_path=calibrate(job, prepared, folder),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8 if unsigned else QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[job.options["method"]],
            extra_options={} if unsigned else _TENSORRT,
        )


if __name__ == "__main__":
    run(quantize)
