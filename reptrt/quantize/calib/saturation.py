"""What an INT8 sum needs to know of a summand, where a ReLU follows.

In an INT8 identity split the output of the rest is added to d0 x, and a ReLU follows:

    y = relu(rest + d0 x)

Where the ReLU is off, the value of the rest is of no account as long as it keeps the ReLU off. So
the codes of the rest have to represent only

    needed = y - d0 x = max(rest, -d0 x)          relu(needed + d0 x) = y

which lies near 0 where the rest lies far below it. An error of ``needed`` is the error of y. Ours.
"""

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.graph.net import Net, is_private
from reptrt.graph.splits import read_splits
from reptrt.quantize.calib.histogram import Histogram


def with_needed(net: Net) -> tuple[Net, dict[str, str]]:
    """Return a net that also computes what its INT8 sums need, and the names of those tensors.

    Args:
        net: a float net, after the splits; not changed.

    Returns:
        A copy, and output of a rest -> what is needed of it.
    """
    copy = net.copy()
    nodes = {node.name: node for node in copy.graph.nodes}
    needed: dict[str, str] = {}
    for split in read_splits(net):
        if split.form != "identity-scalar" or split.precision != "int8":
            continue
        added, skip = nodes[split.sum].outputs[0], nodes[split.side].outputs[0]
        relu = added.outputs[0] if is_private(copy.graph, added) else None
        if relu is None or relu.op != "Relu":
            continue
        rest = nodes[split.main].outputs[0].name
        needed[rest] = copy.fresh_name(f"{rest}.needed")
        difference = gs.Variable(needed[rest], np.float32, added.shape)
        inputs = [relu.outputs[0], skip]
        copy.graph.nodes.append(gs.Node("Sub", needed[rest], {}, inputs, [difference]))
    copy.graph.toposort()
    return copy, needed


def renamed(histograms: Mapping[str, Histogram], needed: Mapping[str, str]) -> dict[str, Histogram]:
    """Return the histograms with what is needed of a summand in place of its values."""
    of_others = {k: v for k, v in histograms.items() if k not in needed.values()}
    return of_others | {rest: histograms[name] for rest, name in needed.items()}
