"""Operators that work element by element."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.nn import functional as F

from reptrt.core.errors import RewriteError
from reptrt.execute.torchops.node import Builder, NodeView, Operator, Precision, plain, together

_VECTOR = 64  # elements; a multiple of every CPU vector loop's step
_SHARE = 32768  # torch uses another thread for each further 32768 elements


def steady(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the function in a form whose result does not depend on an element's position.

    On a CPU, each thread computes its share of a tensor in vectors and the remaining elements one
    by one. For transcendental functions the two results differ in the last bit, so the result for
    an image would depend on its position in the batch. The tensor is therefore padded until every
    share consists of whole vectors.
    """

    def operator(x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return function(x)
        nhwc = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        dense = x.permute(0, 2, 3, 1) if nhwc else x
        size = x.numel()
        shares = min(torch.get_num_threads(), -(-size // _SHARE))
        missing = -size % (_VECTOR * max(shares, 1))
        if not missing and dense.is_contiguous():
            return function(x)
        flat = function(F.pad(dense.reshape(-1), (0, missing)))[:size].view(dense.shape)
        return flat.permute(0, 3, 1, 2) if nhwc else flat

    return operator


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Builder:
    def operator(a: Tensor, b: Tensor) -> Tensor:
        if a.device != b.device:
            a, b = together(a, b)
        return function(a, b)

    return plain(operator)


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Builder:
    return plain(lambda *tensors: reduce(function, together(*tensors)))


def _divide(a: Tensor, b: Tensor) -> Tensor:
    if a.is_floating_point():
        return a / b
    return torch.div(a, b, rounding_mode="trunc")


def _pow(node: NodeView) -> Operator:
    exponent = node.constant(1)
    if exponent is not None and exponent.numel() == 1:
        number = exponent.item()
        raised = steady(lambda x: torch.pow(x, number))
        return lambda x, _: raised(x).to(x.dtype)
    return lambda x, y: torch.pow(*together(x, y)).to(x.dtype)


def _mod(node: NodeView) -> Operator:
    return _binary(torch.fmod if node.attr("fmod", 0) else torch.remainder)(node)


def _clip(node: NodeView) -> Operator:
    if node.opset < 11:
        low, high = node.attr("min", None), node.attr("max", None)
        return lambda x: x if low is None and high is None else torch.clamp(x, low, high)
    bounds = [node.constant(index) for index in (1, 2)]
    if any(node.has(index) and bounds[index - 1] is None for index in (1, 2)):
        return lambda x, low=None, high=None: torch.clamp(x, low, high)
    low, high = (None if bound is None else bound.item() for bound in bounds)
    if low is None and high is None:
        return lambda x, *_: x
    return lambda x, *_: torch.clamp(x, low, high)


def _leaky_relu(node: NodeView) -> Operator:
    slope = node.attr("alpha", 0.01)
    return lambda x: F.leaky_relu(x, slope)


def _hard_sigmoid(node: NodeView) -> Operator:
    alpha, beta = node.attr("alpha", 0.2), node.attr("beta", 0.5)
    return lambda x: torch.clamp(alpha * x + beta, 0.0, 1.0)


def _hard_swish(x: Tensor) -> Tensor:
    return x * torch.clamp(x / 6.0 + 0.5, 0.0, 1.0)


def _elu(node: NodeView) -> Operator:
    alpha = node.attr("alpha", 1.0)
    return steady(lambda x: F.elu(x, alpha))


def _celu(node: NodeView) -> Operator:
    alpha = node.attr("alpha", 1.0)
    return steady(lambda x: F.celu(x, alpha))


def _selu(node: NodeView) -> Operator:
    alpha = node.attr("alpha", 1.67326319217681884765625)
    gamma = node.attr("gamma", 1.05070102214813232421875)
    return steady(lambda x: gamma * F.elu(x, alpha))


def _thresholded_relu(node: NodeView) -> Operator:
    alpha = node.attr("alpha", 1.0)
    return lambda x: torch.where(x > alpha, x, torch.zeros_like(x))


def _gelu(node: NodeView) -> Operator:
    """Return x Phi(x) as erf or tanh: their CPU kernels are steady, torch's own Gelu is not."""
    if node.choice("approximate", "none", ("none", "tanh")) == "none":
        return lambda x: 0.5 * x * (1.0 + torch.erf(x * math.sqrt(0.5)))
    inner = math.sqrt(2.0 / math.pi)
    return lambda x: 0.5 * x * (1.0 + torch.tanh(inner * (x + 0.044715 * x * x * x)))


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=40.0)  # from 40 on, log(1 + exp(x)) equals x even in float64


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x >= 0, x, x * slope)


def _dropout(node: NodeView) -> Operator:
    node.single_output()
    training = node.constant(2)
    if node.has(2) and (training is None or bool(training)):
        raise RewriteError("training mode")
    return _first


def _first(x: Tensor, *_: Any) -> Tensor:
    return x


def torch_dtype(onnx_type: int | np.dtype[Any]) -> torch.dtype:
    """Return the torch type for an ONNX element type, given as its number or as a NumPy type.

    Raises:
        RewriteError: torch has no such type.
    """
    if not isinstance(onnx_type, int):
        onnx_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(onnx_type))
    if onnx_type == onnx.TensorProto.BFLOAT16:
        return torch.bfloat16
    try:
        sample = np.zeros(0, onnx.helper.tensor_dtype_to_np_dtype(onnx_type))
        return torch.from_numpy(sample).dtype
    except (TypeError, KeyError) as err:
        raise RewriteError(f"type {onnx.TensorProto.DataType.Name(onnx_type)}") from err


@dataclass(slots=True)
class _CastToFloat:
    """A cast to a floating type: to the type that the graph computes in at that moment.

    It is an object, not a closure, so that a deep copy of a graph refers to the copied precision.
    """

    precision: Precision

    def __call__(self, x: Tensor) -> Tensor:
        return x.to(self.precision.dtype)


def _cast(node: NodeView) -> Operator:
    dtype = torch_dtype(node.attr("to", None))
    if dtype.is_floating_point and not node.host:
        return _CastToFloat(node.precision)
    return lambda x: x.to(dtype)


def _where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    condition, x, y = together(condition, x, y)
    return torch.where(condition, x, y)


ELEMENTWISE: Mapping[str, Builder] = {
    "Abs": plain(torch.abs),
    "Ceil": plain(torch.ceil),
    "Cos": plain(torch.cos),
    "Erf": plain(torch.erf),
    "Exp": plain(torch.exp),
    "Floor": plain(torch.floor),
    "HardSwish": plain(_hard_swish),
    "Identity": plain(_first),
    "Log": plain(torch.log),
    "Mish": plain(steady(F.mish)),
    "Neg": plain(torch.neg),
    "Not": plain(torch.logical_not),
    "PRelu": plain(_prelu),
    "Reciprocal": plain(torch.reciprocal),
    "Relu": plain(torch.relu),
    "Round": plain(torch.round),
    "Sigmoid": plain(steady(torch.sigmoid)),
    "Sign": plain(torch.sign),
    "Sin": plain(torch.sin),
    "Softplus": plain(steady(_softplus)),
    "Softsign": plain(lambda x: x / (1.0 + x.abs())),
    "Sqrt": plain(torch.sqrt),
    "Tanh": plain(torch.tanh),
    "Clip": _clip,
    "Dropout": _dropout,
    "Celu": _celu,
    "Elu": _elu,
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "LeakyRelu": _leaky_relu,
    "Selu": _selu,
    "ThresholdedRelu": _thresholded_relu,
    "Cast": _cast,
    "CastLike": plain(lambda x, like: x.to(like.dtype)),
    "Add": _binary(torch.add),
    "And": _binary(torch.logical_and),
    "Div": _binary(_divide),
    "Equal": _binary(torch.eq),
    "Greater": _binary(torch.gt),
    "GreaterOrEqual": _binary(torch.ge),
    "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le),
    "Mod": _mod,
    "Mul": _binary(torch.mul),
    "Or": _binary(torch.logical_or),
    "Pow": _pow,
    "Sub": _binary(torch.sub),
    "Xor": _binary(torch.logical_xor),
    "Max": _variadic(torch.maximum),
    "Min": _variadic(torch.minimum),
    "Sum": _variadic(torch.add),
    "Where": plain(_where),
}
