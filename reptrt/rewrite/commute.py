"""Which nodes commute with a per-channel affine y[c] = scale[c] x[c] + shift[c], and how.

    node(affine(x)) = commuted(node(x))

1. Means: GlobalAveragePool, ReduceMean over height and width, and AveragePool, which leaves a shift
   as it is only where it counts no padding.
2. Maxima (MaxPool, GlobalMaxPool), if every scale is positive.
3. Flatten and a Reshape to rows: each channel becomes as many values as it has positions.
4. Squeeze of height and width.
"""

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.graph.flow import is_spatial_mean
from reptrt.graph.net import constant_value
from reptrt.rewrite.linear import LinearMap, per_channel

POOLS = ("AveragePool", "GlobalAveragePool", "MaxPool", "GlobalMaxPool")


def commuted(affine: LinearMap, node: gs.Node) -> LinearMap | None:
    """Return the affine that does behind a node what this one does before it; None: there is none.

    Args:
        affine: per channel.
        node: reads its result.
    """
    if len(node.outputs) > 1:
        return None
    if node.op in POOLS:
        return affine if _pools_alike(affine, node) else None
    if node.op == "ReduceMean" and is_spatial_mean(node):
        return affine if node.attrs.get("keepdims", 1) else _over(affine, 1)
    if node.op == "Squeeze":
        return _over(affine, 1) if _squeezes_positions(node) else None
    return _over(affine, positions) if (positions := _positions_in_row(node)) else None


def _pools_alike(affine: LinearMap, node: gs.Node) -> bool:
    if node.op in ("MaxPool", "GlobalMaxPool"):
        return bool(np.all(affine.kernel > 0))
    counts_padding = bool(node.attrs.get("count_include_pad", 0)) and (
        any(node.attrs.get("pads") or ())
        or node.attrs.get("ceil_mode", 0)
        or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    )
    return not counts_padding or not np.any(affine.bias)


def _squeezes_positions(node: gs.Node) -> bool:
    rank = len(node.inputs[0].shape or ())
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1:
        axes = constant_value(node.inputs[1])
    return (
        axes is not None and rank > 2 and sorted(int(a) % rank for a in axes) == [*range(2, rank)]
    )


def _positions_in_row(node: gs.Node) -> int:
    """Return how many values of a row each channel becomes; 0 if the node makes no rows."""
    shape = tuple(node.inputs[0].shape or ())
    if len(shape) < 2 or not all(isinstance(size, int) and size > 0 for size in shape[1:]):
        return 0
    row = int(np.prod(shape[1:]))
    if node.op == "Flatten":
        makes_rows = int(node.attrs.get("axis", 1)) % len(shape) == 1
    else:
        makes_rows = node.op == "Reshape" and _reshapes_to_rows(node, shape[0], row)
    return int(np.prod(shape[2:])) if makes_rows else 0


def _reshapes_to_rows(node: gs.Node, batch: int | str, row: int) -> bool:
    target = constant_value(node.inputs[1])
    if target is None or target.size != 2 or node.attrs.get("allowzero", 0):
        return False
    return int(target[0]) in (0, -1, batch) and int(target[1]) in (row, -1)


def _over(affine: LinearMap, positions: int) -> LinearMap:
    """Return the affine of rows in which each channel has so many values."""
    scale = np.repeat(affine.kernel.reshape(-1), positions)
    return per_channel(scale, np.repeat(affine.bias, positions), axes=0)
