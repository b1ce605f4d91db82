"""Codes of the weights of a net, with compensated errors where held-out images agree.

The codes of `nearest_plane` and the nearest codes are compared on rows of the held-out images, and
the better ones are taken: for each output channel, or for a whole group where the errors of its
channels count together.
"""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reptrt.core.grid import Grid
from reptrt.data.dataset import Dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import Net, constant_value
from reptrt.graph.plan import QuantizedWeight
from reptrt.quantize.calib.collect import Kept
from reptrt.quantize.rounding.curvature import in_steps
from reptrt.quantize.rounding.moments import Inputs, Moments, collect_moments
from reptrt.quantize.rounding.nearest_plane import nearest_plane
from reptrt.quantize.rounding.windows import matrix_of, weight_of, window_of

_NOTHING: Mapping[str, Tensor] = MappingProxyType({})


def compensate(
    net: Net,
    graph: TorchGraph,
    dataset: Dataset,
    nearest: Mapping[str, QuantizedWeight],
    grid: Grid,
    *,
    centred: bool,
    seed: int,
    memory: int,
    kept: Kept | None = None,
    curvature: Mapping[str, Tensor] = _NOTHING,
) -> dict[str, QuantizedWeight]:
    """Return codes with compensated errors; of layers that have no rows, the nearest ones.

    Args:
        net: a float net.
        graph: the same net.
        dataset: calibration images.
        nearest: layer -> nearest codes and their scales; the scales stay.
        grid: of the codes.
        centred: whether biases will be corrected for the mean error.
        seed: draws the positions at which inputs are sampled.
        memory: bytes for what is known of the inputs of layers.
        kept: values of tensors of the net on the images; where it has all, the net is not run.
        curvature: tensor -> how its errors count at the outputs (`curvature`), of the outputs of
            layers; those that are left out are rounded each for itself.
    """
    weights, keys = {}, {}
    for node in net.graph.nodes:
        window = window_of(node) if node.name in nearest else None
        if window is None:
            continue
        weight = weights[node.name] = np.asarray(constant_value(node.inputs[1]))
        matrix = matrix_of(weight, nearest[node.name].axis, window.groups)
        taps = int(np.prod(window.kernel, dtype=np.int64))
        keys[node.name] = Inputs(
            tensor=node.inputs[0].name,
            window=window,
            channels=matrix.shape[2] // taps,
            centred=centred and node.op != "MatMul",
        )
    inputs = list(dict.fromkeys(keys.values()))
    moments = collect_moments(graph, dataset, inputs, seed=seed, memory=memory, kept=kept)
    outputs = {node.name: node.outputs[0].name for node in net.graph.nodes if node.outputs}
    return {**nearest} | {
        name: _compensated(
            weights[name], nearest[name], moments[key], key, grid, curvature.get(outputs[name])
        )
        for name, key in keys.items()
    }


def _compensated(
    weight: npt.NDArray[np.floating],
    nearest: QuantizedWeight,
    moments: Moments,
    key: Inputs,
    grid: Grid,
    curvature: Tensor | None,
) -> QuantizedWeight:
    groups = key.window.groups
    matrix = torch.from_numpy(matrix_of(weight, nearest.axis, groups))
    near = torch.from_numpy(matrix_of(nearest.codes.astype(np.float64), nearest.axis, groups))
    steps = torch.from_numpy(nearest.scale.astype(np.float64)).reshape(groups, -1, 1)
    exact = matrix / steps

    counts = None if curvature is None else in_steps(curvature, steps)
    plane = nearest_plane(
        key.cut(exact), moments.covariance, grid, None if counts is None else key.repeated(counts)
    )
    better = _noise(plane - key.cut(exact), moments.judges, groups, counts) < _noise(
        key.cut(near - exact), moments.judges, groups, counts
    )
    codes = torch.where(better[..., None], key.joined(plane), near)
    shaped = weight_of(codes.numpy(), weight.shape, nearest.axis)
    return QuantizedWeight(shaped.astype(np.int8), nearest.scale, nearest.axis)


def _noise(error: Tensor, rows: Tensor, groups: int, curvature: Tensor | None) -> Tensor:
    """Return the power of an error of weights (B, O, d) at the outputs, (groups, O).

    With a curvature (groups, O, O), it is that of all outputs of a group, (groups, 1).
    """
    by_block = torch.einsum("rbd,bod->rbo", rows, error.float())
    outputs = by_block.reshape(len(rows), groups, -1, error.shape[1]).sum(2)
    if curvature is None:
        return outputs.square().sum(0)
    products = torch.einsum("rgo,rgp->gop", outputs, outputs)
    return (products * curvature).sum((1, 2))[:, None]
