"""Layers at both ends of a net that stay in float where the runtime asks little for it (ours).

What the first layer reads, an image, has as many steps as INT8 has codes, and nothing averages the
noise of the last layer. Both are small in most nets. In float a layer costs

    (float_macs - 1) MACs  +  crossing_macs values that cross between float and INT8

as a fraction of the net's own multiply-accumulates. A first layer whose output is also a summand is
no candidate: onnxruntime keeps float layers and INT8 layers in different layouts, and would change
the layout before and behind every sum of the chain. Any other end is one if that is at most
`MOST`, and stays in float if the error of the outputs falls by a larger share.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import onnx_graphsurgeon as gs

from reptrt.graph.net import Net, weighted_nodes
from reptrt.graph.queries import POINTWISE, value_inputs
from reptrt.quantize.choose.cost import layer_macs, num_values
from reptrt.quantize.targets import Costs

MOST = 0.04  # of the net's multiply-accumulates, for one layer
_TRIED = 4  # layers; each costs one run of the judging images


def prices_of_ends(net: Net, layers: Collection[str], costs: Costs, total: int) -> dict[str, float]:
    """Return the first and last layers that cost little in float, and the price of each.

    Args:
        net: a float net with known shapes, after the splits.
        layers: names of those that may stay in float.
        costs: of the runtime.
        total: multiply-accumulates of the net before the splits, whose parts have no shapes.
    """
    nodes = weighted_nodes(net.graph)
    behind = {id(node): _reaches(node, nodes) for node in nodes}
    later = {name for names in behind.values() for name in names}
    prices: dict[str, float] = {}
    for node in nodes:
        is_first, is_last = node.name not in later, not behind[id(node)]
        if node.name not in layers or not (is_first or is_last) or not total:
            continue
        if is_first and not is_last and _is_summand(node.outputs[0]):
            continue
        ends = [node.outputs[0]] * is_first + [node.inputs[0]] * is_last
        crossing = costs.crossing_macs * sum(map(num_values, ends))
        price = ((costs.float_macs - 1) * layer_macs(node) + crossing) / total
        if price <= MOST:
            prices[node.name] = price
    return prices


def keep_ends(
    prices: Mapping[str, float], error: Callable[[Sequence[str]], float]
) -> tuple[str, ...]:
    """Return the layers that pay in float, the cheapest tried first.

    Args:
        prices: of the candidates.
        error: returns the error of the outputs with some layers in float.
    """
    kept: list[str] = []
    now = error(()) if prices else 0.0
    for layer in sorted(prices, key=lambda name: prices[name])[:_TRIED]:
        changed = error((*kept, layer))
        if now - changed > prices[layer] * now:
            kept, now = [*kept, layer], changed
    return tuple(kept)


def _is_summand(tensor: gs.Tensor) -> bool:
    """Return whether a sum reads a tensor, or a function of it alone, or a multiple of it."""
    for reader in tensor.outputs:
        if reader.op in ("Add", "Sum", "Sub") and len(value_inputs(reader)) > 1:
            return True
        if reader.op in POINTWISE and any(map(_is_summand, reader.outputs)):
            return True
    return False


def _reaches(start: gs.Node, layers: Sequence[gs.Node]) -> set[str]:
    """Return the names of the weighted layers that read what a layer makes."""
    weighted = {id(node) for node in layers}
    found: set[str] = set()
    seen: set[int] = set()
    todo = [reader for tensor in start.outputs for reader in tensor.outputs]
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if id(node) in weighted:
            found.add(node.name)
        else:
            todo += [reader for tensor in node.outputs for reader in tensor.outputs]
    return found
