"""Checks of what a TOML file holds; each failure says where in the file it stands."""

import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from reptrt.core.errors import ConfigError, ReptrtError
from reptrt.core.keywords import changed

T = TypeVar("T")

_NAME = re.compile(r"[\w.+-]+")  # one part of a trial's name


def changed_at(where: str, options: T, changes: Any) -> T:
    """Return options with some values changed; messages say where they stand."""
    if not isinstance(changes, dict):
        raise ConfigError(f"{where}: got {changes!r}, expected a table")
    return stated(where, lambda: changed(options, changes))


def stated(where: str, make: Callable[[], T]) -> T:
    """Return what a function returns; say where the values of a failure stand."""
    try:
        return make()
    except ReptrtError as err:
        raise type(err)(f"{where}: {err}") from err


def table_of(content: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """Return a table of the content; without it, an empty one."""
    value = content.get(key, {})
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {key}: got {value!r}, expected a table")
    return dict(value)


def check_keys(content: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Refuse keys that nothing reads."""
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")


def check_name(name: str, at: str) -> None:
    """Refuse a name that cannot be a part of a trial's name."""
    if _NAME.fullmatch(name) is None:
        raise ConfigError(f"{at}: a name may hold letters, digits and _ . + -")


def located(name: str, folder: Path) -> str:
    """Return a source whose file starts from a folder."""
    if name.lower().endswith(".onnx"):
        return str(folder / name)
    path, colon, factory = name.rpartition(":")
    return f"{folder / path}{colon}{factory}" if path.endswith(".py") else name
