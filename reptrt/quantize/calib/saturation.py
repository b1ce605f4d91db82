"""Values of a summand that may be clipped because they cannot change the quantized result.

In an INT8 identity split the output of the rest is added to d0 x; a ReLU follows, and a Q/DQ pair
that keeps values up to y_max:

    y = relu(rest + d0 x),   0 <= x <= x_max,   0 < d0

If rest < -d0 x_max, the sum is negative for every x, and y is 0. If rest > y_max, the pair
saturates. The codes of the rest therefore only have to reach max(d0 x_max, y_max), although its
values are far below zero in channels whose output is mostly 0. Ours.
"""

from collections.abc import Mapping

from reptrt.graph.net import Net, constant_of, is_private
from reptrt.graph.splits import read_splits
from reptrt.quantize.calib.histogram import Histogram


def without_dead_values(net: Net, histograms: Mapping[str, Histogram]) -> dict[str, Histogram]:
    """Return the histograms; those of INT8 rests lose the values that cannot change the result.

    Args:
        net: the float net, after the splits.
        histograms: tensor name -> histogram, of every activation to be quantized.
    """
    limited = dict(histograms)
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
        limited[rest] = limited[rest].below(max(skip, y.maximum))
    return limited
