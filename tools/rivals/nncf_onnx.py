"""NNCF on ONNX, with the options that its documentation recommends for accuracy.

These are the performance preset (symmetric, zero point 0), per-channel weights and bias correction,
with one image at a time, as its bias correction needs. Behind a ReLU it writes UINT8 codes, for
CPUs; it cannot be forced to INT8 there ("incompatible with HW capabilities"), so TensorRT refuses
its files.

Options: ``accurate`` corrects biases on the activations of the quantized net
(``fast_bias_correction=False``) instead of by its fast estimate.
"""

import nncf
import onnx
from job import Job, run


def quantize(job: Job) -> None:
    """Write the quantized file of a job."""
    model = onnx.load(job.model)
    name = model.graph.input[0].name
    quantized = nncf.quantize(
        model,
        nncf.Dataset(list(job.batches(1)), lambda batch: {name: batch}),
        preset=nncf.QuantizationPreset.PERFORMANCE,
        subset_size=len(job.array()),
        fast_bias_correction=not job.options.get("accurate"),
    )
    onnx.save(quantized, job.output)


if __name__ == "__main__":
    run(quantize)
