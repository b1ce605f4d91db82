"""The arithmetic inside activation functions: 1 + erf(x / 1.41) of GELU, (x + 3) / 6 of hard swish.

Such affines are no batch norms that fusion could have absorbed: they are part of the function.
"""

from collections.abc import Iterator, Mapping

import onnx_graphsurgeon as gs

from reptrt.graph.net import producer
from reptrt.graph.queries import joined_tensor, value_inputs


def nodes_in_activations(graph: gs.Graph) -> frozenset[str]:
    """Return the names of nodes inside the activation functions of a graph, which is sorted.

    A function starts at a tensor and ends at the product of it and a pointwise function of it
    (x * sigmoid(x)); a constant factor behind that product (0.5 * ...) belongs to it.
    """
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    order = {id(node): place for place, node in enumerate(graph.nodes)}
    inside: set[str] = set()
    for node in graph.nodes:
        if len(value_inputs(node)) < 2 or node.op not in ("Mul", "Div"):
            continue
        start = joined_tensor(node, order)
        if start is None:
            continue
        maker = producer(start)
        first = -1 if maker is None else order[id(maker)]
        inside |= {above.name for above in _above(node, order, first)}
        readers = node.outputs[0].outputs
        if len(readers) == 1 and readers[0].op in ("Mul", "Div"):
            inside |= {readers[0].name} if len(value_inputs(readers[0])) == 1 else set()
    return frozenset(inside)


def _above(node: gs.Node, order: Mapping[int, int], first: int) -> Iterator[gs.Node]:
    """Yield the nodes behind a place in the order from which a node's operands are computed."""
    for _, tensor in value_inputs(node):
        maker = producer(tensor)
        if maker is not None and order[id(maker)] > first:
            yield maker
            yield from _above(maker, order, first)
