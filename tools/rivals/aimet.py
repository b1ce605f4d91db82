"""AIMET on ONNX: cross-layer equalization and AdaRound, in the order of its documentation.

Its default configuration has per-channel symmetric weights and float biases. Activations are made
symmetric and written as INT8 with zero point 0, which TensorRT needs; the logits stay float.

Options: ``equalize`` switches cross-layer equalization on. ``adaround`` is the number of iterations
of AdaRound for each layer (its documentation: 10,000 for 8-bit weights); without it, weights are
rounded to nearest. ``scheme`` of ranges is min_max (its default) or tf_enhanced (least squared
error).
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import aimet_onnx
import onnx
from aimet_onnx.common.quantsim_config.utils import get_path_for_per_channel_config
from aimet_onnx.cross_layer_equalization import equalize_model
from job import Job, run


def tensorrt_config(folder: Path) -> Path:
    """Write AIMET's per-channel configuration with symmetric activations; return its path."""
    config = json.loads(Path(get_path_for_per_channel_config()).read_text())
    config["defaults"]["ops"]["is_symmetric"] = "True"
    config["defaults"]["unsigned_symmetric"] = "False"
    config["op_type"]["Gemm"]["is_output_quantized"] = "False"  # the logits
    path = folder / "tensorrt.json"
    path.write_text(json.dumps(config))
    return path


def quantize(job: Job) -> None:
    """Write the INT8 file of a job."""
    model = onnx.load(job.model)
    name = model.graph.input[0].name
    batches = [{name: batch} for batch in job.batches()]
    if job.options.get("equalize"):
        equalize_model(model)
    with TemporaryDirectory() as folder:
        sim = aimet_onnx.QuantizationSimModel(
            model,
            param_type=aimet_onnx.int8,
            activation_type=aimet_onnx.int8,
            quant_scheme=job.options.get("scheme", "min_max"),
            config_file=str(tensorrt_config(Path(folder))),
            providers=["CPUExecutionProvider"],
        )
        if job.options.get("adaround"):
            aimet_onnx.apply_adaround(sim, batches, num_iterations=job.options["adaround"])
        sim.compute_encodings(batches)
        quantized = sim.to_onnx_qdq(prequantize_constants=True, force_activation_as="signed")
    onnx.save(quantized, job.output)


if __name__ == "__main__":
    run(quantize)
