"""Give recentred activations UINT8 codes with zero point 0 again: the way back from `recentre`.

A runtime without TensorRT's restrictions then pads with zeros as it should: code 0 is x = 0.

Requires: FP32 scales, biases and float nodes. Ensures: every code grows by c / scale, and nothing
else changes, to float rounding: biases go back, border maps go, and the saturation of Q at 0 stays
in place of the ReLU.
"""

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.graph.layers import add_to_bias
from reptrt.graph.net import Net
from reptrt.graph.qdq import Pair, pair_of
from reptrt.graph.queries import symmetric_int8_scale
from reptrt.graph.recentred import Recentred, read_recentred, record_recentred
from reptrt.rewrite.contract import RewriteReport, Skipped
from reptrt.rewrite.offsets import move_pair, offsets_of, total


def restore(net: Net) -> RewriteReport:
    """Restore all recentred tensors of a net, in place.

    A tensor whose nodes are not those of its record, in a file that another tool changed, stays as
    it is.
    """
    nodes = {node.name: node for node in net.graph.nodes}
    records = [(record, _pair_and_offset(nodes, record)) for record in read_recentred(net)]
    pairs = [(record, *pair) for record, pair in records if pair is not None]
    left = [record for record, pair in records if pair is None]
    deltas = total(offsets_of(nodes, record, -offset) for record, _, offset in pairs)
    for record, pair, offset in pairs:
        move_pair(net, pair, [nodes[name] for name in record.clips], np.uint8, offset)
        for name in record.added:
            _drop(nodes[name])
    for name, delta in deltas.items():
        add_to_bias(net, nodes[name], delta)
    record_recentred(net, left)
    return RewriteReport(
        "restore",
        tuple(record.tensor for record, _, _ in pairs),
        tuple(Skipped(record.tensor, "its record does not fit the graph") for record in left),
    )


def _pair_and_offset(nodes: Mapping[str, gs.Node], record: Recentred) -> tuple[Pair, float] | None:
    """Return the pair of a recentred tensor and c; None if the record does not fit the graph."""
    muls = [mul for mul, _ in record.factors]
    targets = [record.producer, *record.layers, *(name for _, name in record.factors)]
    names = (*targets, *record.skips, *muls, *record.clips, *record.added, record.quantize)
    if any(name not in nodes for name in names):
        return None
    quantize = nodes[record.quantize]
    if any(reader.op != "DequantizeLinear" for reader in quantize.outputs[0].outputs):
        return None
    pair = pair_of(quantize)
    scale = symmetric_int8_scale(quantize)
    if scale is None or any(symmetric_int8_scale(node) is None for node in pair.dequantizes):
        return None
    return pair, record.code * float(scale)


def _drop(node: gs.Node) -> None:
    """Remove an Add that recentring made behind a tensor that nothing else reads."""
    source, result = node.inputs[0], node.outputs[0]
    maker = source.inputs[0]
    node.inputs.clear()
    node.outputs.clear()
    index = next(i for i, tensor in enumerate(maker.outputs) if tensor is source)
    maker.outputs[index] = result
