"""NVIDIA ModelOpt's `auto_quantize`: which layers are INT8, by gradients, within a number of bits.

It takes a torch module and a bound on the effective bits of the weights, none on accuracy. So this
script does what its user has to: it raises the bound from 8.0 (all layers in INT8) step by step
until the top-1 on labelled images falls by no more than ``max_drop``, or all is float. Scores are
computed once, with the cross entropy of the labels on the images to tune on, and kept in a
checkpoint. The module is a chain of layers with the weights of the ONNX file. The result is
exported to Q/DQ ONNX by torch.

Options: ``images`` and ``labels``, .npy files of the images to tune on; ``max_drop``, a fraction.
"""

import copy
from collections.abc import Iterator
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import onnx
import torch
from job import Job, run
from onnx import numpy_helper
from torch import nn

_BATCH = 32
_SCORE_STEPS = 128  # the default
_BITS = [8.0, 8.1, 8.2, 8.4, 8.7, 9.0, 9.5, 10.0, 11.0, 12.0, 14.0, 16.0]


class _Loader:
    """Yields the images that calibrate first, and labelled ones each time after that.

    `auto_quantize` calibrates and scores with one loader, in this order.
    """

    def __init__(self, calibrating: list[Any], scoring: list[Any]) -> None:
        self._parts = [calibrating, scoring]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._parts.pop(0) if len(self._parts) > 1 else self._parts[0])


def module_from(model: onnx.ModelProto) -> nn.Sequential:
    """Return a chain of Conv, Relu, GlobalAveragePool, Flatten and Gemm as a torch module."""
    constants = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in model.graph.initializer}
    layers: list[nn.Module] = []
    for node in model.graph.node:
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Conv":
            weight, bias = (constants[name] for name in node.input[1:])
            layer: nn.Module = nn.Conv2d(
                weight.shape[1] * given["group"],
                weight.shape[0],
                tuple(weight.shape[2:]),
                stride=tuple(given["strides"]),
                padding=tuple(given["pads"][:2]),
                groups=given["group"],
            )
        elif node.op_type == "Gemm":
            weight, bias = (constants[name] for name in node.input[1:])
            layer = nn.Linear(weight.shape[1], weight.shape[0])
        else:
            layers.append(
                {
                    "Relu": nn.ReLU(),
                    "GlobalAveragePool": nn.AdaptiveAvgPool2d(1),
                    "Flatten": nn.Flatten(),
                }[node.op_type]
            )
            continue
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    return nn.Sequential(*layers).eval()


def quantize(job: Job) -> dict[str, Any]:
    """Write the quantized file of a job; return what was tried."""
    model = onnx.load(job.model)
    images = np.load(job.options["images"], mmap_mode="r")
    labels = torch.tensor(np.load(job.options["labels"]))
    of_float = module_from(model)
    evaluated: list[float] = []

    def top1(network: nn.Module) -> float:
        hits = 0
        with torch.no_grad():
            for start in range(0, len(images), _BATCH):
                x = torch.tensor(images[start : start + _BATCH])
                hits += int((network(x).argmax(1) == labels[start : start + _BATCH]).sum())
        evaluated.append(hits / len(images))
        return evaluated[-1]

    batches = [
        (torch.tensor(images[start : start + _BATCH]), labels[start : start + _BATCH])
        for start in range(0, _BATCH * _SCORE_STEPS, _BATCH)
    ]
    calibrating = [(torch.tensor(x), torch.zeros(len(x))) for x in job.batches(_BATCH)]
    before, tried = top1(of_float), []
    for bits in _BITS:
        searched, _ = mtq.auto_quantize(
            copy.deepcopy(of_float),
            constraints={"effective_bits": bits},
            quantization_formats=[mtq.INT8_DEFAULT_CFG],
            data_loader=_Loader(calibrating, batches),
            forward_step=lambda network, batch: network(batch[0]),
            loss_func=lambda output, batch: nn.functional.cross_entropy(output, batch[1]),
            num_calib_steps=len(calibrating),
            num_score_steps=len(batches),
            checkpoint=str(job.output.with_suffix(".scores.pt")),
        )
        tried.append({"bits": bits, "top1": top1(searched)})
        print(tried[-1], flush=True)
        if before - tried[-1]["top1"] <= job.options["max_drop"]:
            break
    _export(searched, job, model.graph.input[0])
    return {"evaluations": len(evaluated), "tried": tried}


def _export(network: nn.Module, job: Job, given: onnx.ValueInfoProto) -> None:
    x = torch.zeros(1, *(size.dim_value for size in given.type.tensor_type.shape.dim[1:]))
    torch.onnx.export(
        network,
        (x,),
        str(job.output),
        input_names=[given.name],
        output_names=["output"],
        dynamic_axes={given.name: {0: "N"}, "output": {0: "N"}},
        opset_version=19,
        dynamo=False,
    )


if __name__ == "__main__":
    run(quantize)
