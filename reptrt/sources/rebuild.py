"""The values that a pickle can yield here, and the table of what may be built.

A pickle asks for objects by name: "call ``torch._utils._rebuild_tensor_v2`` with these arguments".
`rebuild` looks the name up in a table of builders for plain containers and dense tensors. A name
that is not in the table makes a `StandIn`, which keeps the name and the data. Nothing is imported
and nothing that a file names is called, so the table alone decides what a file can do.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

_SYSTEM = {  # no checkpoint calls anything in these modules: a file that does is not trusted
    *("os", "posix", "nt", "sys", "subprocess", "commands", "shutil", "socket", "runpy"),
    *("importlib", "pty", "ctypes", "webbrowser", "marshal"),
}
_SYSTEM_CALLS = {
    *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.open", "builtins.input"),
    *("builtins.__import__", "builtins.breakpoint", "io.open", "_io.open", "_io.FileIO"),
    *("_pickle.load", "_pickle.loads", "pickle.load", "pickle.loads"),
}


class UnsafePickleError(Exception):
    """A pickle calls something that reaches the system; the message is the name of the callee."""


@dataclass(frozen=True, slots=True)
class Name:
    """The name of a class or function, never resolved."""

    text: str  # module and qualified name: "torch.nn.modules.conv.Conv2d"

    @property
    def reaches_system(self) -> bool:
        """Whether a call of this name is refused instead of kept as a stand-in."""
        return self.text.partition(".")[0] in _SYSTEM or self.text in _SYSTEM_CALLS


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """The memory that tensors share, as a flat tensor of the stored type."""

    flat: torch.Tensor


@dataclass(slots=True, eq=False)
class StandIn:
    """An object that is not built: the name of its class or function, and the data it was given."""

    name: str
    args: tuple[Any, ...]
    state: Any = None  # what __setstate__ would receive; for most objects the dict of attributes
    items: list[Any] = field(default_factory=list)  # if it is a kind of list or set
    entries: dict[Any, Any] = field(default_factory=dict)  # if it is a kind of dict

    @property
    def attributes(self) -> Mapping[Any, Any]:
        """Its entries if it is a kind of dict, else its attributes; empty if it has neither."""
        if self.entries:
            return self.entries
        return next((part for part in (self.state, *self.args) if isinstance(part, dict)), {})


def rebuild(callee: Any, args: tuple[Any, ...]) -> Any:
    """Return what a call in a pickle stands for: a plain value, a tensor or a `StandIn`.

    Raises:
        UnsafePickleError: the callee reaches the system.
    """
    if not isinstance(callee, Name):
        return StandIn("a computed function", args)
    if callee.reaches_system:
        raise UnsafePickleError(callee.text)
    builder = _BUILDERS.get(callee.text)
    built = None if builder is None else builder(args)
    return StandIn(callee.text, args) if built is None else built


def array_of(value: Any) -> torch.Tensor | None:
    """Return a pickled numpy array of numbers as a tensor; None if ``value`` is something else."""
    if not (isinstance(value, StandIn) and value.name in _NUMPY_ARRAYS):
        return None
    match value.state:
        case (_, tuple() as shape, StandIn(name="numpy.dtype") as dtype, order, bytes() as raw):
            return _tensor_of_bytes(raw, shape, dtype, "F" if order else "C")
    return None


def _tensor_of_bytes(
    raw: bytes, shape: tuple[int, ...], dtype: StandIn, order: Any
) -> torch.Tensor | None:
    code = dtype.args[0] if dtype.args else None
    if code not in _NUMPY_CODES:
        return None
    big = isinstance(dtype.state, tuple) and dtype.state[1:2] in ((">",), (b">",))
    flat = np.frombuffer(raw, np.dtype(f"{'>' if big else '<'}{code}"))
    return torch.from_numpy(flat.reshape(shape, order=order).astype(f"={code}", order="C"))


_NUMPY_ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_NUMPY_CODES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")


def _list(args: tuple[Any, ...]) -> list[Any] | None:
    return list(args[0]) if args and isinstance(args[0], list | tuple) else [] if not args else None


def _dict(args: tuple[Any, ...]) -> dict[Any, Any] | None:
    """Return the dict of OrderedDict() or OrderedDict([[key, value], ...])."""
    match args:
        case ():
            return {}
        case (dict() as entries,):
            return dict(entries)
        case (list() as pairs,) if all(
            isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)
            for pair in pairs
        ):
            return {key: value for key, value in pairs}
    return None


def _size(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    return args[0] if args and isinstance(args[0], tuple) else None


def _bytes(args: tuple[Any, ...]) -> bytes | None:
    """Return the bytes that protocol 2 writes as text: _codecs.encode(text, "latin1")."""
    match args:
        case (str() as text, "latin1" | "latin-1"):
            return text.encode("latin-1")
    return None


def _tensor(args: tuple[Any, ...]) -> torch.Tensor | None:
    """Return a dense tensor: a view of its storage.

    The arguments of ``torch._utils._rebuild_tensor_v2``: storage, offset, size, stride, and what
    concerns gradients. A conjugate or negative view (in the seventh) is not built.
    """
    match args:
        case (Storage(flat), int() as offset, tuple() as size, tuple() as stride, *rest):
            if len(rest) > 2 and rest[2]:
                return None
            return _view(flat, offset, size, stride)
    return None


def _typed_tensor(args: tuple[Any, ...]) -> torch.Tensor | None:
    """Return a dense tensor whose type is given apart from its storage (_rebuild_tensor_v3)."""
    match args:
        case (Storage(flat), offset, size, stride, _, _, Name(dtype), *rest) if not any(rest):
            torch_dtype = _dtype(dtype)
            if torch_dtype is not None:
                return _tensor((Storage(flat.view(torch_dtype)), offset, size, stride))
    return None


def _dtype(name: str) -> torch.dtype | None:
    dtype = vars(torch).get(name.removeprefix("torch."))  # getattr could import a module
    return dtype if isinstance(dtype, torch.dtype) else None


def _view(
    flat: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> torch.Tensor:
    """Return the view of a storage after checking that it lies inside; ValueError otherwise."""
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError(f"a tensor of size {size} and stride {stride}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= flat.numel():
        raise ValueError(f"a tensor of size {size} in a storage of {flat.numel()} values")
    return flat.as_strided(size, stride, offset if math.prod(size) else 0)


def _parameter(args: tuple[Any, ...]) -> torch.Tensor | None:
    return args[0] if args and isinstance(args[0], torch.Tensor) else None


def _subclass(args: tuple[Any, ...]) -> torch.Tensor | None:
    """Return the plain tensor in torch._tensor._rebuild_from_type_v2(function, type, args, ...)."""
    match args:
        case (
            Name() as function,
            Name("torch.Tensor" | "torch.nn.parameter.Parameter"),
            arguments,
            *_,
        ) if isinstance(arguments, tuple):
            built = rebuild(function, arguments)
            return built if isinstance(built, torch.Tensor) else None
    return None


def _reconstructed(args: tuple[Any, ...]) -> StandIn | None:
    """Return the stand-in of an object that protocol 0 or 1 makes by copyreg._reconstructor."""
    return StandIn(args[0].text, ()) if args and isinstance(args[0], Name) else None


_BUILDERS: Mapping[str, Callable[[tuple[Any, ...]], Any]] = {
    "builtins.bytes": lambda args: None if args else b"",  # protocol 2 writes others as text
    "builtins.dict": _dict,
    "builtins.list": _list,
    "builtins.set": _list,  # sets become lists: their members then need no hash
    "builtins.frozenset": _list,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": lambda args: _dict(args[1:]),
    "copyreg._reconstructor": _reconstructed,
    "_codecs.encode": _bytes,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _subclass,
}
