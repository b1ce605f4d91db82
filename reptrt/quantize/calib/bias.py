"""Bias correction: take the mean error of quantized weights out of every layer's bias.

    E[conv(x, Q(W)) - conv(x, W)] = conv(E[x], Q(W)) - conv(E[x], W)

A convolution is linear, so the mean of its error over the images is its error on the mean image,
borders included; E[x] is one map per layer input. Behind a ReLU all inputs are positive, so errors
of weights do not average out: they move whole channels. The mean over positions of that map is
subtracted from the bias, at no cost. Where the weights of many layers are hurt badly, as in a
rep-net that is not split, layers that are right on average can still make a net that is further
off: `reptrt.quantize.calib.outputs` tells. Empirical bias correction after arXiv
1906.04721, in closed form (ours).
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reptrt.core.grid import dequantize
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.qdq import QuantizedWeight

Float64Array = npt.NDArray[np.float64]


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
    deployed = deployed_weights(graph, weights)
    for name in weights:
        inputs, output = steps[name].inputs, steps[name].outputs[0]
        held = [biases.get(bias) for bias in inputs[2:] if bias]
        if steps[name].op == "MatMul" or not all(map(_is_per_channel, held)):
            continue
        given = {inputs[0]: means[inputs[0]]}
        exact = graph.run(given, [output])[output]
        found = graph.run({**given, inputs[1]: deployed[inputs[1]]}, [output])[output]
        difference = (found.double() - exact.double()).cpu()
        axes = [axis for axis in range(difference.dim()) if axis != 1]
        errors[name] = difference.mean(axes).numpy()
    return errors


def _is_per_channel(bias: Tensor | None) -> bool:
    return bias is not None and (bias.numel() == 1 or bias.numel() == bias.shape[-1])


def deployed_weights(
    graph: TorchGraph, weights: Mapping[str, QuantizedWeight]
) -> dict[str, Tensor]:
    """Return what the weights of a float graph are once they are quantized, by tensor name."""
    inputs = {step.name: step.inputs for step in graph.steps}
    return {
        inputs[name][1]: torch.from_numpy(dequantize(w.codes, w.scale, w.axis))
        for name, w in weights.items()
    }
