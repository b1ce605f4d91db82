"""Run a torch module, or an ONNX graph in torch, with the contract of `execute.runner.Runner`."""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from torch import Tensor, nn

from reptrt.core.arrays import AnyArray
from reptrt.execute.lowering import lower
from reptrt.execute.module_outputs import flat_outputs
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import Net, constant_of, net_from_model
from reptrt.graph.quantized import activation_pairs
from reptrt.graph.recentred import read_recentred

Replacements = Mapping[str, Callable[..., Any]]

_NOTHING: Replacements = MappingProxyType({})


class TorchRunner:
    """A runner that calls a function of an image batch, such as a torch module.

    Args:
        name: the runtime, for reports.
        forward: float32 (n, C, H, W) -> tensors, as `flat_outputs` takes them.
        device: where ``forward`` computes.
        batch: the number of images that ``forward`` takes; None: any number.
    """

    threads = None
    input_name = "input"
    output_names: Sequence[str] = ()  # known after the first run

    def __init__(
        self,
        name: str,
        forward: Callable[[Tensor], Any],
        device: torch.device,
        batch: int | None = None,
    ) -> None:
        self.name = name
        self.device = str(device)
        self.input_shape = (batch, None, None, None)
        self._forward = forward
        self._device = device

    def run(self, batch: AnyArray) -> dict[str, AnyArray]:
        """Return the outputs by name for a float32 batch (n, C, H, W)."""
        with torch.inference_mode():
            result = self._forward(torch.from_numpy(np.ascontiguousarray(batch)).to(self._device))
        outputs = flat_outputs(result)
        self.output_names = tuple(outputs)
        return {name: np.asarray(value.float().cpu().numpy()) for name, value in outputs.items()}

    def __enter__(self) -> "TorchRunner":
        return self

    def __exit__(self, *raised: object) -> None:
        self._forward = _closed


def module_runner(module: nn.Module, device: torch.device) -> TorchRunner:
    """Return a runner for a torch module."""
    return TorchRunner("torch", module.to(device), device)


def graph_runner(net: Net, device: torch.device, replace: Replacements = _NOTHING) -> TorchRunner:
    """Return a runner that runs an ONNX graph in torch.

    Args:
        net: the graph.
        device: where to compute.
        replace: node name -> function of the node's inputs that runs in its place.
    """
    graph = TorchGraph(net, device)
    (name,) = graph.input_names
    wanted = [output for output in graph.output_names if output in graph.comparable_names]
    batch = (net.graph.inputs[0].shape or [None])[0]

    def forward(x: Tensor) -> dict[str, Tensor]:
        return graph.run({name: x}, wanted or graph.comparable_names, replace=replace)

    return TorchRunner("torch graph", forward, device, batch if isinstance(batch, int) else None)


def int8_runner(model: onnx.ModelProto, device: torch.device) -> TorchRunner:
    """Return a runner for a Q/DQ model that gives the codes of INT8 kernels (see `lowering`)."""
    return graph_runner(net_from_model(lower(model, kernels=False)), device)


def float_activations(net: Net) -> Replacements:
    """Return replacements that leave every activation of a Q/DQ graph in float.

    Weights keep their codes. Pairs, and the Clips that simulate fewer bits, pass their input on
    unchanged. Where the saturation of a Q takes the place of a ReLU (`graph.recentred`), the
    replacement applies that saturation only.
    """
    codes = {record.quantize: record.code for record in read_recentred(net)}
    replacements: dict[str, Callable[..., Tensor]] = {}
    for _, pair in activation_pairs(net):
        quantize = pair.quantize
        code = codes.get(quantize.name)
        replacements[quantize.name] = _first if code is None else functools.partial(_from, code)
        replacements |= {node.name: _rescaled(quantize, node) for node in pair.dequantizes}
        if pair.clip is not None:
            replacements[pair.clip.name] = _first
    return replacements


def _from(code: int, x: Tensor, scale: Tensor, *rest: Tensor | None) -> Tensor:
    """Return max(x, -code scale)."""
    return torch.maximum(x, -code * scale)


def _rescaled(quantize: gs.Node, dequantize: gs.Node) -> Callable[..., Tensor]:
    """Return what a pair does without rounding: nothing, or multiply by the ratio of its scales."""
    before, after = (np.float64(constant_of(n.inputs[1])) for n in (quantize, dequantize))
    return _first if before == after else functools.partial(_times, float(after / before))


def _times(factor: float, x: Tensor, *parameters: Tensor | None) -> Tensor:
    return x * factor


def _first(x: Tensor, *parameters: Tensor | None) -> Tensor:
    return x


def _closed(x: Tensor) -> Tensor:
    raise ValueError("the runner is closed")
