"""Weights that make up for what quantization did to the input of a layer, in closed form.

Units are quantized one after the other, so the input x^ that a layer gets in the quantized net is
known, and so is its input x in the float net. What is wanted are the outputs W x. The weights that
come nearest to them are those of a linear regression, with moments about the means:

    W' = W + W E[(x - x^) x^^T] (H + damping)^-1                H = E[x^ x^^T]

W' / s is rounded by `nearest_plane` for H, with the steps s of W. The shift takes the mean out:
shift = b + W E[x] - Q s E[x^]. So a layer takes back a part of the errors of all layers before it,
where rounding to W only keeps its own small.

x - x^ is small and hardly correlated with x^, and the moments come from a few hundred images: what
little of it can be told depends on the damping. Each layer takes the one of four that is best on
held-out images, or W itself. The error of the outputs is, without what does not depend on W',

    (W' - W) H (W' - W)^T - 2 W E[(x - x^) x^^T] (W' - W)^T

Asymmetric calibration after GPTAQ (arXiv 2504.02692), there for transformers; as one regression,
for convolutions, in blocks of channels, the damping: ours.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from reptrt.core.arrays import Float64Array
from reptrt.core.grid import Grid
from reptrt.graph.net import Net, constant_of, constant_value
from reptrt.graph.splits import read_splits
from reptrt.quantize.reconstruct.fake_quantize import fake_quantize
from reptrt.quantize.reconstruct.state import Pair, Sites, State, WeightSite
from reptrt.quantize.rounding.curvature import in_steps
from reptrt.quantize.rounding.moments import Inputs
from reptrt.quantize.rounding.nearest_plane import damped, nearest_plane
from reptrt.quantize.rounding.sums import Sums
from reptrt.quantize.rounding.windows import matrix_of, weight_of, window_of
from reptrt.rewrite.split_coarse_fine import centre_of
from reptrt.rewrite.split_identity import without_diagonal

_DAMPINGS = (0.01, 0.08, 0.64, 5.12)  # of the mean variance


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A layer whose input lies at a boundary between units."""

    site: WeightSite  # of a split layer: that of the main summand
    whole: Tensor  # W; of a split layer with the side summand in it
    inputs: Inputs
    pair: Pair  # of its input
    axis: int  # of the output channels
    bias: Tensor  # of the float layer, (O,), float64
    curvature: Tensor | None  # of its outputs, (O, O)


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """The input of a layer on some of the images."""

    batches: Iterable[tuple[Tensor, Tensor]]  # in the float and in the quantized net, (N, C, ...)
    rows: float  # that are taken of an image


def find_layers(reference: Net, sites: Sites, curvature: Mapping[str, Tensor]) -> dict[str, Layer]:
    """Return node -> layer, of all layers that can be corrected.

    Left out are layers without rows (transposed convolutions, products of stacked matrices) or
    without a shift, and those whose input is not quantized. Of a split layer the main summand is
    corrected, for the errors of the whole layer's input.

    Args:
        reference: the float graph.
        sites: of the Q/DQ graph that was made from it.
        curvature: tensor -> how its errors count at the outputs of the net.
    """
    nodes = {node.name: node for node in reference.graph.nodes}
    splits = {split.main: split for split in read_splits(reference)}
    found = {}
    for node in reference.graph.nodes:
        site = sites.weights.get(node.name)
        pair, window = sites.pairs.get(node.inputs[0].name), window_of(node)
        if site is None or site.layer not in sites.affines or pair is None or window is None:
            continue
        weight = np.asarray(constant_of(node.inputs[1]), np.float64)
        if site.layer != node.name:
            if node.name not in splits:
                continue  # the side summand
            weight = _joined(weight, nodes[splits[node.name].side])
        axis = 0 if node.op == "Conv" or node.attrs.get("transB", 0) else 1
        matrix = matrix_of(weight, axis, window.groups)
        inputs = Inputs(pair.tensor, window, matrix.shape[2] // window.taps, centred=True)
        bias = _bias_of(node, matrix.shape)
        whole, counts = torch.from_numpy(weight), curvature.get(node.outputs[0].name)
        found[node.name] = Layer(site, whole, inputs, pair, axis, bias, counts)
    return found


def _joined(main: Float64Array, side: gs.Node) -> Float64Array:
    """Return the weight of a layer that was split, from its summands."""
    if side.op == "Mul":
        (factor,) = (value for x in side.inputs if (value := constant_value(x)) is not None)
        factor = -np.asarray(factor, np.float64).reshape(-1)
        return np.asarray(without_diagonal(main, factor), np.float64)
    joined: Float64Array = main.copy()
    row, column = centre_of(main)
    joined[:, :, row, column] += np.asarray(constant_of(side.inputs[1]))[:, :, 0, 0]
    return joined


def _bias_of(node: gs.Node, shape: tuple[int, ...]) -> Tensor:
    bias = constant_value(node.inputs[2]) if len(node.inputs) > 2 else None
    outputs = shape[0] * shape[1]
    values = np.zeros(outputs) if bias is None else np.asarray(bias, np.float64)
    return torch.from_numpy(np.broadcast_to(values.reshape(-1), (outputs,)).copy())


def correct(
    layer: Layer, seen: Seen, judges: Seen, state: State, grid: Grid
) -> tuple[WeightSite, State]:
    """Return the weight W' as a site to learn from, and the layer's codes and shift.

    Args:
        layer: to correct.
        seen: its input, before it is quantized, on the images that are learned from.
        judges: the same on held-out images.
        state: with the step of its input and its present shift.
        grid: of the codes.
    """
    site, key, window = layer.site, layer.inputs, layer.inputs.window
    moments = _moments(layer, seen, state)
    weight = site.weight.cpu()
    groups = window.groups

    def blocks(x: Tensor) -> Tensor:
        return key.cut(torch.from_numpy(matrix_of(x.numpy(), layer.axis, groups)))

    def whole(x: Tensor) -> Tensor:
        shaped = weight_of(key.joined(x).numpy(), tuple(weight.shape), layer.axis)
        return torch.from_numpy(np.ascontiguousarray(shaped, np.float32))

    exact, main = blocks(layer.whole), blocks(weight)
    wanted = main + _best_change(exact, moments, _moments(layer, judges, state))
    steps = blocks(site.scale.cpu().expand_as(weight).contiguous())
    counts = None
    if layer.curvature is not None:
        of_outputs = steps[:: key.blocks, :, :1]  # (groups, O of a group, 1)
        counts = key.repeated(in_steps(layer.curvature, of_outputs))
    codes = nearest_plane(wanted / steps, moments.covariance, grid, counts)
    off = exact @ (moments.mean + moments.mean_error)[..., None]
    deployed = codes * steps + (exact - main)
    off = off - deployed @ moments.mean[..., None]  # (B, O of a group, 1)
    shift = layer.bias + off.reshape(groups, key.blocks, -1).sum(1).reshape(-1)
    device, before = site.weight.device, state.shift[site.layer]
    return (
        replace(site, weight=whole(wanted).to(device)),
        State(
            codes={site.node: whole(codes).to(device)},
            gain={site.layer: torch.ones_like(state.gain[site.layer])},
            shift={site.layer: shift.to(before).reshape(before.shape)},
        ),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Moments:
    """Of the inputs of outputs in B blocks of d, on the CPU."""

    mean: Tensor  # of x^, (B, d)
    mean_error: Tensor  # of x - x^, (B, d)
    covariance: Tensor  # of x^, (B, d, d)
    error: Tensor  # E[(x - x^) x^^T] about the means, (B, d, d)


def _best_change(exact: Tensor, moments: _Moments, judges: _Moments) -> Tensor:
    """Return W' - W, (B, O, d), with the damping that is best on held-out images; it may be 0.

    Args:
        exact: W, (B, O, d).
        moments: of the images that are learned from.
        judges: those of the held-out images.
    """
    pull = (exact @ moments.error).mT
    off = 2.0 * exact @ judges.error

    def change(damping: float) -> Tensor:
        factor = torch.linalg.cholesky(damped(moments.covariance, damping))
        return torch.cholesky_solve(pull, factor).mT

    def error(changed: Tensor) -> float:
        return float(((changed @ judges.covariance - off) * changed).sum())

    return min((torch.zeros_like(exact), *map(change, _DAMPINGS)), key=error)


def _moments(layer: Layer, seen: Seen, state: State) -> _Moments:
    key, pair = layer.inputs, layer.pair
    sums, rng = Sums(key.window, key.num_blocks), np.random.default_rng(0)
    for exact, given in seen.batches:
        quantized = fake_quantize(given, state.step[pair.group], pair.grid)
        both = _side_by_side(quantized, exact - quantized, key)
        sums.add(both, math.ceil(seen.rows * len(both)), rng)
    mean, covariance = (x.cpu() for x in sums.moments(centred=True))
    size = mean.shape[1] // 2
    return _Moments(
        mean[:, :size],
        mean[:, size:],
        covariance[:, :size, :size].contiguous(),
        covariance[:, size:, :size].contiguous(),
    )


def _side_by_side(x: Tensor, error: Tensor, key: Inputs) -> Tensor:
    """Return both tensors as one: in each block the channels of ``x``, then those of ``error``.

    Channels lie last in memory, as they do in activations.
    """
    axis = 1 if key.window.kernel else x.dim() - 1
    last = [part.movedim(axis, -1) for part in (x, error)]
    cut = [part.reshape(*part.shape[:-1], key.num_blocks, -1) for part in last]
    return torch.cat(cut, -1).flatten(-2).movedim(-1, axis)
