"""Put ``x + 0`` before a ReLU behind a product of tensors: its output can then have full range.

`reptrt.rewrite.recentre` takes a constant from the output of a ReLU by the bias of the layer before
it. Behind the product with a squeeze-excite gate there is none: the Add is one. It costs nothing,
because recentring removes the ReLU, and both are one pointwise operation.

Requires: nothing. Ensures: every tensor keeps name and value. `remove_offsets` takes the Adds that
were not used away again.
"""

from collections.abc import Iterable

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.graph.net import Net, constant_of, producer
from reptrt.graph.placement import Placement
from reptrt.graph.queries import value_inputs


def insert_offsets(net: Net, placement: Placement) -> tuple[str, ...]:
    """Insert an Add of 0 before each ReLU that needs one; return their names.

    Args:
        net: a float net.
        placement: where pairs go; only the outputs of ReLUs that get one are considered.
    """
    tensors = net.graph.tensors()
    relus = [producer(tensors[activation.tensor]) for activation in placement.activations]
    added = []
    for relu in relus:
        if relu is None or relu.op != "Relu":
            continue
        source = relu.inputs[0]
        maker = producer(source)
        if maker is None or maker.op != "Mul" or len(value_inputs(maker)) < 2:
            continue
        name = net.fresh_name(f"{relu.name}.offset")
        shifted = gs.Variable(net.fresh_name(f"{name}.output"), source.dtype, source.shape)
        zero = gs.Constant(net.fresh_name(f"{name}.value"), np.zeros((), np.float32))
        net.graph.nodes.append(gs.Node("Add", name, {}, [source, zero], [shifted]))
        relu.inputs[0] = shifted
        added.append(name)
    if added:
        net.graph.toposort()
    return tuple(added)


def remove_offsets(net: Net, names: Iterable[str], full_range: Iterable[str]) -> None:
    """Remove Adds of 0 in place.

    Args:
        net: the float net.
        names: of Adds that `insert_offsets` made.
        full_range: tensors that have full range; the Adds before these stay.
    """
    kept, wanted = set(full_range), set(names)
    for node in [node for node in net.graph.nodes if node.name in wanted]:
        (relu,) = node.outputs[0].outputs
        if relu.outputs[0].name in kept or np.any(constant_of(node.inputs[1])):
            continue
        relu.inputs[0] = node.inputs[0]
        node.inputs.clear()
        node.outputs.clear()
    if wanted:
        net.graph.cleanup(remove_unused_graph_inputs=False).toposort()
