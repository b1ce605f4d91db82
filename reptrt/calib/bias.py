"""Bias correction: take the mean error of quantized weights out of every layer's bias.

    E[conv(x, Q(W)) - conv(x, W)] = conv(E[x], Q(W)) - conv(E[x], W)

A convolution is linear, so the mean of its error over the images is its error on the mean image,
borders included; E[x] is one map per layer input. Behind a ReLU all inputs are positive, so errors
of weights do not average out: they move whole channels. The mean over positions of that map is
subtracted from the bias, at no cost. Where the weights of many layers are hurt badly, as in a
rep-net that is not split, layers that are right on average can still make a net that is further
off: `output_error` tells. Empirical bias correction after arXiv 1906.04721, in closed form (ours).
"""

import functools
import itertools
import math
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reptrt.affine import dequantize
from reptrt.calib.collect import COMPUTE_BATCH, filled
from reptrt.data import Dataset
from reptrt.progress import track
from reptrt.qdq import QuantizedWeight
from reptrt.torchgraph import TorchGraph

Float64Array = npt.NDArray[np.float64]

_JUDGED = 64  # images that say whether correction helps


def mean_maps(graph: TorchGraph, dataset: Dataset, tensors: Iterable[str]) -> dict[str, Tensor]:
    """Return E[x] of each named tensor over the images, (1, C, H, W), summed in float64."""
    sums: dict[str, Tensor] = {}

    def add(name: str, count: int, value: Tensor) -> None:
        if len(value) == 1:  # of a net for one image: a Reshape to [1, -1] folds the batch
            value = value.reshape(COMPUTE_BATCH, -1)
        total = value[:count].double().sum(0, keepdim=True)
        sums[name] = sums[name] + total if name in sums else total

    names = sorted(set(tensors))
    num_batches = math.ceil(dataset.length / COMPUTE_BATCH)
    for batch in track(dataset.batches(COMPUTE_BATCH), num_batches, "means"):
        x = torch.from_numpy(filled(batch))
        observers = {name: functools.partial(add, name, len(batch)) for name in names}
        graph.run({graph.input_names[0]: x}, [], observe=observers)
    return {name: (total / dataset.length).float() for name, total in sums.items()}


def bias_errors(
    graph: TorchGraph, means: Mapping[str, Tensor], weights: Mapping[str, QuantizedWeight]
) -> dict[str, Float64Array]:
    """Return node name -> mean error of each output channel, (O,), due to its quantized weight.

    A layer that cannot take a correction is left out: a MatMul, a bias that is computed or not one
    value per channel.

    Args:
        graph: the float graph, without quantized weights.
        means: E[x] of the input of every node in ``weights``.
        weights: node name -> codes and scales.
    """
    steps = {step.name: step for step in graph.steps}
    biases = graph.constants
    errors = {}
    for name, weight in weights.items():
        inputs, output = steps[name].inputs, steps[name].outputs[0]
        held = [biases.get(bias) for bias in inputs[2:] if bias]
        if steps[name].op == "MatMul" or not all(map(_is_per_channel, held)):
            continue
        deployed = torch.from_numpy(dequantize(weight.codes, weight.scale, weight.axis))
        given = {inputs[0]: means[inputs[0]]}
        exact = graph.run(given, [output])[output]
        found = graph.run({**given, inputs[1]: deployed}, [output])[output]
        difference = (found.double() - exact.double()).cpu()
        axes = [axis for axis in range(difference.dim()) if axis != 1]
        errors[name] = difference.mean(axes).numpy()
    return errors


def _is_per_channel(bias: Tensor | None) -> bool:
    return bias is not None and (bias.numel() == 1 or bias.numel() == bias.shape[-1])


def output_error(
    reference: TorchGraph,
    graph: TorchGraph,
    dataset: Dataset,
    weights: Mapping[str, QuantizedWeight],
) -> float:
    """Return the squared error of a net's outputs with quantized weights, on its first 64 images.

    Args:
        reference: the float graph.
        graph: the same graph, its biases corrected or not; runs with the weights in ``weights``.
        dataset: images.
        weights: node name -> codes and scales.
    """
    inputs = {step.name: step.inputs for step in graph.steps}
    deployed = {
        inputs[name][1]: torch.from_numpy(dequantize(w.codes, w.scale, w.axis))
        for name, w in weights.items()
    }
    total = 0.0
    for batch in itertools.islice(dataset.batches(COMPUTE_BATCH), _JUDGED // COMPUTE_BATCH):
        given = {graph.input_names[0]: torch.from_numpy(filled(batch))}
        exact = reference.run(given, reference.output_names)
        found = graph.run({**given, **deployed}, graph.output_names)
        errors = (found[n] - exact[n] for n in graph.output_names)
        total += sum(float(_first(error, len(batch)).square().sum()) for error in errors)
    return total


def _first(values: Tensor, count: int) -> Tensor:
    """Return the values of the first images of a filled batch; all, if they are not of images."""
    if values.numel() % COMPUTE_BATCH:
        return values
    return values.reshape(COMPUTE_BATCH, -1)[:count]
