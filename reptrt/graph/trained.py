"""What a net's batch norms know of the images that it was trained on, kept in its metadata.

A batch norm makes its output from running statistics, so that over the training images each channel
has mean beta and standard deviation |gamma|. Of a sum of batch norms the means add up exactly, the
variances as far as the branches do not depend on each other:

    E[sum_b BN_b(x)] = sum_b beta_b        deviation = sqrt(sum_b gamma_b^2)

(data-free quantization, arXiv 1906.04721, has the same statistics for one batch norm.) Fusion
removes the batch norms and keeps the sums, which are what a fused convolution makes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from reptrt.core.arrays import Float32Array, floats_of, text_of
from reptrt.graph.net import Net, constant_value, get_json, set_json

_KEY = "trained"
_MOST = 6  # tensors that are kept: the first ones show what is wrong with images


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """Statistics of a tensor over the training images."""

    mean: Float32Array  # (C,)
    deviation: Float32Array  # (C,), 0 for a channel that is constant


def find_trained(net: Net) -> dict[str, Trained]:
    """Return the statistics of every batch norm of a net that is not fused, and of their sums.

    A batch norm whose running statistics are those of its initialization has seen no image and is
    left out. Fusion takes the terms of a sum away and keeps the sum.
    """
    known: dict[str, Trained] = {}
    for node in net.graph.nodes:
        statistics = None
        if node.op == "BatchNormalization":
            statistics = _of_batch_norm(node)
        elif node.op in ("Add", "Sum", "Identity"):
            names = [tensor.name for tensor in node.inputs]
            if all(name in known for name in names):
                statistics = _sum([known[name] for name in names])
        if statistics is not None:
            known[node.outputs[0].name] = statistics
    return known


def write_trained(net: Net, trained: Mapping[str, Trained]) -> None:
    """Keep the statistics of the first tensors that are still in a net, in its metadata."""
    present = [name for name in trained if name in net.graph.tensors()]
    if present:
        records = {name: _to_json(trained[name]) for name in present[:_MOST]}
        set_json(net, _KEY, records)


def take_trained(net: Net) -> dict[str, Trained]:
    """Return the statistics that a net's metadata keep, and remove them; empty if there are none.

    Raises:
        ArtifactError: the metadata are damaged.
    """

    def parse(stored: dict[str, Any]) -> dict[str, Trained]:
        return {name: _from_json(record) for name, record in stored.items()}

    found = get_json(net, _KEY, parse) or {}
    net.metadata.pop(f"reptrt.{_KEY}", None)
    present = net.graph.tensors()
    return {name: statistics for name, statistics in found.items() if name in present}


def _of_batch_norm(node: gs.Node) -> Trained | None:
    gamma, beta, mean, variance = (constant_value(tensor) for tensor in node.inputs[1:5])
    if gamma is None or beta is None or mean is None or variance is None:
        return None
    if not mean.any() and bool((variance == 1).all()):
        return None
    return Trained(beta.astype(np.float32), np.abs(gamma).astype(np.float32))


def _sum(terms: list[Trained]) -> Trained | None:
    if len({term.mean.shape for term in terms}) != 1:
        return None
    return Trained(
        np.sum([term.mean for term in terms], axis=0),
        np.sqrt(np.sum([np.square(term.deviation) for term in terms], axis=0)),
    )


def _to_json(statistics: Trained) -> dict[str, str]:
    return {"mean": text_of(statistics.mean), "deviation": text_of(statistics.deviation)}


def _from_json(record: Mapping[str, str]) -> Trained:
    mean, deviation = floats_of(record["mean"]), floats_of(record["deviation"])
    if mean.shape != deviation.shape:
        raise ValueError(f"{mean.size} means and {deviation.size} deviations")
    return Trained(mean, deviation)
