"""Turn the fields of options dataclasses into keyword arguments of a function.

A field that is an options dataclass itself is replaced by that dataclass's fields, so that
``calibrate(net, data, percentile=99.9)`` sets ``CalibrateOptions.threshold.percentile``.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

from reptrt.core.errors import ArtifactError, ConfigError, flag_of, option
from reptrt.core.option_fields import Description, descriptions
from reptrt.core.options_json import json_from_options, value_from_json

Options = TypeVar("Options")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Parameter:
    """One keyword argument."""

    path: tuple[str, ...]  # fields from the options to the value
    hint: Any
    default: Any
    description: Description | None


def parameters(kind: type) -> dict[str, Parameter]:
    """Return the keyword arguments for an options dataclass, by name.

    If two nested dataclasses have a field of the same name, the argument sets the first of them.
    """
    by_name: dict[str, Parameter] = {}
    hints, described = get_type_hints(kind), descriptions(kind)
    for item in fields(kind):
        hint = hints[item.name]
        if is_dataclass(hint) and isinstance(hint, type):
            for name, inner in parameters(hint).items():
                is_main = inner.description and inner.description.flag == flag_of(item.name)
                outer = replace(inner, path=(item.name, *inner.path))
                by_name.setdefault(item.name if is_main else name, outer)
            continue
        default = item.default if item.default is not MISSING else None
        by_name[item.name] = Parameter((item.name,), hint, default, described.get(item.name))
    return by_name


def changed(options: Options, changes: Mapping[str, Any], others: Iterable[str] = ()) -> Options:
    """Return options with some values changed.

    Args:
        options: a frozen dataclass.
        changes: name of a keyword argument -> its value; or name of a field that is a dataclass ->
            that dataclass. NumPy numbers, lists in place of tuples, and values in the text form of
            the command line are converted.
        others: names of the caller's own parameters, which an error may suggest.

    Raises:
        ConfigError: a name is unknown (the message suggests similar names), a value has another
            type, or the dataclass rejects the values.
    """
    by_name = parameters(type(options))
    wholes = {name: value for name, value in changes.items() if is_dataclass(value)}
    wholes = {name: value for name, value in wholes.items() if hasattr(options, name)}
    tree: dict[str, Any] = {}
    for name, value in changes.items():
        if name in wholes:
            continue
        if name not in by_name:
            raise unknown(name, [*by_name, *others])
        *outer, last = by_name[name].path
        branch = tree
        for part in outer:
            branch = branch.setdefault(part, {})
        branch[last] = _converted(by_name[name], value, name)
    result: Options = _replaced(replace(options, **wholes), tree)  # type: ignore[type-var]
    return result


def unknown(name: str, names: Iterable[str]) -> ConfigError:
    """Return the error for a parameter that does not exist."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(names)}"
    return ConfigError(f"{name}: there is no such parameter; {hint}")


def takes(*kinds: type, without: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Return a decorator that adds keyword arguments to the signature and docstring of a function.

    Args:
        *kinds: options dataclasses; their arguments are shown in place of ``**changes``.
        without: names of arguments that are not shown.
    """
    shown: dict[str, Parameter] = {}
    for kind in kinds:
        for name, parameter in parameters(kind).items():
            if name not in without:
                shown.setdefault(name, parameter)

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        taken = {parameter.name for parameter in own}
        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=parameter.default,
                annotation=parameter.hint,
            )
            for name, parameter in shown.items()
            if name not in taken
        ]
        function.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*own, *added]
        )
        lines = [_doc_line(p.name, shown[p.name]) for p in added]
        function.__doc__ = "\n".join(
            [inspect.cleandoc(function.__doc__ or ""), "", "Changes:", *lines]
        )
        return function

    return decorate


def _doc_line(name: str, parameter: Parameter) -> str:
    if parameter.description is None:
        return f"    {name}: for programs; default {parameter.default!r}."
    text = re.sub(
        r"--([a-z][a-z-]*)",
        lambda match: match[1].replace("-", "_"),
        parameter.description.help,
    )
    return f"    {name}: {text} Default: {parameter.default!r}."


def _replaced(options: Any, tree: Mapping[str, Any]) -> Any:
    """Return options with the values of a tree; a branch is a dict."""
    values = {
        name: _replaced(getattr(options, name), value) if isinstance(value, dict) else value
        for name, value in tree.items()
    }
    return replace(options, **values)


def _converted(parameter: Parameter, value: Any, name: str) -> Any:
    if isinstance(value, str) and parameter.description and parameter.description.parse:
        return parameter.description.parse(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # a NumPy number
    try:
        return value_from_json(parameter.hint, json_from_options(value), option(name))
    except ArtifactError as err:
        raise ConfigError(*err.args) from None
