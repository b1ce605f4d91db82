"""Bias correction: subtract the mean error of quantized weights from each layer's bias.

    E[conv(x, Q(W)) - conv(x, W)] = conv(E[x], Q(W)) - conv(E[x], W)

A convolution is linear, so its mean error over the images is its error on the mean image E[x],
borders included. After a ReLU all inputs are positive, so the errors of weights do not average out:
they shift whole channels. The error's mean over positions is subtracted from the bias, which costs
nothing at run time. In a net whose weights are quantized very coarsely (a rep-net without splits),
layers that are right on average can still make the net worse, so `reptrt.quantize.calib.outputs`
judges whether the correction is kept. Empirical bias correction after arXiv 1906.04721, in closed
form (ours).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from reptrt.core.arrays import Float64Array
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.plan import QuantizedWeight


def bias_errors(
    graph: TorchGraph, means: Mapping[str, Tensor], weights: Mapping[str, QuantizedWeight]
) -> dict[str, Float64Array]:
    """Return node name -> mean error of each output channel, (O,), due to the quantized weight.

    Layers that cannot be corrected are left out: a MatMul, and a layer whose bias is computed or
    does not have one value per channel.

    Args:
        graph: the float graph, without quantized weights.
        means: tensor name -> E[x], for the input of every node in ``weights``.
        weights: node name -> codes and scales.
    """
    steps = {step.name: step for step in graph.steps}
    biases = graph.constants
    errors = {}
    deployed = deployed_weights(graph, weights)
    for name in weights:
        inputs, output = steps[name].inputs, steps[name].outputs[0]
        bias = [biases.get(tensor) for tensor in inputs[2:] if tensor]
        if steps[name].op == "MatMul" or not all(map(_is_per_channel, bias)):
            continue
        mean_input = {inputs[0]: means[inputs[0]]}
        exact = graph.run(mean_input, [output])[output]
        quantized = graph.run({**mean_input, inputs[1]: deployed[inputs[1]]}, [output])[output]
        error = (quantized.double() - exact.double()).cpu()
        axes = [axis for axis in range(error.dim()) if axis != 1]
        errors[name] = error.mean(axes).numpy()
    return errors


def _is_per_channel(bias: Tensor | None) -> bool:
    return bias is not None and (bias.numel() == 1 or bias.numel() == bias.shape[-1])


def deployed_weights(
    graph: TorchGraph, weights: Mapping[str, QuantizedWeight]
) -> dict[str, Tensor]:
    """Return the dequantized weights by the names of the float graph's weight tensors."""
    inputs = {step.name: step.inputs for step in graph.steps}
    return {
        inputs[name][1]: torch.from_numpy(weight.dequantized()) for name, weight in weights.items()
    }
