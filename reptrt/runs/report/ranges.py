"""Weight ranges of each convolution in INT8 codes, before and after the splits, part by part.

The parts of a kernel are where the branches of a rep block put their weights: the diagonal of the
centre tap (identity branch), the rest of the centre tap (1x1), and the taps around it (k x k). If
the layer cannot have an identity branch, or is depthwise, the centre tap is one part. For each
output channel

    codes[o] = max |W[o, part]| / scale[o]

Before: scale = amax / qmax of the fused float kernel. After: the codes in the INT8 file; for a
split layer, those of the kernel that holds the remainder. They include equalization.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from reptrt.core.arrays import FloatArray
from reptrt.core.grid import Grid, channel_amax, scale_from_amax
from reptrt.graph.model import proto_of
from reptrt.graph.net import Net, net_from_model
from reptrt.graph.provenance import Branch, read_provenance
from reptrt.graph.quantized import layer_weights
from reptrt.graph.splits import read_splits

Mask = npt.NDArray[np.bool_]

PARTS = ("identity", "1x1", "around")  # parts of a kernel, named after the branches
_PERCENTILES = (5, 50, 95)


@dataclass(frozen=True, slots=True)
class Range:
    """The 5th percentile, median and 95th percentile of one value over the output channels."""

    low: float
    median: float
    high: float


@dataclass(frozen=True, slots=True)
class LayerRanges:
    """The ranges of one convolution."""

    layer: str
    form: str  # "none", "identity", "identity-scalar" or "coarse-fine"
    before: Mapping[str, Range]  # part -> codes of the fused kernel
    after: Mapping[str, Range]  # part -> codes in the INT8 file; {}: the layer stays in float
    branches: Mapping[str, Range]  # kind of branch -> its largest weights; {}: not recorded


def weight_ranges(float_onnx: Path, int8_onnx: Path, weight_bits: int) -> tuple[LayerRanges, ...]:
    """Return the ranges of every convolution whose kernel has an odd size.

    Raises:
        ArtifactError: a file cannot be read.
    """
    fused, quantized = (net_from_model(proto_of(path)) for path in (float_onnx, int8_onnx))
    splits = {split.layer: split for split in read_splits(quantized)}
    after, branches = layer_weights(quantized), read_provenance(fused)
    grid, groups = Grid.weight(weight_bits), _groups(fused)
    layers = []
    for name, weight in layer_weights(fused).items():
        shape = weight.values.shape
        if name in groups and len(shape) == 4 and shape[2] % 2 == 1 and shape[3] % 2 == 1:
            split, masks = splits.get(name), _masks(shape, groups[name])
            kernel = after.get(name if split is None else split.main)
            has_codes = kernel is not None and kernel.form == f"int8 {'x'.join(map(str, shape))}"
            scale = np.asarray(scale_from_amax(channel_amax(weight.values, 0), grid))
            layers.append(
                LayerRanges(
                    layer=name,
                    form="none" if split is None else split.form,
                    before=_parts(weight.values / scale.reshape(-1, 1, 1, 1), masks),
                    after=_parts(kernel.values, masks) if kernel is not None and has_codes else {},
                    branches=_branches(branches.get(name, ())),
                )
            )
    return tuple(layers)


def _groups(net: Net) -> dict[str, int]:
    """Return the groups of every convolution."""
    convolutions = [node for node in net.graph.nodes if node.op == "Conv"]
    return {node.name: int(node.attrs.get("group", 1)) for node in convolutions}


def _parts(codes: FloatArray, masks: Mapping[str, Mask]) -> dict[str, Range]:
    """Return the range of each part over the output channels that have a nonzero weight."""
    magnitude = np.abs(codes.astype(np.float64))
    alive = magnitude.reshape(len(magnitude), -1).any(axis=1)
    ranges = {}
    for part, mask in masks.items():
        if mask.any() and alive.any():
            largest = (magnitude * mask).reshape(len(magnitude), -1).max(axis=1)
            ranges[part] = _range(largest[alive])
    return ranges


def _masks(shape: tuple[int, ...], groups: int) -> dict[str, Mask]:
    """Return a mask for each part of a kernel (O, I / groups, kH, kW)."""
    centre = np.zeros(shape, dtype=bool)
    row, column = shape[2] // 2, shape[3] // 2
    centre[:, :, row, column] = True
    if shape[1] == 1 or shape[0] != shape[1] * groups:
        return {"1x1": centre, "around": ~centre}
    identity = np.zeros(shape, dtype=bool)
    channels = np.arange(shape[0])
    identity[channels, channels % shape[1], row, column] = True
    return {"identity": identity, "1x1": centre & ~identity, "around": ~centre}


def _branches(branches: tuple[Branch, ...]) -> dict[str, Range]:
    """Return the range of the largest weights of each kind of branch; same kinds are summed."""
    sums: dict[str, FloatArray] = {}
    for branch in branches:
        values = branch.amax if branch.diagonal is None else branch.diagonal
        sums[branch.kind] = sums.get(branch.kind, np.float64(0.0)) + values.astype(np.float64)
    return {kind: _range(np.abs(values)) for kind, values in sums.items()}


def _range(values: FloatArray) -> Range:
    return Range(*(float(value) for value in np.percentile(values, _PERCENTILES)))
