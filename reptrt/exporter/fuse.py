"""A train-form ONNX model as a fused net: all merging happens on the graph, in float64."""

import onnx

from reptrt.exporter.constants import with_constants_folded
from reptrt.graph.net import Net, net_from_model, refuse_not_finite
from reptrt.graph.preprocess import Preprocess, write_preprocess
from reptrt.graph.trained import find_trained, write_trained
from reptrt.rewrite.absorb_affines import absorb_affines
from reptrt.rewrite.contract import RewriteReport, Skipped
from reptrt.rewrite.fuse_branches import fuse_branches
from reptrt.rewrite.naming import name_layers
from reptrt.rewrite.simplify import narrow_to_float32, simplify
from reptrt.rewrite.sum_bins import sum_bins


def fuse(model: onnx.ModelProto, preprocess: Preprocess) -> tuple[Net, RewriteReport]:
    """Return the fused net with its preprocessing, and what was fused and left alone.

    Raises:
        ArtifactError: the weights hold NaN or Inf.
        RewriteError: the net is in train mode.
    """
    net = net_from_model(with_constants_folded(model))
    refuse_not_finite(net)
    simplify(net)
    sum_bins(net)
    trained = find_trained(net)
    report = merge_linear(net)
    write_trained(net, trained)
    narrow_to_float32(net)
    name_layers(net)
    write_preprocess(net, preprocess)
    return net, report


def merge_linear(net: Net) -> RewriteReport:
    """Absorb affines and fuse branches in turn until nothing changes any more.

    Each enables the other: a batch norm behind a rep block can be absorbed once the block is
    one convolution, and that convolution can be a branch of a larger block.

    Returns:
        The convolutions that stand for several branches, and each batch norm, affine and sum of
        linear branches that is left, with the reason.
    """
    fused: dict[str, None] = {}
    while True:
        affines, branches = absorb_affines(net), fuse_branches(net)
        fused |= dict.fromkeys(branches.changed)
        if not branches.changed:
            break
    present = {node.name for node in net.graph.nodes}
    skipped: dict[Skipped, None] = dict.fromkeys((*branches.skipped, *affines.skipped))
    changed = tuple(name for name in fused if name in present)
    return RewriteReport("merge_linear", changed, tuple(skipped))
