"""The error that a prepared net would make once it is quantized, on the judging images."""

import functools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from reptrt.core.arrays import Float64Array
from reptrt.core.grid import Grid, scale_from_amax
from reptrt.execute.torchgraph import Override, TorchGraph
from reptrt.graph.net import Net
from reptrt.graph.placement import Placement
from reptrt.graph.plan import QuantizedWeight, plan_from_placement
from reptrt.graph.qdq import insert_qdq, inserted_pairs, quantize_weights
from reptrt.pipeline.options import CalibrateOptions
from reptrt.quantize.calib.channels import ChannelStats
from reptrt.quantize.calib.outputs import Outputs
from reptrt.quantize.reconstruct.fake_quantize import fake_quantize
from reptrt.rewrite.linear import spread_over_kernel


class Trial:
    """A prepared net with quantized activations; every run may have other scales and codes.

    The pairs are inserted and the net is compiled once.

    Args:
        net: a prepared float net; not changed.
        placement: of the net.
        outputs: the judge.
        options: of calibration.
    """

    def __init__(
        self,
        net: Net,
        placement: Placement,
        outputs: Outputs,
        options: CalibrateOptions,
    ) -> None:
        trial, floats = net.copy(), replace(placement, weights=())
        scales = {activation.tensor: 1.0 for activation in placement.activations}
        plan = plan_from_placement(floats, scales, {}, options.grids[0])
        insert_qdq(trial, plan)
        self._pairs = {
            name: (pair.dequantizes[0].name, [node.name for node in pair.before])
            for name, pair in inserted_pairs(trial, plan).items()
        }
        self._graph, self._outputs = TorchGraph(trial, options.device), outputs

    def error(
        self,
        scales: Mapping[str, float],
        grids: Mapping[str, Grid],
        limits: Mapping[str, Override],
        constants: Mapping[str, Tensor] | None = None,
        most: float = math.inf,
    ) -> float:
        """Return the error of the outputs, or a number from ``most`` on if it is that large.

        Args:
            scales: tensor -> scale, for every activation of the placement.
            grids: tensor -> codes, likewise.
            limits: tensor -> function that clamps it before it is quantized.
            constants: name -> value, of weights and biases in place of those of the net.
            most: an error that is too large to be chosen.
        """
        hooks: dict[str, Callable[..., Tensor]] = {}
        for tensor, (dequantize, before) in self._pairs.items():
            hooks |= dict.fromkeys(before, _unchanged)
            step = torch.tensor(np.float32(scales[tensor]), device=self._graph.placement.device)
            hooks[dequantize] = functools.partial(_rounded_to_codes, step, grids[tensor])
        return self._outputs.error(self._graph, constants or {}, limits, hooks, most=most)


def _unchanged(x: Tensor, *_: Tensor) -> Tensor:
    return x


def _rounded_to_codes(step: Tensor, grid: Grid, x: Tensor, *_: Tensor) -> Tensor:
    return fake_quantize(x, step, grid)


def error_at_maxima(
    net: Net,
    placement: Placement,
    stats: Mapping[str, ChannelStats],
    full_range: Collection[str],
    without_judges: Mapping[str, Float64Array],
    outputs: Outputs,
    options: CalibrateOptions,
    most: float = math.inf,
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
        most: an error that is too large to be chosen; the result may be anything from it on.
    """
    known = tuple(a for a in placement.activations if a.tensor in stats)
    groups: dict[int, float] = {}
    for activation in known:
        largest = float(stats[activation.tensor].maximum.max())
        groups[activation.group] = max(groups.get(activation.group, 0.0), largest)
    grid = options.grids[0]
    grids = {a.tensor: grid.full_range if a.tensor in full_range else grid for a in known}
    scales = {a.tensor: float(scale_from_amax(groups[a.group], grids[a.tensor])) for a in known}
    limits = {a.tensor: clamp_to(groups[a.group] * without_judges[a.tensor]) for a in known}
    weights = quantize_weights(net, placement, options.grids[1])
    constants = _with_rounded_weights(
        net, weights, stats, np.sqrt(options.remaining), options.parts.correct_bias
    )
    placement = replace(placement, activations=known)
    trial = Trial(net, placement, outputs, options)
    return trial.error(scales, grids, limits, constants, most)


def _with_rounded_weights(
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
        limit = bound.to(x).reshape(1, -1, *[1] * (x.dim() - 2))
        return torch.clamp(x, -limit, limit)

    bound = torch.from_numpy(limits)
    return clamp
