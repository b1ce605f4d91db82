"""Coarse-fine splitting: one convolution becomes the sum of a coarse 1x1 and a fine k x k one.

After CFWS (arXiv 2312.10588). In a fused rep kernel the centre tap holds the identity and 1x1
branches and is much larger than the taps around it; one INT8 step has to cover both. Split

    Wc[o,i]  = W[o,i,centre]              g[o] = max_i |Wc[o,i]| / qmax
    coarse   = round(Wc / g) * g          on its own INT8 grid: quantizing it loses nothing
    fine     = W - coarse at the centre   surrounding taps and the centre's residual

    y = conv1x1(x, coarse) + conv(x, fine) + b

The fine part's step is max |fine| / qmax, and every tap's error is at most half of it.

Requires: constant float weights, odd kernel. Ensures: the output tensor keeps its name and, to
float rounding, its value.
"""

from collections.abc import Collection

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.core.arrays import FloatArray
from reptrt.core.choices import SplitPrecision
from reptrt.core.grid import Grid
from reptrt.graph.net import Net, constant_value, weighted_nodes
from reptrt.graph.splits import Split, record_splits
from reptrt.rewrite.contract import RewriteReport, Skipped


def split_coarse_fine(
    net: Net,
    layers: Collection[str],
    *,
    grid: Grid,
    precision: SplitPrecision = "float",
) -> RewriteReport:
    """Split the named convolutions into a coarse and a fine one.

    Args:
        net: a float net.
        layers: names of Conv nodes.
        grid: codes of the weights; the coarse part is put on this grid.
        precision: of the two summands in the quantized graph, for `reptrt.graph.placement`.
    """
    changed, skipped, splits = [], [], []
    for node in [n for n in weighted_nodes(net.graph) if n.name in layers]:
        reason = reason_against(node)
        if reason is not None:
            skipped.append(Skipped(node.name, reason))
            continue
        changed.append(node.name)
        splits.append(_split(net, node, grid, precision))
    net.graph.toposort()
    record_splits(net, splits)
    return RewriteReport("split_coarse_fine", tuple(changed), tuple(skipped))


def coarse_and_fine(weight: FloatArray, grid: Grid) -> tuple[FloatArray, FloatArray]:
    """Return (coarse, fine) with coarse + fine = weight, shaped like the weight (O, I, kH, kW).

    All-zero centre channels stay zero in the coarse part. Computed in the weight's own type, so
    that the sum is exact to one rounding.
    """
    mask = np.zeros(weight.shape[2:], dtype=bool)
    mask[centre_of(weight)] = True
    part = weight.astype(np.float64) * mask
    step = np.abs(part).max(axis=(1, 2, 3), keepdims=True) / grid.qmax
    step = np.where(step > 0, step, 1.0).astype(np.float32).astype(np.float64)
    coarse = (np.rint(part / step) * step).astype(weight.dtype)
    return coarse, weight - coarse


def centre_of(weight: FloatArray) -> tuple[int, int]:
    """Return the index of the centre tap of a kernel (O, I, kH, kW)."""
    return weight.shape[2] // 2, weight.shape[3] // 2


def centre_pads(node: gs.Node) -> list[int] | None:
    """Return the pads of a 1x1 convolution that reads the centre taps; None if it would crop."""
    height, width = node.inputs[1].values.shape[2:]
    dilations = list(node.attrs.get("dilations") or (1, 1))
    reach = [height // 2 * dilations[0], width // 2 * dilations[1]]
    pads = list(node.attrs.get("pads") or (0, 0, 0, 0))
    inner = [pad - back for pad, back in zip(pads, reach * 2, strict=True)]
    return inner if min(inner) >= 0 else None


def reason_against(node: gs.Node) -> str | None:
    """Return why a weighted node cannot be split, or None."""
    weight = constant_value(node.inputs[1])
    if node.op != "Conv" or weight is None or weight.ndim != 4:
        return "not a 2-D convolution with a constant weight"
    if weight.shape[2:] == (1, 1):
        return "a 1x1 kernel is all centre"
    if not (weight.shape[2] % 2 and weight.shape[3] % 2):
        return "an even kernel has no centre tap"
    if node.attrs.get("auto_pad", "NOTSET") != "NOTSET" or centre_pads(node) is None:
        return "padding is less than half the kernel: a 1x1 convolution cannot read the centre"
    return None


def _split(net: Net, node: gs.Node, grid: Grid, precision: SplitPrecision) -> Split:
    name, output = node.name, node.outputs[0]
    total, side, main = (net.fresh_name(f"{name}.{role}") for role in ("sum", "coarse", "fine"))
    weight = np.asarray(constant_value(node.inputs[1]))
    coarse, fine = coarse_and_fine(weight, grid)
    row, column = centre_of(weight)
    coarse = np.ascontiguousarray(coarse[:, :, row : row + 1, column : column + 1])
    attrs = node.attrs | {"kernel_shape": [1, 1], "dilations": [1, 1], "pads": centre_pads(node)}
    parts = [gs.Variable(net.fresh_name(f"{part}.output"), np.float32) for part in (main, side)]
    node.inputs[1] = gs.Constant(net.fresh_name(f"{main}.weight"), fine)
    node.name, node.outputs = main, [parts[0]]
    weights = gs.Constant(net.fresh_name(f"{side}.weight"), coarse)
    net.graph.nodes += [
        gs.Node("Conv", side, attrs, [node.inputs[0], weights], [parts[1]]),
        gs.Node("Add", total, {}, parts, [output]),
    ]
    return Split(name, "coarse-fine", total, side, main, precision)
