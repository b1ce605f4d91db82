"""One layer as a piece of a graph: from the tensor that its input comes from to its output.

A split layer is one piece, with both of its parts. The names are those of the float graph, and of
every Q/DQ graph that is made of it, so that the same piece can be run in both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from reptrt.graph.flow import moves_values
from reptrt.graph.net import Net, producer
from reptrt.graph.splits import Split, read_splits


@dataclass(frozen=True, slots=True)
class Probe:
    """One layer: the sub-graph from the tensor that its input comes from to its output."""

    layer: str
    origin: str  # the tensor behind which the Q/DQ pair of the layer's input is inserted
    output: str  # the output tensor (N, O, ...); for a split layer, the sum


def probes_of(net: Net, layers: Sequence[str]) -> tuple[Probe, ...]:
    """Return a probe for each layer of the net before splits; the layer may be split by now."""
    nodes = {node.name: node for node in net.graph.nodes}
    splits = {split.layer: split for split in read_splits(net)}
    return tuple(_probe(layer, nodes, splits.get(layer)) for layer in layers)


def _probe(layer: str, nodes: Mapping[str, gs.Node], split: Split | None) -> Probe:
    reader = nodes[layer if split is None else split.main]
    origin = reader.inputs[0]
    while (maker := producer(origin)) is not None and moves_values(maker):
        origin = maker.inputs[0]
    output = nodes[layer if split is None else split.sum].outputs[0]
    return Probe(layer, origin.name, output.name)
