"""Fields of options dataclasses that the command line offers too.

    images: int = described(512, "Number of calibration images.", short="-n")

Name, type, default and help text are written once, in the dataclass; `reptrt.cli.fields` turns this
field into the flag ``-n, --images INTEGER``. A field without a description has no flag; only
programs can set it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from reptrt.core.errors import ConfigError, option

_KEY = "reptrt.description"


@dataclass(frozen=True, slots=True)
class Description:
    """What the command line adds to the name, type and default of a field."""

    help: str
    flag: str | None = None  # None: the field's name with dashes
    short: str | None = None  # "-n"
    metavar: str | None = None
    minimum: float | None = None  # a value below it is a usage error
    maximum: float | None = None
    parse: Callable[[str], Any] | None = None  # from the text of the command line


def described(default: Any, help: str, **details: Any) -> Any:
    """Return a dataclass field with a default and a description.

    Args:
        default: of the field.
        help: one sentence for ``--help``.
        **details: the other fields of `Description`.
    """
    return field(default=default, metadata={_KEY: Description(help, **details)})


def descriptions(kind: type) -> dict[str, Description]:
    """Return the described fields of a dataclass, in their order."""
    metadata = {item.name: item.metadata for item in fields(kind)}
    return {name: data[_KEY] for name, data in metadata.items() if _KEY in data}


def check_bounds(options: Any) -> None:
    """Check every field of a dataclass against the bounds in its description; None is accepted.

    Dataclasses with such fields call this in ``__post_init__``, so that a program meets the same
    bounds as the command line.

    Raises:
        ConfigError: a value lies beyond a bound or is NaN; the message names the option.
    """
    for name, description in descriptions(type(options)).items():
        value = getattr(options, name)
        low, high = description.minimum, description.maximum
        if value is None or (low is None and high is None):
            continue
        if (low is None or value >= low) and (high is None or value <= high):
            continue
        expected = f"{low} to {high}" if None not in (low, high) else None
        expected = expected or (f"{high} or less" if low is None else f"{low} or more")
        raise ConfigError(f"{option(name)}: got {value}, expected {expected}")


def require_at_least(least: float, options: Any, *names: str) -> None:
    """Check that options are not below a bound; None, the default of some options, is accepted.

    Args:
        least: the smallest value that is accepted.
        options: a dataclass.
        *names: names of its fields.

    Raises:
        ConfigError: a value is smaller or NaN; the message names the option.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{option(name)}: got {value}, expected {least} or more")
