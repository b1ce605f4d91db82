"""Fold batch normalization into the convolution or Gemm before it, in float64.

    y = gamma * (conv(x, W) + b - mean) / std + beta,      std = sqrt(var + epsilon)
    W' = W * gamma / std,   b' = (b - mean) * gamma / std + beta         per output channel

Requires: inference-mode BatchNormalization with constant parameters.
Ensures: the output tensor of every folded BatchNormalization keeps its name and value.
"""

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from reptrt.core.errors import RewriteError
from reptrt.graph.net import Net, constant_value, first_free, is_private, producer
from reptrt.rewrite.contract import RewriteReport, Skipped

Float64Array = npt.NDArray[np.float64]
_CHANNEL_AXIS = {"Conv": 0, "Gemm": 0, "ConvTranspose": 1}


def fold_batchnorm(net: Net) -> RewriteReport:
    """Fold each BatchNormalization into its producer; constants become float64.

    Raises:
        RewriteError: a BatchNormalization is in training mode: the net was exported without eval().
    """
    refuse_training_mode(net)
    taken = set(net.graph.tensors())
    changed, skipped = [], []
    for norm in [node for node in net.graph.nodes if node.op == "BatchNormalization"]:
        target = producer(norm.inputs[0])
        reason = _reason_against(net, norm, target)
        if reason is not None:
            skipped.append(Skipped(norm.name, reason))
            continue
        assert target is not None
        _fold(norm, target, taken)
        changed.append(target.name)
    return RewriteReport("fold_batchnorm", tuple(changed), tuple(skipped))


def affine_of(norm: gs.Node) -> tuple[Float64Array, Float64Array] | None:
    """Return (scale, bias) of a BatchNormalization, y = scale * x + bias; None if not constant."""
    values = [constant_value(tensor) for tensor in norm.inputs[1:5]]
    if any(value is None for value in values):
        return None
    gamma, beta, mean, var = (np.asarray(value, dtype=np.float64) for value in values)
    scale = gamma / np.sqrt(var + float(norm.attrs.get("epsilon", 1e-5)))
    return scale, beta - mean * scale


def refuse_training_mode(net: Net) -> None:
    """Raise if any node is exported in training mode."""
    training = [
        node.name
        for node in net.graph.nodes
        if node.op == "BatchNormalization"
        and (node.attrs.get("training_mode", 0) or len(node.outputs) > 1)
    ]
    if training:
        raise RewriteError(
            f"{training[0]} (and {len(training) - 1} more): batch norm is in training mode, so its "
            "output depends on the batch; export the net after net.eval()"
        )


def _reason_against(net: Net, norm: gs.Node, target: gs.Node | None) -> str | None:
    if target is None or target.op not in _CHANNEL_AXIS:
        return "no convolution or Gemm before it"
    if not is_private(net.graph, norm.inputs[0]):
        return f"the output of {target.name} is used elsewhere too"
    parameters = [tensor for tensor in target.inputs[1:] if tensor.name]
    if any(constant_value(tensor) is None for tensor in parameters) or affine_of(norm) is None:
        return "weights or statistics are not constant"
    if target.op == "ConvTranspose" and target.attrs.get("group", 1) != 1:
        return "grouped transposed convolution"
    if target.op == "Gemm" and (
        not target.attrs.get("transB", 0)
        or target.attrs.get("alpha", 1.0) != 1.0
        or target.attrs.get("beta", 1.0) != 1.0
    ):
        return "Gemm with alpha, beta or an untransposed weight"
    return None


def _fold(norm: gs.Node, target: gs.Node, taken: set[str]) -> None:
    affine = affine_of(norm)
    weight = constant_value(target.inputs[1])
    assert affine is not None  # _reason_against has looked
    assert weight is not None
    scale, shift = affine
    shape = [1] * weight.ndim
    shape[_CHANNEL_AXIS[target.op]] = -1
    names = [first_free(f"{t.name}.folded", taken) for t in (target.inputs[1], norm.inputs[2])]
    taken.update(names)
    bias = constant_value(target.inputs[2]) if len(target.inputs) > 2 else None
    folded = weight.astype(np.float64) * scale.reshape(shape)
    target.inputs = [
        target.inputs[0],
        gs.Constant(names[0], folded),
        gs.Constant(names[1], (0.0 if bias is None else bias) * scale + shift),
    ]
    result = norm.outputs[0]
    norm.inputs.clear()
    norm.outputs.clear()
    target.outputs = [result]
