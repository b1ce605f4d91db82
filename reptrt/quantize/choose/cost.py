"""Cost in multiply-accumulates per image: of a net, of a split, and of full range.

What one elementwise pass over one output element counts is a property of the runtime
(`reptrt.quantize.targets`). The Mul and the Add of an identity split are one pass.
"""

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.core.choices import SplitForm
from reptrt.graph.net import Net, constant_of, constant_value, weighted_nodes
from reptrt.graph.splits import read_splits
from reptrt.quantize.targets import Costs
from reptrt.rewrite.recentre import padded_readers
from reptrt.rewrite.surroundings import Surroundings


def num_macs(net: Net) -> int:
    """Return the multiply-accumulates of a net's weighted layers, as far as shapes are known."""
    return sum(layer_macs(node) for node in weighted_nodes(net.graph))


def split_macs(node: gs.Node, form: SplitForm, costs: Costs) -> int:
    """Return the cost of splitting a convolution."""
    return _split_macs(node, node.name, form, node.outputs[0], costs)


def _split_macs(node: gs.Node, layer: str, form: SplitForm, output: gs.Tensor, costs: Costs) -> int:
    """Return what was measured, or the cost of a pass that adds and of a coarse 1x1 layer."""
    if form == "none":
        return 0
    if (measured := costs.of_splits.get(layer, {}).get(form)) is not None:
        return round(measured)
    outputs, inputs = constant_of(node.inputs[1]).shape[:2]
    coarse = int(inputs) if form == "coarse-fine" else 0
    return round(int(outputs) * (costs.pass_macs + coarse) * num_positions(output))


def splits_macs(net: Net, costs: Costs) -> int:
    """Return the cost of all splits that a net has."""
    nodes = {node.name: node for node in net.graph.nodes}
    return sum(
        _split_macs(nodes[split.main], split.layer, split.form, nodes[split.sum].outputs[0], costs)
        for split in read_splits(net)
    )


def full_range_macs(net: Net, tensor: str, costs: Costs) -> int:
    """Return the cost of full range for one activation.

    Each padded convolution that reads the activation needs a map for its border, and each average
    pool one value per channel; for other consumers full range is free.
    """
    maps = [reader.map_shape or () for reader in padded_readers(net, tensor)]
    readers = Surroundings(net, set()).readers(net.graph.tensors()[tensor], fixed=False)
    averages = [] if isinstance(readers, str) else readers.averages
    channels = [int((node.outputs[0].shape or (0, 1))[1]) for node in averages]
    return round(costs.border_macs * (int(sum(np.prod(shape) for shape in maps)) + sum(channels)))


def layer_macs(node: gs.Node) -> int:
    """Return the multiply-accumulates of a weighted layer, as far as shapes are known."""
    weight = constant_value(node.inputs[1])
    return 0 if weight is None else int(weight.size) * num_positions(node.outputs[0])


def num_values(tensor: gs.Tensor) -> int:
    """Return the values of one image, as far as sizes are known."""
    sizes = [size for size in (tensor.shape or ())[1:] if isinstance(size, int) and size > 0]
    return int(np.prod(sizes)) if sizes else 1


def num_positions(output: gs.Tensor) -> int:
    """Return the number of positions of a layer's output; 1 if the shape is not known."""
    sizes = [size for size in (output.shape or ())[2:] if isinstance(size, int)]
    return int(np.prod(sizes)) if sizes else 1
