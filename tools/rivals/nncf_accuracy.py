"""NNCF on ONNX with accuracy control: layers go back to float until a bound on top-1 is met.

`nncf.quantize_with_accuracy_control` quantizes with the options of `nncf_onnx`, measures the top-1
on labelled images, ranks groups of layers by what they lose, and takes the worst out of INT8 one
after the other. The validation runs in onnxruntime, without the instructions that saturate on CPUs
without VNNI.

Options: ``images`` and ``labels``, .npy files of the images to tune on; ``max_drop``, a fraction.
"""

from collections.abc import Iterable
from typing import Any

import nncf
import numpy as np
import onnx
import onnxruntime as ort  # noqa: TID251  # an environment of its own
from job import Job, run

_BATCH = 1  # NNCF ranks layers on 300 items, whatever an item holds


def quantize(job: Job) -> dict[str, Any]:
    """Write the quantized file of a job; return how often a model was validated."""
    model = onnx.load(job.model)
    name = model.graph.input[0].name
    images = np.load(job.options["images"], mmap_mode="r")
    labels = np.load(job.options["labels"])
    starts = range(0, len(images), _BATCH)
    validations: list[int] = []

    def validate(
        candidate: onnx.ModelProto, batches: Iterable[tuple["np.ndarray[Any, Any]", Any]]
    ) -> tuple[float, list[float]]:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.x64quantprecision", "1")
        session = ort.InferenceSession(candidate.SerializeToString(), options)
        hits: list[float] = []
        for x, y in batches:
            scores = session.run(None, {name: x})[0]
            hits.append(float((scores.argmax(axis=1) == y).mean()))
        validations.append(len(hits) * _BATCH)
        return float(np.mean(hits)), hits

    quantized = nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset(list(job.batches(1)), lambda batch: {name: batch}),
        nncf.Dataset([(images[i : i + _BATCH], labels[i : i + _BATCH]) for i in starts]),
        validate,
        max_drop=job.options["max_drop"],
        preset=nncf.QuantizationPreset.PERFORMANCE,
        subset_size=len(job.array()),
    )
    onnx.save(quantized, job.output)
    return {"evaluations": len(validations), "images_evaluated": sum(validations)}


if __name__ == "__main__":
    run(quantize)
