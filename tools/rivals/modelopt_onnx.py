"""NVIDIA ModelOpt: `modelopt.onnx.quantization.quantize` with its defaults for INT8 or FP8.

Options: ``method`` is max or entropy (its default). ``mode`` is int8 (default) or fp8, which writes
Q/DQ pairs of E4M3. Calibration runs on the CPU. Layers outside the pairs stay FP32 as in every
other row; its default would be FP16.
"""

import numpy as np
from job import Job, run
from modelopt.onnx.quantization import quantize as modelopt_quantize


def quantize(job: Job) -> None:
    """Write the quantized file of a job."""
    modelopt_quantize(
        str(job.model),
        quantize_mode=job.options.get("mode", "int8"),
        calibration_data=np.ascontiguousarray(job.array()),
        calibration_method=job.options["method"],
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(job.output),
    )


if __name__ == "__main__":
    run(quantize)
