"""Turn the fields of options dataclasses into keyword arguments of a function.

A field that is an options dataclass itself is replaced by that dataclass's fields, so that
``calibrate(net, data, percentile=99.9)`` sets ``CalibrateOptions.threshold.percentile``.
"""

import difflib
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from reptrt.core.errors import ArtifactError, ConfigError, flag_of, option
from reptrt.core.option_fields import Description, descriptions
from reptrt.core.options_json import HasTextForm, json_from_options, value_from_json

Options = TypeVar("Options")
F = TypeVar("F", bound=Callable[..., Any])

_DOC_WIDTH = 100  # columns of a line in a docstring


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


def options_from(
    kind: type[Options], options: Any, changes: Mapping[str, Any], others: Iterable[str] = ()
) -> Options:
    """Return the options of a call: those that were passed as one value, with changes.

    Args:
        kind: the dataclass.
        options: the value of the parameter ``options``; None: the defaults.
        changes: as for `changed`.
        others: as for `changed`.

    Raises:
        ConfigError: ``options`` is of another type; or as `changed`.
    """
    if options is None:
        options = kind()
    if not isinstance(options, kind):
        raise ConfigError(
            f"{option('options')}: got {_kind(options)}, expected {kind.__name__}; single options "
            "are keyword arguments of their own"
        )
    return changed(options, changes, (*others, "options"))


def checked(name: str, value: Any, hint: Any) -> Any:
    """Return the value of a parameter, converted to its annotated type.

    NumPy numbers become Python's; lists, arrays and tensors become tuples where the type is a
    tuple.

    Raises:
        ConfigError: the value has another type; the message names the parameter.
    """
    if hasattr(value, "tolist"):  # a NumPy number, an array or a tensor
        value = value.tolist()
    try:
        return value_from_json(hint, json_from_options(value), option(name))
    except ArtifactError as err:
        entries = _without_none(hint)
        if get_origin(entries) is tuple and not isinstance(value, tuple | list):
            raise ConfigError(
                f"{option(name)}: got {value!r}, expected {_tuple_of(entries)}"
            ) from None
        raise ConfigError(*err.args) from None


def _tuple_of(hint: Any) -> str:
    """Return what a tuple type holds, in words."""
    first, *more = get_args(hint)
    entries = {int: "integers", float: "numbers", str: "texts"}.get(first, "values")
    return (
        f"a tuple of {entries}" if more == [Ellipsis] else f"a tuple of {1 + len(more)} {entries}"
    )


def _without_none(hint: Any) -> Any:
    """Return X of ``X | None``, and any other type as it is."""
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    is_union = get_origin(hint) in (Union, types.UnionType)
    return kinds[0] if is_union and len(kinds) == 1 else hint


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def changed(options: Options, changes: Mapping[str, Any], others: Iterable[str] = ()) -> Options:
    """Return options with some values changed.

    Args:
        options: a frozen dataclass.
        changes: name of a keyword argument -> its value; or name of a field that is a dataclass ->
            that dataclass. Values are converted as `checked` says.
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
            _check_whole(type(options), name, value)
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
        lines = [line for p in added for line in _doc_lines(p.name, shown[p.name])]
        function.__doc__ = "\n".join(
            [inspect.cleandoc(function.__doc__ or ""), "", "Options:", *lines]
        )
        return function

    return decorate


def _doc_lines(name: str, parameter: Parameter) -> list[str]:
    """Return the entry of one keyword argument in a docstring, wrapped."""
    text = "Set by programs only."
    if parameter.description is not None:
        text = re.sub(
            r"--([a-z][a-z-]*)",
            lambda match: match[1].replace("-", "_"),
            parameter.description.help,
        )
    if "default:" not in text:
        text = f"{text} Default: {parameter.default!r}."
    return textwrap.wrap(
        f"{name}: {text}",
        _DOC_WIDTH,
        initial_indent=" " * 4,
        subsequent_indent=" " * 8,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _check_whole(kind: type, name: str, value: Any) -> None:
    """Refuse a dataclass as the value of a field of another type."""
    hint = _without_none(get_type_hints(kind)[name])
    if not (isinstance(hint, type) and isinstance(value, hint)):
        expected = getattr(hint, "__name__", str(hint))
        raise ConfigError(f"{option(name)}: got {_kind(value)}, expected {expected}")


def _replaced(options: Any, tree: Mapping[str, Any]) -> Any:
    """Return options with the values of a tree; a branch is a dict."""
    values = {
        name: _replaced(getattr(options, name), value) if isinstance(value, dict) else value
        for name, value in tree.items()
    }
    return replace(options, **values)


def _converted(parameter: Parameter, value: Any, name: str) -> Any:
    hint = _without_none(parameter.hint)
    is_options = is_dataclass(hint) and not issubclass(hint, HasTextForm)  # type: ignore[arg-type]
    if is_options and value is not None and not isinstance(value, hint):
        raise ConfigError(f"{option(name)}: got {_kind(value)}, expected {hint.__name__}")
    return checked(name, value, parameter.hint)
