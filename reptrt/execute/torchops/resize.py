"""Resize, Upsample and GridSample: nearest in every form, linear in the forms that torch has.

Nearest interpolation reads, along each axis, the input index

    index(i) = clip(round(source(i)), 0, in - 1)
    source(i) = i / scale                       asymmetric
                (i + 0.5) / scale - 0.5         half_pixel
                i (in - 1) / (out - 1)          align_corners

with ``round`` one of floor, ceil, round_prefer_floor, round_prefer_ceil, all in float32.
GridSample is torch's own function of that name.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from reptrt.core.errors import RewriteError
from reptrt.execute.torchops.node import Builder, NodeView, Operator

_SAMPLING = {  # ONNX renamed its modes with opset 20
    **{mode: mode for mode in ("bilinear", "nearest", "bicubic")},
    **{"linear": "bilinear", "cubic": "bicubic"},
}
_COORDINATES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
_ROUNDINGS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "round_prefer_floor": lambda x: np.ceil(x - np.float32(0.5)),
    "round_prefer_ceil": lambda x: np.floor(x + np.float32(0.5)),
    "floor": np.floor,
    "ceil": np.ceil,
}
_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}


@lru_cache(maxsize=1024)
def _nearest_index(in_size: int, out_size: int, scale: float, form: tuple[str, str]) -> Tensor:
    """Return the input index of each output index along one axis, int64 (out_size,)."""
    coordinates, rounding = form
    i, half = np.arange(out_size, dtype=np.float32), np.float32(0.5)
    if coordinates == "asymmetric":
        source = i / np.float32(scale)
    elif coordinates == "align_corners":
        source = i * np.float32(in_size - 1) / np.float32(max(out_size - 1, 1))
    elif coordinates == "pytorch_half_pixel" and out_size == 1:
        source = np.zeros(1, np.float32)
    else:
        source = (i + half) / np.float32(scale) - half
    index = np.clip(_ROUNDINGS[rounding](source), 0, in_size - 1)
    return torch.from_numpy(index.astype(np.int64))


@lru_cache(maxsize=1024)
def _torch_agrees(in_size: int, out_size: int, scale: float, form: tuple[str, str]) -> bool:
    """Return whether torch's own nearest interpolation reads the same indices along an axis."""
    line = torch.arange(in_size, dtype=torch.float32)[None, None]
    picked = F.interpolate(line, size=out_size, mode="nearest")[0, 0]
    return torch.equal(picked.long(), _nearest_index(in_size, out_size, scale, form))


def _nearest(
    x: Tensor, sizes: Sequence[int], scales: Sequence[float], form: tuple[str, str]
) -> Tensor:
    axes = list(zip(x.shape, sizes, scales, strict=True))
    same_images = list(x.shape[:2]) == list(sizes[:2]) and x.dim() in _LINEAR
    if same_images and all(_torch_agrees(*axis, form) for axis in axes[2:]):
        return F.interpolate(x, size=list(sizes[2:]), mode="nearest")
    for axis, sizes_and_scale in enumerate(axes):
        if sizes_and_scale[0] != sizes_and_scale[1]:
            x = x.index_select(axis, _nearest_index(*sizes_and_scale, form).to(x.device))
    return x


def _linear(
    x: Tensor, sizes: Sequence[int], scales: Sequence[float] | None, corners: bool
) -> Tensor:
    if x.dim() not in _LINEAR or list(x.shape[:2]) != list(sizes[:2]):
        raise RewriteError(f"linear from {tuple(x.shape)} to {tuple(sizes)}: only spatial axes")
    mode = _LINEAR[x.dim()]
    if scales is None or all(map(_exact, x.shape, scales, sizes)):
        return F.interpolate(x, size=list(sizes[2:]), mode=mode, align_corners=corners)
    factors = list(scales[2:])
    return F.interpolate(x, scale_factor=factors, mode=mode, align_corners=corners)


def _form(node: NodeView) -> tuple[str, str, str]:
    """Return mode, coordinates and rounding; raise a RewriteError for a form that cannot be run."""
    if node.op == "Upsample" or node.opset < 11:
        mode, coordinates, rounding = node.attr("mode", "nearest"), "asymmetric", "floor"
    else:
        mode = node.attr("mode", "nearest")
        coordinates = node.attr("coordinate_transformation_mode", "half_pixel")
        rounding = node.attr("nearest_mode", "round_prefer_floor")
    if mode not in ("nearest", "linear"):
        raise RewriteError(f"mode {mode}")
    if coordinates not in _COORDINATES or (mode == "linear" and coordinates == "asymmetric"):
        raise RewriteError(f"mode {mode} with coordinate_transformation_mode {coordinates}")
    node.only("antialias", 0)
    node.only("keep_aspect_ratio_policy", "stretch")
    return mode, coordinates, rounding


def _scaled(size: int, scale: float) -> float:
    """Return the product in float32, as ONNX runtimes compute it: 10 x 0.7 is 7."""
    return float(np.float32(size) * np.float32(scale))


def _exact(size: int, scale: float, out: int) -> bool:
    return _scaled(size, scale) == out


def _filled(
    values: Sequence[float], axes: Sequence[int] | None, others: Sequence[float]
) -> list[float]:
    """Return one value per axis of the tensor: ``values`` along ``axes``, ``others`` elsewhere."""
    if axes is None:
        return list(values)
    full = list(others)
    for axis, value in zip(axes, values, strict=True):
        full[axis] = value
    return full


def _resize(node: NodeView) -> Operator:
    mode, coordinates, rounding = _form(node)
    # Before opset 11 the inputs are (X, scales), from then on (X, roi, scales, sizes).
    early = node.op == "Upsample" or node.opset < 11
    scales_of = node.ints(1 if early else 2, "scales")
    sizes_of = node.ints(len(node.present) if early else 3, "sizes")
    axes = node.attr("axes", None)

    def operator(x: Tensor, *shapes: Tensor | None) -> Tensor:
        inputs = (None, *shapes, None, None) if early else (*shapes, None, None, None)
        scales, sizes = scales_of(inputs[1]), sizes_of(inputs[2])
        if scales:
            factors = _filled(scales, axes, [1.0] * x.dim())
            out_sizes = [int(_scaled(*axis)) for axis in zip(x.shape, factors, strict=True)]
        else:
            out_sizes = [int(size) for size in _filled(sizes or [], axes, x.shape)]
            factors = [out / size for size, out in zip(x.shape, out_sizes, strict=True)]
        if mode == "linear":
            corners = coordinates == "align_corners"
            return _linear(x, out_sizes, factors if scales else None, corners)
        return _nearest(x, out_sizes, factors, (coordinates, rounding))

    return operator


def _grid_sample(node: NodeView) -> Operator:
    mode = _SAMPLING[node.choice("mode", "bilinear", tuple(_SAMPLING))]
    padding = node.choice("padding_mode", "zeros", ("zeros", "border", "reflection"))
    corners = bool(node.attr("align_corners", 0))
    return lambda x, grid: F.grid_sample(x, grid, mode, padding, corners)


RESIZE: Mapping[str, Builder] = {
    "GridSample": _grid_sample,
    "Resize": _resize,
    "Upsample": _resize,
}
