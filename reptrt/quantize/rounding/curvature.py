"""How much errors at the outputs of a layer count at the outputs of the net.

To second order, an error e at one position of a tensor with C channels adds to the error that
`calib.measure` counts, sum over i of a_i (y'_i - y_i)^2 over the outputs y of the net,

    e^T G e                     G = J^T diag(a) J, (C, C), the Gauss-Newton matrix; J = dy / de

Channels that the layers behind add up have large elements off the diagonal: errors with opposite
signs cancel there. The mean of G over images and positions comes from gradients of random sums: for
independent n_i = +-1, the gradient g of sum over i of sqrt(a_i) n_i y_i has E[g g^T] = G, so one
backward pass gives a sample at each position of each tensor. The a_i are the diagonal of half of
the measure's second derivative (Hutchinson's estimate, exact where the measure is a sum of
squares).

As in K-FAC for convolutions (arXiv 1602.01407), errors at different positions count each for
itself, and G does not depend on the position; there for training. For rounding, of transformers:
YAQA (arXiv 2505.22988). Through the units of `calib.measure`: ours.
"""

import functools
from collections.abc import Iterable, Mapping

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from reptrt.core.progress import track
from reptrt.data.dataset import Dataset
from reptrt.execute.torchgraph import TorchGraph, exact_math
from reptrt.graph.net import Net
from reptrt.quantize.calib.measure import Measure, relative

_SIGNS = 2  # for each image
_BATCH = 4  # images, all of whose activations and gradients are in memory
_MOST_CHANNELS = 2304
_FAR = 0.1  # of the root mean square of an output: where the measure's derivative is taken


def collect_curvature(
    net: Net,
    dataset: Dataset,
    axes: Mapping[str, int],
    *,
    images: int,
    seed: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return tensor -> G up to a factor, (C, C), float64, on the CPU.

    Left out are tensors from which no gradient reaches a compared output, and those with more than
    2,304 channels.

    Args:
        net: a float net.
        dataset: calibration images.
        axes: tensor of the net -> the axis of its channels.
        images: at most as many are run, forward and twice backward.
        seed: draws the signs.
        device: where to compute.
    """
    some = dataset.spread(min(images, dataset.length))
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}
    with torch.inference_mode(False), torch.enable_grad(), exact_math(device):
        graph = TorchGraph(net, device)  # one made in inference mode has no gradients
        measure = Measure(graph)
        for batch in track(some.batches(_BATCH), -(-some.length // _BATCH), "gradients"):
            values: dict[str, Tensor] = {}
            image = torch.from_numpy(np.array(batch)).to(device).requires_grad_()
            outputs = graph.run(
                {graph.input_names[0]: image},
                measure.names,
                observe={name: functools.partial(_keep, values, name) for name in axes},
            )
            few = {
                name: value
                for name, value in values.items()
                if value.requires_grad and value.shape[axes[name]] <= _MOST_CHANNELS
            }
            for _ in range(_SIGNS):
                for name, rows in _gradients(measure, outputs, few, generator).items():
                    rows = rows.movedim(axes[name], -1).flatten(0, -2)
                    product = (rows.mT @ rows).double()
                    sums[name] = sums[name] + product if name in sums else product
    return {name: total.cpu() for name, total in sums.items() if bool(total.any())}


def layer_outputs(nodes: Iterable[gs.Node]) -> dict[str, int]:
    """Return the output of each Conv, Gemm and MatMul -> the axis of its channels."""
    axes = {"Conv": 1, "Gemm": -1, "MatMul": -1}
    return {node.outputs[0].name: axes[node.op] for node in nodes if node.op in axes}


def in_steps(curvature: Tensor, steps: Tensor) -> Tensor:
    """Return G of each group for errors in steps, (groups, O, O).

    Args:
        curvature: of all outputs of a layer, (groups * O, groups * O).
        steps: of the outputs, (groups, O, 1).
    """
    groups, outputs = steps.shape[:2]
    blocks = curvature.reshape(groups, outputs, groups, outputs)
    own = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    return own * steps * steps.mT


def _keep(values: dict[str, Tensor], name: str, value: Tensor) -> None:
    values[name] = value


def _gradients(
    measure: Measure,
    outputs: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return the gradients of sum over i of sqrt(a_i) n_i y_i with respect to values."""
    signs = {
        name: (2.0 * torch.randint(2, value.shape, generator=generator) - 1.0).to(value)
        for name, value in outputs.items()
        if value.requires_grad
    }
    weights = _weights(measure, outputs, signs)
    parts = [
        (weight.sqrt() * signs[name] * outputs[name]).sum() for name, weight in weights.items()
    ]
    if not parts or not values:
        return {}
    found = torch.autograd.grad(
        torch.stack(parts).sum(), [*values.values()], allow_unused=True, retain_graph=True
    )
    return {name: g for name, g in zip(values, found, strict=True) if g is not None}


def _weights(
    measure: Measure, outputs: Mapping[str, Tensor], signs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return a, in the shapes of the outputs: half of the measure's second derivative.

    Its first derivative at y + d, with d of random signs, is 2 a d for a sum of squares.
    """
    exact = {name: value.detach() for name, value in outputs.items()}
    moves = {}
    for name, sign in signs.items():
        root = exact[name].square().mean().sqrt()
        moves[name] = sign * torch.where(root > 0, _FAR * root, 1.0)
    moved = {name: (exact[name] + move).requires_grad_() for name, move in moves.items()}
    if not moved:
        return {}
    errors = [relative(*pair) for pair in measure.sums(exact, {**exact, **moved}).values()]
    slopes = torch.autograd.grad(torch.stack(errors).sum(), [*moved.values()], allow_unused=True)
    return {
        name: (slope / (2.0 * moves[name])).clamp_min(0.0)
        for name, slope in zip(moved, slopes, strict=True)
        if slope is not None
    }
