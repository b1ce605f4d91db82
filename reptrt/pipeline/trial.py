"""The error that a prepared net would make once it is quantized, on the judging images."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from reptrt.core.arrays import Float64Array
from reptrt.core.grid import scale_from_amax
from reptrt.execute.torchgraph import Override, TorchGraph
from reptrt.graph.net import Net
from reptrt.graph.placement import Placement
from reptrt.graph.plan import QuantizedWeight, plan_from_placement
from reptrt.graph.qdq import insert_qdq, quantize_weights
from reptrt.pipeline.options import CalibrateOptions
from reptrt.quantize.calib.channels import ChannelStats
from reptrt.quantize.calib.outputs import Outputs
from reptrt.rewrite.linear import spread_over_kernel


def quantized_error(
    net: Net,
    placement: Placement,
    scales: Mapping[str, float],
    full_range: Collection[str],
    limits: Mapping[str, Override],
    outputs: Outputs,
    options: CalibrateOptions,
    constants: Mapping[str, Tensor] | None = None,
) -> float:
    """Return the error of the outputs with quantized activations and given weights.

    Args:
        net: a prepared float net; not changed.
        placement: of the net.
        scales: tensor -> scale, for every activation of the placement.
        full_range: activations with full range.
        limits: tensor -> function that clamps it before it is quantized.
        outputs: the judge.
        options: of calibration.
        constants: name -> value, of weights and biases in place of those of the net.
    """
    trial = net.copy()
    floats = replace(placement, weights=())
    insert_qdq(trial, plan_from_placement(floats, scales, {}, options.grids[0], full_range))
    return outputs.error(TorchGraph(trial, options.device), constants or {}, limits)


def error_at_maxima(
    net: Net,
    placement: Placement,
    stats: Mapping[str, ChannelStats],
    full_range: Collection[str],
    without_judges: Mapping[str, Float64Array],
    outputs: Outputs,
    options: CalibrateOptions,
) -> float:
    """Return the error with weights rounded to nearest and the largest values as thresholds.

    Of the rounding error of weights that will be learned, a part counts. Activations without
    statistics, the summands of splits, stay in float. Biases are corrected for the mean input of
    each channel.

    Args:
        net: a prepared float net; not changed.
        placement: of the net.
        stats: tensor -> statistics, in the net as it is.
        full_range: activations with full range.
        without_judges: tensor -> range without the judging images / range, (C,).
        outputs: the judge.
        options: of calibration.
    """
    known = tuple(a for a in placement.activations if a.tensor in stats)
    groups: dict[int, float] = {}
    for activation in known:
        largest = float(stats[activation.tensor].maximum.max())
        groups[activation.group] = max(groups.get(activation.group, 0.0), largest)
    grid = options.grids[0]
    scales = {
        a.tensor: float(
            scale_from_amax(groups[a.group], grid.full_range if a.tensor in full_range else grid)
        )
        for a in known
    }
    limits = {a.tensor: clamp_to(groups[a.group] * without_judges[a.tensor]) for a in known}
    weights = quantize_weights(net, placement, options.grids[1])
    constants = _rounded(net, weights, stats, np.sqrt(options.remaining), options.correct_bias)
    placement = replace(placement, activations=known)
    return quantized_error(net, placement, scales, full_range, limits, outputs, options, constants)


def _rounded(
    net: Net,
    weights: Mapping[str, QuantizedWeight],
    stats: Mapping[str, ChannelStats],
    part: float,
    correct_bias: bool,
) -> dict[str, Tensor]:
    """Return weights with a part of their rounding error, and biases less its mean, by name."""
    constants: dict[str, Tensor] = {}
    for node in net.graph.nodes:
        if node.name not in weights or not isinstance(node.inputs[1], gs.Constant):
            continue
        weight = node.inputs[1].values
        error = part * (weights[node.name].dequantized().astype(np.float64) - weight)
        constants[node.inputs[1].name] = torch.from_numpy((weight + error).astype(weight.dtype))
        bias, channels = node.inputs[2:], stats.get(node.inputs[0].name)
        if not correct_bias or not bias or channels is None or node.op != "Conv":
            continue
        means = spread_over_kernel(channels.mean, weight, int(node.attrs.get("group", 1)))
        shift = (error * means).reshape(len(weight), -1).sum(axis=1)
        if isinstance(bias[0], gs.Constant):
            constants[bias[0].name] = torch.from_numpy((bias[0].values - shift).astype(np.float32))
    return constants


def clamp_to(limits: Float64Array) -> Callable[[Tensor], Tensor]:
    """Return a function that clamps the channels of (N, C, ...) to limits (C,)."""

    def clamp(x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != len(limits):
            return x  # a net for one image that folds the batch
        limit = torch.from_numpy(limits).to(x).reshape(1, -1, *[1] * (x.dim() - 2))
        return torch.minimum(torch.maximum(x, -limit), limit)

    return clamp
