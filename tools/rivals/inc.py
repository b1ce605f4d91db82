"""Intel Neural Compressor 2.6, the last release with ONNX, configured for its TensorRT backend.

It writes Q/DQ pairs with symmetric INT8 activations and per-channel symmetric weights. Its tuning
by accuracy is off, because it would need labels.

Options: ``algorithm`` of activations is minmax, kl or percentile.
"""

from typing import Any

import numpy as np
import onnx
from job import Job, run
from neural_compressor import PostTrainingQuantConfig, quantization

_LAYERS = ("Conv", "Gemm", "MatMul")


class Loader:
    """The images in batches, in the form that neural_compressor takes: (inputs, label)."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.batch_size = 1

    def __iter__(self) -> Any:
        for batch in self._job.batches(self.batch_size):
            yield batch, np.zeros(len(batch), np.int64)


def quantize(job: Job) -> None:
    """Write the INT8 file of a job."""
    activation = {"dtype": ["int8"], "scheme": ["sym"], "algorithm": [job.options["algorithm"]]}
    weight = {"dtype": ["int8"], "scheme": ["sym"], "granularity": ["per_channel"]}
    config = PostTrainingQuantConfig(
        backend="onnxrt_trt_ep",
        device="gpu",
        quant_format="QDQ",
        quant_level=1,
        calibration_sampling_size=[len(job.array())],
        op_type_dict={".*": {"activation": activation, "weight": weight}},
        recipes={
            "add_qdq_pair_to_weight": True,
            "optypes_to_exclude_output_quant": list(_LAYERS),
            "dedicated_qdq_pair": True,
        },
    )
    quantized = quantization.fit(onnx.load(job.model), config, calib_dataloader=Loader(job))
    quantized.save(str(job.output))


if __name__ == "__main__":
    run(quantize)
