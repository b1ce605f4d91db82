"""What the builder of an operator may know of its node, and the helpers that many builders share.

A builder runs once per node, when the graph is compiled; it reads attributes and constant inputs
and returns the function that runs every time. A form that it does not know is a RewriteError with
the reason; the compiler collects them all.
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
    """The floating type a graph computes in; shared by a graph and those operators that cast."""

    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node as its builder sees it."""

    op: str
    attrs: Mapping[str, Any]
    constants: tuple[Tensor | None, ...]  # per input: its value if constant, on the CPU
    given: tuple[bool, ...]  # per input: whether it is there
    num_outputs: int  # as declared
    num_used: int  # without the trailing ones that nobody reads
    opset: int
    host: bool  # computes a shape: its tensors stay on the CPU in their declared type
    precision: Precision
    captured: set[int] = field(default_factory=set)  # constant inputs whose value was compiled in

    def has(self, index: int) -> bool:
        """Return whether input ``index`` is given."""
        return index < len(self.given) and self.given[index]

    def constant(self, index: int) -> Tensor | None:
        """Return the value of a constant input, to be compiled in; None if omitted or computed."""
        value = self.constants[index] if index < len(self.constants) else None
        if value is not None:
            self.captured.add(index)
        return value

    def attr(self, name: str, default: Any) -> Any:
        """Return an attribute's value, or ``default``."""
        return self.attrs.get(name, default)

    def choice(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        """Return a text attribute, one of ``allowed``; anything else is a RewriteError."""
        value = str(self.attrs.get(name, default))
        if value not in allowed:
            raise RewriteError(f"{name} {value}")
        return value

    def only(self, name: str, value: Any) -> None:
        """Raise a RewriteError unless an attribute is absent or has this value."""
        if self.attrs.get(name, value) != value:
            raise RewriteError(f"{name} {self.attrs[name]}")

    def single_output(self) -> None:
        """Raise a RewriteError if anybody reads more than the first output."""
        if self.num_used > 1:
            raise RewriteError(f"{self.num_used} outputs in use")

    def ints(self, index: int, attr: str) -> Callable[[Tensor | None], list[int] | None]:
        """Return a function from the run-time tensor of input ``index`` to a list of numbers.

        A constant input, or the attribute ``attr`` that older opsets have instead, is read now and
        the tensor is ignored later; with neither, the function returns None.
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
    """Return the tensors on one device: that of the first one which is not on the CPU.

    Shapes are computed on the CPU whatever the device; this is where they meet data.
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
