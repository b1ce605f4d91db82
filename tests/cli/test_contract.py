"""The command line is a contract: flags, types and defaults are those of contract.json.

A new option is a new line there; a changed or missing one breaks the scripts of users.
"""

import json
from pathlib import Path
from typing import Any

import click
import pytest

from reptrt.cli import main

CONTRACT: dict[str, Any] = json.loads(Path(__file__).with_name("contract.json").read_text())


def described(command: click.Command) -> dict[str, Any]:
    """Return the arguments and options of a command, with the values that it gets by default."""
    needed = ["x" for p in command.params if isinstance(p, click.Argument)]
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.required:
            needed += [parameter.opts[0], "x"]
    defaults = command.make_context("test", needed).params
    arguments = [
        {"name": str(p.human_readable_name), "nargs": p.nargs, "required": p.required}
        for p in command.params
        if isinstance(p, click.Argument)
    ]
    options = {
        " / ".join([", ".join(p.opts), *p.secondary_opts]): {
            "type": type_of(p.type),
            "default": "required" if p.required else default_of(defaults[p.name or ""]),
            "multiple": p.multiple,
            "flag": p.is_flag,
        }
        for p in command.params
        if isinstance(p, click.Option)
    }
    return {"arguments": arguments, "options": dict(sorted(options.items()))}


def type_of(kind: click.ParamType) -> str:
    if isinstance(kind, click.Choice):
        return "|".join(kind.choices)
    if isinstance(kind, (click.IntRange, click.FloatRange)):
        return f"{kind.name} {kind.min}..{kind.max}"
    return kind.name


def default_of(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_the_commands_are_those_of_the_contract() -> None:
    assert set(main.commands) == set(CONTRACT)


@pytest.mark.parametrize("name", CONTRACT)
def test_the_options_are_those_of_the_contract(name: str) -> None:
    found, expected = described(main.commands[name]), CONTRACT[name]
    assert found["arguments"] == expected["arguments"]
    assert found["options"] == expected["options"]
