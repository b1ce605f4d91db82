"""Find the branch that sets the weight range of a fused kernel, and the bits left for the others.

An output channel has one scale, amax / qmax. If one branch is much larger than the others, the
values of the others use few codes. Records of the branches (`reptrt.graph.provenance`) give the
largest value of each kind of branch per channel:

    identity     |sum of the diagonals|
    any other    sum of the branches' amax, an upper bound if there are several of one kind

Without records, the kernel is divided into the diagonal of the centre tap (where an identity would
be), the rest of the centre tap, and the taps around it. This shows where the largest values are,
not which branch they came from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from reptrt.core.arrays import FloatArray
from reptrt.core.grid import Grid, channel_amax, scale_from_amax
from reptrt.graph.net import constant_value
from reptrt.graph.provenance import Branch
from reptrt.rewrite import split_identity
from reptrt.rewrite.split_coarse_fine import centre_of

Mask = npt.NDArray[np.bool_]
Source = Literal["branches", "kernel"]


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of branch, or one part of a kernel."""

    kind: str  # "identity", "1x1", "3x3"...; of a kernel: "diagonal", "centre", "around"
    share: float  # fraction 0..1 of the output channels in which it has the largest value


@dataclass(frozen=True, slots=True, eq=False)
class WeightRange:
    """What sets the range of one layer's weight."""

    source: Source  # "branches": recorded by export; "kernel": read off the kernel
    parts: tuple[Part, ...]  # the largest share first
    rest: Mask | None  # shaped like the weight: where the values of the other parts are, if known

    @property
    def kind(self) -> str:
        """What sets the range in most channels."""
        return self.parts[0].kind


def range_of_branches(node: gs.Node, branches: Sequence[Branch]) -> WeightRange:
    """Return which recorded branch of a convolution sets its weight range."""
    amax: dict[str, FloatArray] = {}
    for branch in branches:
        values = branch.amax if branch.diagonal is None else branch.diagonal
        amax[branch.kind] = amax.get(branch.kind, 0.0) + values.astype(np.float64)
    parts = _parts({kind: np.abs(values) for kind, values in amax.items()})
    weight = np.asarray(constant_value(node.inputs[1]))
    windows = {part.kind: _window(weight, part.kind) for part in parts}
    return WeightRange("branches", parts, _rest(parts[0].kind, windows))


def range_of_kernel(node: gs.Node) -> WeightRange | None:
    """Return which part of a kernel sets its range; None if it has fewer than two parts."""
    weight = constant_value(node.inputs[1])
    if node.op != "Conv" or weight is None or weight.ndim != 4:
        return None
    if not (weight.shape[2] % 2 and weight.shape[3] % 2):
        return None
    regions = {"centre": _window(weight, "1x1"), "around": ~_window(weight, "1x1")}
    if split_identity.reason_against(node) is None:
        regions["diagonal"] = _window(weight, "identity")
        regions["centre"] = regions["centre"] & ~regions["diagonal"]
    regions = {kind: mask for kind, mask in regions.items() if mask.any()}
    if len(regions) < 2:
        return None
    parts = _parts({kind: channel_amax(weight * mask, 0) for kind, mask in regions.items()})
    largest = regions[parts[0].kind]
    # A part with most of the values has the largest value by chance, so it says nothing.
    return WeightRange("kernel", parts, ~largest if largest.mean() < 0.5 else None)


def bits_left(kernels: Sequence[FloatArray], rest: Mask, grid: Grid) -> float | None:
    """Return how many bits the values at ``rest`` use, as the median over output channels.

        bits = log2( 2 max |W[o, rest]| / scale[o] + 1 )

    If the values reach the end of the range, this is the number of bits of the weight. For a split
    layer, the kernel in which the values use most bits counts.

    Args:
        kernels: the quantized kernels (O, I, kH, kW): the layer's weight, or one of each summand.
        rest: a mask of the layer's weight; a smaller kernel lies at its centre.
        grid: the codes of weights.
    """
    bits = []
    for kernel in kernels:
        mask = _cropped(rest, kernel.shape)
        amax = channel_amax(kernel, 0)
        alive = amax > 0
        if mask.any() and alive.any():
            codes = channel_amax(kernel * mask, 0) / scale_from_amax(amax, grid)
            bits.append(float(np.median(np.log2(2.0 * codes[alive] + 1.0))))
    return max(bits, default=None)


def _parts(amax: Mapping[str, FloatArray]) -> tuple[Part, ...]:
    """Return the share of channels in which each part is the largest, without all-zero channels."""
    values = np.stack([np.asarray(channels) for channels in amax.values()])
    largest = values.argmax(axis=0)[values.any(axis=0)]
    counts = np.bincount(largest, minlength=len(values)) / max(len(largest), 1)
    parts = [Part(kind, float(share)) for kind, share in zip(amax, counts, strict=True)]
    return tuple(sorted(parts, key=lambda part: -part.share))


def _window(weight: FloatArray, kind: str) -> Mask:
    """Return where in a kernel a branch lies; the mask is empty if that is not known."""
    mask = np.zeros(weight.shape, dtype=bool)
    row, column = centre_of(weight)
    if kind == "identity":
        channels = np.arange(weight.shape[0])
        mask[channels, channels % weight.shape[1], row, column] = True
        return mask
    height, width = map(int, kind.split("x"))
    top, left = weight.shape[2] - height, weight.shape[3] - width
    if top % 2 == 0 and left % 2 == 0:
        mask[:, :, top // 2 : top // 2 + height, left // 2 : left // 2 + width] = True
    return mask


def _rest(kind: str, windows: Mapping[str, Mask]) -> Mask | None:
    """Return where the other parts lie, without the window of ``kind`` unless nothing is left."""
    others = [mask for other, mask in windows.items() if other != kind]
    if not others or not all(mask.any() for mask in windows.values()):
        return None
    union = np.logical_or.reduce(others)
    outside = np.asarray(union & ~windows[kind])
    return outside if outside.any() else np.asarray(union)


def _cropped(mask: Mask, shape: tuple[int, ...]) -> Mask:
    top, left = (mask.shape[2] - shape[2]) // 2, (mask.shape[3] - shape[3]) // 2
    return mask[:, :, top : top + shape[2], left : left + shape[3]]
