"""Cost in multiply-accumulates per image: of a net, and of what full range adds to it.

One elementwise operation on one output element (the Add or the Mul of a split) counts as
`ELEMENTWISE_MACS`: it moves a byte or two and computes next to nothing.
"""

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.graph.net import Net, constant_value, weighted_nodes
from reptrt.rewrite.recentre import padded_readers
from reptrt.rewrite.surroundings import Surroundings

ELEMENTWISE_MACS = 8


def num_macs(net: Net) -> int:
    """Return the multiply-accumulates of a net's weighted layers, as far as shapes are known."""
    return sum(_macs(node) for node in weighted_nodes(net.graph))


def num_positions(node: gs.Node) -> int:
    """Return the number of output positions of a node; 1 if the shape is not known."""
    sizes = [size for size in (node.outputs[0].shape or ())[2:] if isinstance(size, int)]
    return int(np.prod(sizes)) if sizes else 1


def full_range_macs(net: Net, tensor: str) -> int:
    """Return the cost of full range for one activation.

    Each padded convolution that reads the activation needs a map for its border, and each average
    pool one value per channel; for other consumers full range is free.
    """
    maps = [reader.map_shape or () for reader in padded_readers(net, tensor)]
    readers = Surroundings(net, set()).readers(net.graph.tensors()[tensor], fixed=False)
    averages = [] if isinstance(readers, str) else readers.averages
    channels = [int((node.outputs[0].shape or (0, 1))[1]) for node in averages]
    return ELEMENTWISE_MACS * (int(sum(np.prod(shape) for shape in maps)) + sum(channels))


def _macs(node: gs.Node) -> int:
    weight = constant_value(node.inputs[1])
    return 0 if weight is None else int(weight.size) * num_positions(node)
