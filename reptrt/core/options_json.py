"""Convert options, and any other dataclass, to JSON values and back.

Fields may be dataclasses, tuples, mappings, paths, literals, optional values, numbers, strings and
booleans. A dataclass with a text form (`HasTextForm`) is written as that text. Reading is strict: a
field that is unknown, missing or of another type is an error. Otherwise, a default that changed
between two versions would go unnoticed.
"""

import contextlib
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import (
    Any,
    Literal,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

from reptrt.core.errors import ArtifactError

Options = TypeVar("Options")


@runtime_checkable
class HasTextForm(Protocol):
    """A dataclass whose instances are written as ``str(instance)`` and read by ``from_text``."""

    @classmethod
    def from_text(cls, text: str) -> Any:
        """Return the instance that a text describes; raise a ConfigError if there is none."""


def json_from_options(value: Any) -> Any:
    """Return a dataclass and all nested values as JSON values."""
    if is_dataclass(value) and not isinstance(value, type):
        if isinstance(value, HasTextForm):
            return str(value)
        return {item.name: json_from_options(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): json_from_options(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [json_from_options(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def options_from_json(kind: type[Options], content: Any, where: str) -> Options:
    """Return the dataclass instance that `json_from_options` converted to JSON values.

    Args:
        kind: the dataclass.
        content: the JSON values.
        where: name of the content, for messages.

    Raises:
        ArtifactError: a field is unknown, missing, or of another type; the message names it.
        ConfigError: the dataclass rejects the values.
    """
    if not isinstance(content, dict):
        raise _unexpected(where, content, "an object")
    hints = get_type_hints(kind)
    names = {item.name for item in fields(kind)}  # type: ignore[arg-type]  # a dataclass
    unknown, missing = sorted(content.keys() - names), sorted(names - content.keys())
    if unknown or missing:
        defect = f"unknown field {unknown[0]}" if unknown else f"no field {missing[0]}"
        raise ArtifactError(
            f"{where}: {defect}; it was written by another version of reptrt: use that version"
        )
    values = {
        name: value_from_json(hints[name], content[name], f"{where}.{name}") for name in names
    }
    return kind(**values)


def value_from_json(kind: Any, content: Any, where: str) -> Any:
    """Return JSON content as a value of an annotated type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return content
    if is_dataclass(kind) and isinstance(kind, type):
        if issubclass(kind, HasTextForm):
            return kind.from_text(_plain(str, content, where))
        return options_from_json(kind, content, where)
    if origin in (Union, types.UnionType):
        return _either(arguments, content, where)
    if origin is Literal:
        return _one_of(arguments, content, where)
    if origin is tuple:
        return _tuple(arguments, content, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(arguments, content, where)
    return _plain(kind, content, where)


def _either(kinds: tuple[Any, ...], content: Any, where: str) -> Any:
    if content is None and types.NoneType in kinds:
        return None
    *earlier, last = (kind for kind in kinds if kind is not types.NoneType)
    for kind in earlier:
        with contextlib.suppress(ArtifactError):
            return value_from_json(kind, content, where)
    return value_from_json(last, content, where)


def _one_of(choices: tuple[Any, ...], content: Any, where: str) -> Any:
    if content not in choices:
        raise _unexpected(where, content, f"one of {', '.join(map(str, choices))}")
    return content


def _tuple(kinds: tuple[Any, ...], content: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(content, list):
        raise _unexpected(where, content, "a list")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(content)
    if len(kinds) != len(content):
        raise _unexpected(where, content, f"{len(kinds)} entries")
    pairs = enumerate(zip(kinds, content, strict=True))
    return tuple(
        value_from_json(kind, entry, f"{where}[{index}]") for index, (kind, entry) in pairs
    )


def _mapping(kinds: tuple[Any, ...], content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise _unexpected(where, content, "an object")
    return {
        name: value_from_json(kinds[1], entry, f"{where}.{name}") for name, entry in content.items()
    }


def _plain(kind: Any, content: Any, where: str) -> Any:
    """Return a number, string, boolean or path; an integer is accepted for a float."""
    accepted = {float: (int, float), Path: (str,)}.get(kind, (kind,))
    if not isinstance(content, accepted) or (isinstance(content, bool) and kind is not bool):
        raise _unexpected(where, content, f"a value of type {kind.__name__}")
    return content if kind in (int, bool, str) else kind(content)


def _unexpected(where: str, got: Any, expected: str) -> ArtifactError:
    return ArtifactError(f"{where}: got {got!r}, expected {expected}")
