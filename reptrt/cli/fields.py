"""Click options made from the described fields of options dataclasses (`core.option_fields`).

int, float, str    INTEGER, FLOAT, TEXT; a range where the field has bounds
bool               --flag where it is off by default, else --flag / --no-flag
Literal            a choice
Path               PATH
tuple              numbers with commas; (C, H, W) with x; texts: the option may be repeated
a dataclass        the options of its own described fields
"""

import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click

from reptrt.core.errors import flag_of
from reptrt.core.option_fields import Description, descriptions

PATH: "click.Path[Path]" = click.Path(path_type=Path)


class NumberList(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """Numbers separated by commas (or by x, for sizes)."""

    def __init__(self, kind: Callable[[str], float], separator: str = ",", count: int = 0) -> None:
        self.kind, self.separator, self.count = kind, separator, count
        self.name = "CxHxW" if separator == "x" else "n,n,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Return the numbers, or a usage error."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self.kind(item) for item in str(value).lower().split(self.separator))
        except ValueError:
            self.fail(f"{value!r}: expected {self.name}", param, ctx)
        if self.count and (len(numbers) != self.count or min(numbers) <= 0):
            self.fail(f"{value!r}: expected {self.count} positive numbers", param, ctx)
        return numbers


class Parsed(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """A text that a function of the package reads; it raises a `ConfigError` of its own."""

    name = "text"

    def __init__(self, parse: Callable[[str], Any]) -> None:
        self.parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return what the text means."""
        return self.parse(value) if isinstance(value, str) else value


class FieldOptions:
    """The options of one dataclass, which is imported when it is needed.

    Args:
        path: "module:Class".
        only: the fields that the command takes; none given: every described one.
        flags: field -> flag, where this command has another one than the field says.
    """

    def __init__(
        self, path: str, only: tuple[str, ...] = (), flags: Mapping[str, str] | None = None
    ) -> None:
        self._path, self._only, self._flags = path, only, flags or {}

    @cached_property
    def kind(self) -> Any:
        """The dataclass."""
        module, _, name = self._path.partition(":")
        return getattr(import_module(module), name)

    def options(self) -> list[click.Option]:
        """Return one option for each field, in the order of the fields."""
        return list(self._options(self.kind))

    def value(self, values: Mapping[str, Any]) -> Any:
        """Return the dataclass with the values of the command line; None leaves the default."""
        return self._value(self.kind, values)

    def _options(self, kind: type) -> Iterator[click.Option]:
        hints, described = get_type_hints(kind), descriptions(kind)
        for item in fields(kind):
            if self._only and item.name not in self._only:
                continue
            if item.name in described:
                flag = self._flags.get(item.name)
                hint, description = hints[item.name], described[item.name]
                yield _option(item.name, hint, item.default, description, flag)
            elif is_dataclass(hints[item.name]):
                yield from self._options(hints[item.name])

    def _value(self, kind: type, values: Mapping[str, Any]) -> Any:
        hints, described = get_type_hints(kind), descriptions(kind)
        given: dict[str, Any] = {}
        for item in fields(kind):
            if item.name in described and values.get(item.name) is not None:
                given[item.name] = values[item.name]
            elif not self._only and is_dataclass(hints[item.name]):
                given[item.name] = self._value(hints[item.name], values)
        return kind(**given)


def _option(
    name: str, hint: Any, default: Any, description: Description, flag: str | None
) -> click.Option:
    """Return the option of one field."""
    hint = _without_none(hint)
    flag = flag or description.flag or flag_of(name)
    attributes: dict[str, Any] = {"type": _type(hint, description), "default": default}
    if hint is bool:
        attributes = {"default": default}
        if default is False:
            attributes["is_flag"] = True
        else:
            flag = f"{flag}/--no-{flag.removeprefix('--')}"
    elif get_origin(hint) is tuple:
        attributes["multiple"] = get_args(hint)[0] is str and description.parse is None
        attributes["default"] = None if default == () else default
        if default:
            attributes["default"] = ",".join(map(str, default))
    shorts = [description.short] if description.short is not None else []
    return click.Option(
        [name, *shorts, flag],
        help=description.help,
        metavar=description.metavar,
        show_default=default is not None and default is not False and default != (),
        **attributes,
    )


def _without_none(hint: Any) -> Any:
    """Return the type of a value that is given, of ``X | None`` X."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    (given,) = (kind for kind in get_args(hint) if kind is not types.NoneType)
    return given


def _type(hint: Any, description: Description) -> Any:
    """Return the click type of an annotated type."""
    low, high = description.minimum, description.maximum
    if description.parse is not None:
        return Parsed(description.parse)
    if get_origin(hint) is Literal:
        return click.Choice(list(get_args(hint)))
    if get_origin(hint) is tuple:
        entry, *more = get_args(hint)
        if entry is str:
            return str
        return NumberList(entry) if more == [Ellipsis] else NumberList(entry, "x", 1 + len(more))
    if hint is Path:
        return PATH
    if low is not None or high is not None:
        bounded: Any = click.IntRange if hint is int else click.FloatRange
        return bounded(low, high)
    return hint
