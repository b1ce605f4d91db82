"""The exceptions that reptrt raises on purpose; any other exception is a bug.

    ReptrtError
    ├── ConfigError             an option that cannot work
    ├── ArtifactError           a file that cannot be read, written or trusted
    │   └── CheckpointError     a checkpoint that cannot be read or does not fit
    ├── DataError               images or arrays that cannot be used
    ├── RewriteError            a graph that cannot be rewritten as requested
    ├── CalibrationError        values that yield no scale
    ├── EngineError             TensorRT refused a graph, or an engine does not fit this machine
    └── MissingDependencyError  an optional package is not installed

A message is one line: where (file, layer or tensor), what was given, what was expected, what to do.
A message names options with `option`: a program then reads the name of the parameter, and the
command line prints the flag.
"""

import re
from collections.abc import Callable

_OPEN, _CLOSE = "\ue000", "\ue001"  # private code points, which no message contains otherwise
_OPTION = re.compile(f"{_OPEN}(\\w+)(?:=([^{_CLOSE}]*))?{_CLOSE}")


def option(name: str, value: object = None) -> str:
    """Return the name of an option, and its value if given, for use inside a message.

    Args:
        name: the Python parameter, e.g. ``max_overhead``.
        value: a value of the option; True and False stand for a flag that is given or negated.

    >>> str(ConfigError(f"{option('max_overhead')}: got -1; leave out {option('split', 'none')}"))
    "max_overhead: got -1; leave out split='none'"
    >>> ConfigError(f"{option('max_overhead')}: got -1; give {option('equalize', False)}").on_cli()
    '--max-overhead: got -1; give --no-equalize'
    >>> ConfigError(f"give {option('batches', (1, 8))}").on_cli()
    'give --batches 1,8'
    """
    return f"{_OPEN}{name}{_CLOSE}" if value is None else f"{_OPEN}{name}={value!r}{_CLOSE}"


def flag_of(name: str) -> str:
    """Return the flag that an option has on the command line unless a command names it otherwise.

    >>> flag_of("max_overhead")
    '--max-overhead'
    """
    return f"--{name.replace('_', '-')}"


class ReptrtError(Exception):
    """A failure with a message of one line: the command line prints it and exits with 1."""

    def __str__(self) -> str:
        """Return the message as a program reads it: options by the names of their parameters."""
        return _OPTION.sub(_in_python, super().__str__())

    def on_cli(self, flag: Callable[[str], str] = flag_of) -> str:
        """Return the message as the command line prints it: options by their flags.

        Args:
            flag: returns the flag of a parameter.
        """
        return _OPTION.sub(lambda match: _on_cli(match, flag), super().__str__())


def _in_python(match: re.Match[str]) -> str:
    name, value = match.groups()
    return name if value is None else f"{name}={value}"


def _on_cli(match: re.Match[str], flag: Callable[[str], str]) -> str:
    name, value = match.groups()
    if value is None or value == "True":
        return flag(name)
    if value == "False":
        return f"--no-{flag(name).removeprefix('--')}"
    if value.startswith("("):  # a list on the command line: 1,8
        value = value.strip("()").removesuffix(",").replace(" ", "")
    return f"{flag(name)} {value.strip(chr(39))}"


class ConfigError(ReptrtError):
    """An option, or a combination of options, that cannot work."""


class ArtifactError(ReptrtError):
    """A file that cannot be read, written or trusted."""


class CheckpointError(ArtifactError):
    """A checkpoint that cannot be read, or does not fit the architecture."""


class DataError(ReptrtError):
    """Images or arrays that cannot be used."""


class RewriteError(ReptrtError):
    """A graph that cannot be rewritten as requested, or a rewrite that changed its output."""


class CalibrationError(ReptrtError):
    """Values that yield no scale."""


class EngineError(ReptrtError):
    """TensorRT refused a graph, or an engine does not fit this machine."""


class MissingDependencyError(ReptrtError):
    """An optional package that this command needs is not installed."""
