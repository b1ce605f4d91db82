"""Values that a quantizer may cut off because nothing behind it can tell.

The rest of an INT8 identity split is added to d0 x and goes through a ReLU, into a pair that keeps
at most y_max:

    y = relu(rest + d0 x),   0 <= x <= x_max,   0 < d0

Below -d0 x_max the sum is negative whatever x is, and the ReLU makes it 0; above y_max the pair
behind it saturates. So the rest needs codes up to max(d0 x_max, y_max) only, although it reaches
far below zero in channels that are mostly off. Ours.
"""

from collections.abc import Mapping

from reptrt.graph.net import Net, constant_of, is_private
from reptrt.graph.splits import read_splits
from reptrt.quantize.calib.histogram import Histogram


def without_dead_values(net: Net, histograms: Mapping[str, Histogram]) -> dict[str, Histogram]:
    """Return the histograms, of summands without what a ReLU hides.

    Args:
        net: the float net, splits done.
        histograms: tensor name -> histogram, of every activation to be quantized.
    """
    found = dict(histograms)
    nodes = {node.name: node for node in net.graph.nodes}
    for split in read_splits(net):
        if split.form != "identity-scalar" or split.precision != "int8":
            continue
        added, mul = nodes[split.sum].outputs[0], nodes[split.side]
        rest, x = nodes[split.main].outputs[0].name, histograms.get(mul.inputs[0].name)
        relu = added.outputs[0] if is_private(net.graph, added) else None
        y = histograms.get(relu.outputs[0].name) if relu is not None else None
        if relu is None or relu.op != "Relu" or x is None or y is None or x.minimum < 0:
            continue
        skip = float(constant_of(mul.inputs[1])) * x.maximum
        found[rest] = found[rest].below(max(skip, y.maximum))
    return found
