"""The state dicts inside a checkpoint's content, each by its location.

Training scripts nest the weights in dicts beside other things: ``state_dict``, ``model``, ``ema``,
``ema.shadow``. Some store the whole ``nn.Module``; its `StandIn` has the attributes that every
module has, from which the state dict follows as ``nn.Module.state_dict`` would return it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from reptrt.sources.rebuild import StandIn, array_of

StateDict = Mapping[str, torch.Tensor]

_MAX_DEPTH = 5  # of dicts in dicts
_MAX_MODULES, _MAX_NESTING = 100_000, 100  # more come only from a module that contains itself


def find_states(content: Any) -> dict[str, StateDict]:
    """Return every state dict in a checkpoint: location (keys joined by dots) -> state dict."""
    return dict(_walk(content, (), _MAX_DEPTH))


def is_module(value: Any) -> bool:
    """Return whether a value is a pickled nn.Module."""
    return isinstance(value, StandIn) and isinstance(value.attributes.get("_modules"), dict)


def entries_of(value: Any) -> Mapping[Any, Any]:
    """Return the entries of a dict, or the attributes of an object that is not a module."""
    if isinstance(value, dict):
        return value
    return value.attributes if isinstance(value, StandIn) and not is_module(value) else {}


def tensor_of(value: Any) -> torch.Tensor | None:
    """Return a tensor or a numpy array as a tensor; None for anything else."""
    return value if isinstance(value, torch.Tensor) else array_of(value)


def kind_of(value: Any) -> str:
    """Return what a value is, for messages."""
    return value.name if isinstance(value, StandIn) else type(value).__name__


def _walk(value: Any, keys: tuple[str, ...], depth: int) -> Iterator[tuple[str, StateDict]]:
    state = _state_of(value)
    if state:
        yield ".".join(keys), state
    elif depth:
        for key, inner in entries_of(value).items():
            if isinstance(key, str):
                yield from _walk(inner, (*keys, key), depth - 1)


def _state_of(value: Any) -> StateDict | None:
    """Return the state dict of a module, or a dict if all its values are tensors by name."""
    if is_module(value):
        return dict(_state_of_module(value))
    state: dict[str, torch.Tensor] = {}
    for name, entry in entries_of(value).items():
        tensor = tensor_of(entry)
        if tensor is None or not isinstance(name, str):
            return None
        state[name] = tensor
    return state


def _state_of_module(module: StandIn) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters and persistent buffers of a pickled module and its children, in order.

    Raises:
        ValueError: the module contains itself.
    """
    pending, num_modules = [("", module)], 0
    while pending:
        prefix, current = pending.pop()
        attributes = current.attributes
        not_stored = attributes.get("_non_persistent_buffers_set")
        skipped = not_stored if isinstance(not_stored, list) else []  # sets are read as lists
        for name, value in (
            *_named(attributes.get("_parameters")),
            *(item for item in _named(attributes.get("_buffers")) if item[0] not in skipped),
        ):
            tensor = tensor_of(value)
            if tensor is not None:
                yield f"{prefix}{name}", tensor
        children = _named(attributes.get("_modules"))
        inner = [(f"{prefix}{name}.", child) for name, child in children if is_module(child)]
        pending += reversed(inner)
        num_modules += len(inner)
        if num_modules > _MAX_MODULES or prefix.count(".") > _MAX_NESTING:
            raise ValueError("a module that contains itself")


def _named(entries: Any) -> list[tuple[str, Any]]:
    items = entries.items() if isinstance(entries, dict) else ()
    return [(name, value) for name, value in items if isinstance(name, str)]
