"""Identity splitting: take the diagonal of the centre tap out of the kernel and add it as a skip.

    W = W_rest + diag(d) at the centre tap,     y = conv(x, W_rest) + d * x + b

The largest values of a fused rep kernel are on that diagonal, one in each output channel, and the
INT8 step of the channel has to cover it. Without the diagonal the other weights get the whole
range. Unlike coarse-fine splitting this helps 1x1 convolutions too and adds no convolution. Ours.

Two forms: ``per-channel`` takes d = the whole diagonal, kept in float: exact. ``scalar`` takes one
d0 for the layer, chosen to minimise the rounding error of the rest; d0 * x then has the codes of x
and another scale, so the skip is a plain residual.

Requires: stride 1, as many input as output channels in every group, the centre tap on the output
position. Ensures: the output tensor keeps its name and, to float rounding, its value.
"""

from collections.abc import Collection

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.core.arrays import FloatArray
from reptrt.core.choices import SplitForm, SplitPrecision
from reptrt.core.grid import Grid, along_axis, channel_amax
from reptrt.graph.net import Net, constant_of, constant_value, weighted_nodes
from reptrt.graph.splits import Split, record_splits
from reptrt.rewrite.contract import RewriteReport, Skipped
from reptrt.rewrite.split_coarse_fine import centre_of, centre_pads

NO_FACTOR = "no positive factor leaves smaller steps"


def split_identity(
    net: Net,
    layers: Collection[str],
    *,
    grid: Grid,
    form: SplitForm = "identity",
    precision: SplitPrecision = "float",
) -> RewriteReport:
    """Split the diagonal out of the named convolutions.

    Args:
        net: a float net.
        layers: names of Conv nodes.
        grid: codes of the weights; the scalar form chooses d0 for it.
        form: one factor per channel, or one per layer.
        precision: of the two summands in the quantized graph, for `reptrt.graph.placement`.
    """
    changed, skipped, splits = [], [], []
    for node in [n for n in weighted_nodes(net.graph) if n.name in layers]:
        reason = reason_against(node)
        factor = None if reason is not None else factor_of(constant_of(node.inputs[1]), grid, form)
        if factor is None:
            skipped.append(Skipped(node.name, reason or NO_FACTOR))
            continue
        changed.append(node.name)
        splits.append(_split(net, node, factor, precision))
    net.graph.toposort()
    record_splits(net, splits)
    return RewriteReport("split_identity", tuple(changed), tuple(skipped))


def diagonal_of(weight: FloatArray) -> FloatArray:
    """Return the centre tap's diagonal of a grouped kernel (O, I / groups, kH, kW): shape (O,)."""
    channels = np.arange(weight.shape[0])
    row, column = centre_of(weight)
    return np.asarray(weight[channels, channels % weight.shape[1], row, column], weight.dtype)


def without_diagonal(weight: FloatArray, diagonal: FloatArray | float) -> FloatArray:
    """Return the kernel with ``diagonal`` subtracted from its centre tap's diagonal."""
    rest: FloatArray = weight.copy()
    channels = np.arange(weight.shape[0])
    row, column = centre_of(weight)
    rest[channels, channels % weight.shape[1], row, column] -= diagonal
    return rest


def factor_of(weight: FloatArray, grid: Grid, form: SplitForm) -> FloatArray | None:
    """Return what x is multiplied with in the skip: (O,), or () of the scalar form.

    None: no positive scalar reduces the steps of the rest. A scalar factor must be positive because
    it becomes the scale of a Q/DQ pair.
    """
    if form == "identity":
        return diagonal_of(weight)
    factor = best_scalar(weight, grid)
    return np.array(factor, weight.dtype) if factor > 0 else None


def best_scalar(weight: FloatArray, grid: Grid) -> float:
    """Return the d0 >= 0 with the least sum of squared steps of the rest, sum_o (amax_o / qmax)^2.

    The rounding error of an output channel is uniform with variance step^2 / 12. Candidates are 0
    and the quantiles of the diagonal; finer candidates hardly change the sum.
    """
    diagonal = diagonal_of(weight)
    others = channel_amax(without_diagonal(weight, diagonal), 0)
    quantiles = np.quantile(diagonal, np.linspace(0.0, 1.0, 65))
    candidates = np.unique(np.append(quantiles[quantiles > 0], 0.0))
    amax = np.maximum(others[None, :], np.abs(diagonal[None, :] - candidates[:, None]))
    return float(candidates[np.argmin(np.square(amax / grid.qmax).sum(axis=1))])


def reason_against(node: gs.Node) -> str | None:
    """Return why a weighted node cannot be split, or None."""
    weight = constant_value(node.inputs[1])
    if node.op != "Conv" or weight is None or weight.ndim != 4:
        return "not a 2-D convolution with a constant weight"
    if tuple(node.attrs.get("strides") or (1, 1)) != (1, 1):
        return "stride: the output has no position for each input position"
    if weight.shape[0] != weight.shape[1] * int(node.attrs.get("group", 1)):
        return "input and output channels differ: there is no diagonal"
    if not (weight.shape[2] % 2 and weight.shape[3] % 2):
        return "an even kernel has no centre tap"
    if node.attrs.get("auto_pad", "NOTSET") != "NOTSET" or centre_pads(node) != [0, 0, 0, 0]:
        return "padding is not half the kernel: the centre tap is not on the output position"
    return None


def _split(net: Net, node: gs.Node, factor: FloatArray, precision: SplitPrecision) -> Split:
    name, output = node.name, node.outputs[0]
    form: SplitForm = "identity" if factor.ndim else "identity-scalar"
    total, side, main = (net.fresh_name(f"{name}.{role}") for role in ("sum", "identity", "rest"))
    rest = without_diagonal(constant_of(node.inputs[1]), factor)
    factor = along_axis(factor.astype(np.float32), 4, 1) if factor.ndim else factor
    parts = [gs.Variable(net.fresh_name(f"{part}.output"), np.float32) for part in (main, side)]
    node.inputs[1] = gs.Constant(net.fresh_name(f"{main}.weight"), rest)
    node.name, node.outputs = main, [parts[0]]
    scale = gs.Constant(net.fresh_name(f"{name}.diagonal"), np.asarray(factor, dtype=np.float32))
    net.graph.nodes += [
        gs.Node("Mul", side, {}, [node.inputs[0], scale], [parts[1]]),
        gs.Node("Add", total, {}, parts, [output]),
    ]
    return Split(name, form, total, side, main, precision)
