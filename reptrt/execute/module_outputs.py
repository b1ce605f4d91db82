"""The outputs of a torch module as named tensors, whatever containers they come in."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def flat_outputs(result: Any) -> dict[str, Tensor]:
    """Return the tensors in a result by name, depth first; everything else is dropped.

    What lies in a mapping, a dataclass or a named tuple is named after its key or field, what lies
    in a list below one of these after its index, joined by dots. Tensors without any name are
    ``output``, ``output_1``, ``output_2``...

    >>> list(flat_outputs((torch.zeros(1), {"boxes": torch.zeros(1), "scores": [torch.zeros(1)]})))
    ['output', 'boxes', 'scores.0']
    """
    named: dict[str, Tensor] = {}
    for path, tensor in _walk(result, ()):
        name = ".".join(path) or "output"
        if name in named:
            name = next(n for i in range(1, len(named) + 1) if (n := f"{name}_{i}") not in named)
        named[name] = tensor
    return named


def _walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _walk(part, (*path, str(key)))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for entry in dataclasses.fields(value):
            yield from _walk(getattr(value, entry.name), (*path, entry.name))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for name, part in zip(value._fields, value, strict=True):
            yield from _walk(part, (*path, name))
    elif isinstance(value, tuple | list):
        for index, part in enumerate(value):
            yield from _walk(part, (*path, str(index)) if path else path)


@contextlib.contextmanager
def flattening(module: nn.Module) -> Iterator[None]:
    """Let a module return a tuple of its output tensors meanwhile; one tensor stays as it is."""

    def flatten(_: nn.Module, __: Any, result: Any) -> Any:
        return result if isinstance(result, Tensor) else tuple(flat_outputs(result).values())

    handle = module.register_forward_hook(flatten)
    try:
        yield
    finally:
        handle.remove()
