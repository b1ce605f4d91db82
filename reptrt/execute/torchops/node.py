"""The view of a node that the builder of an operator gets, and helpers that many builders share.

A builder is called once per node, when the graph is compiled. It reads attributes and constant
inputs and returns the function that each run calls. For a form that it does not support, it raises
a RewriteError with the reason; the compiler collects these reasons.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from reptrt.core.errors import RewriteError

# Takes the node's inputs in order (None where one is omitted); returns a tensor or a tuple of them.
Operator: TypeAlias = Callable[..., Any]


@dataclass(slots=True)
class Precision:
    """The floating type that a graph computes in, shared with its operators that cast."""

    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node as its builder sees it."""

    op: str
    attrs: Mapping[str, Any]
    constants: tuple[Tensor | None, ...]  # for each input: its value on the CPU if it is constant
    present: tuple[bool, ...]  # for each input: False if it is omitted
    num_outputs: int  # number of declared outputs
    num_used: int  # number of outputs without the last ones that no node reads
    opset: int
    host: bool  # the node computes a shape: its tensors stay on the CPU in their declared type
    precision: Precision
    captured: set[int] = field(default_factory=set)  # constant inputs whose value was compiled in

    def has(self, index: int) -> bool:
        """Return whether the node has input ``index``."""
        return index < len(self.present) and self.present[index]

    def constant(self, index: int) -> Tensor | None:
        """Return the value of a constant input; None if the input is omitted or computed.

        The value is recorded as compiled in, so no run can replace the constant.
        """
        value = self.constants[index] if index < len(self.constants) else None
        if value is not None:
            self.captured.add(index)
        return value

    def attr(self, name: str, default: Any) -> Any:
        """Return an attribute's value, or ``default``."""
        return self.attrs.get(name, default)

    def choice(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        """Return a text attribute; raise a RewriteError if it is not one of ``allowed``."""
        value = str(self.attrs.get(name, default))
        if value not in allowed:
            raise RewriteError(f"{name} {value}")
        return value

    def only(self, name: str, value: Any) -> None:
        """Raise a RewriteError unless the attribute is absent or has this value."""
        if self.attrs.get(name, value) != value:
            raise RewriteError(f"{name} {self.attrs[name]}")

    def single_output(self) -> None:
        """Raise a RewriteError if a node reads another output than the first."""
        if self.num_used > 1:
            raise RewriteError(f"{self.num_used} outputs in use")

    def ints(self, index: int, attr: str) -> Callable[[Tensor | None], list[int] | None]:
        """Return a function from the run-time tensor of input ``index`` to a list of numbers.

        A constant input, or the attribute ``attr`` that older opsets have in its place, is read
        when the graph is compiled, and the run-time tensor is ignored. If the node has neither, the
        function returns None.
        """
        fixed = self.constant(index)
        if fixed is None and self.has(index):
            return _ints_from_tensor
        values = self.attrs.get(attr) if fixed is None else fixed.reshape(-1).tolist()
        return lambda _: values


Builder: TypeAlias = Callable[[NodeView], Operator]


def _ints_from_tensor(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else list(tensor.reshape(-1).tolist())


def plain(function: Operator) -> Builder:
    """Return the builder of an operator that has no attributes."""
    return lambda _: function


def together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors on one device: the device of the first tensor that is not on the CPU.

    It is needed where a shape, which is always computed on the CPU, is combined with data.
    """
    device = next((t.device for t in tensors if t.device.type != "cpu"), None)
    return tensors if device is None else tuple(t.to(device) for t in tensors)


def along(values: Tensor, ndim: int, axis: int) -> Tensor:
    """Reshape one value, or one per index of ``axis``, to broadcast over ``ndim`` dimensions."""
    if values.numel() == 1:
        return values.reshape(())
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)
