"""What every command of the command line has: options from dataclasses, and ``--json``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from reptrt.cli.fields import FieldOptions
from reptrt.core.errors import ConfigError, option


class Command(click.Command):
    """A command that takes ``--json`` and the options of dataclasses.

    Its parameters are complete when they are first asked for: ``reptrt --help`` asks for none, and
    so imports none of the dataclasses.

    Args:
        *args: of `click.Command`.
        options: of dataclasses.
        **kwargs: of `click.Command`.
    """

    def __init__(self, *args: Any, options: Sequence[FieldOptions] = (), **kwargs: Any) -> None:
        self._pending = list(options)
        self._is_complete = False
        super().__init__(*args, **kwargs)

    @property
    def params(self) -> list[click.Parameter]:
        """The arguments and options."""
        if not self._is_complete:
            self._is_complete = True
            for group in self._pending:
                self._params += group.options()
            self._params.append(_json_option())
        return self._params

    @params.setter
    def params(self, params: list[click.Parameter]) -> None:
        self._params = params


def emit(text: str, content: Any, json_path: str | None) -> None:
    """Print the result for people, and write or print it as JSON."""
    if json_path == "-":
        click.echo(json.dumps(content, indent=2))
        return
    if json_path is not None:
        from reptrt.core.artifacts import write_json

        write_json(Path(json_path), content)
    click.echo(text)


def _json_option() -> click.Option:
    return click.Option(
        ["json_path", "--json"],
        metavar="F",
        callback=_json_target,
        help="File to write the result to as JSON; - is stdout.",
    )


def _json_target(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Refuse, before any work, a JSON file that cannot be written or that has another meaning."""
    if value is None or value == "-":
        return value
    from reptrt.core.artifacts import ENGINE_SUFFIXES, ONNX_SUFFIXES, require_folder

    path = Path(value)
    require_folder(path)
    if path.suffix == ".json" and Path(path.stem).suffix in (*ONNX_SUFFIXES, *ENGINE_SUFFIXES):
        raise ConfigError(
            f"{option('json_path')} {path}: is the sidecar of {path.stem}; give another name"
        )
    return value
