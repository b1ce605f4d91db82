"""NVIDIA ModelOpt: `modelopt.onnx.quantization.quantize` with its defaults for INT8.

Options: ``method`` is max or entropy (its default). Calibration runs on the CPU. Layers outside
INT8 stay FP32 as in every other row; its default would be FP16.
"""

import numpy as np
from job import Job, run
from modelopt.onnx.quantization import quantize as modelopt_quantize


def quantize(job: Job) -> None:
    """Write the INT8 file of a job."""
    modelopt_quantize(
        str(job.model),
        quantize_mode="int8",
        calibration_data=np.ascontiguousarray(job.array()),
        calibration_method=job.options["method"],
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(job.output),
    )


if __name__ == "__main__":
    run(quantize)
