"""Flags made from the described fields of a dataclass."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner

from reptrt.cli.fields import FieldOptions
from reptrt.core.errors import ConfigError
from reptrt.core.option_fields import described


@dataclass(frozen=True, slots=True)
class Inner:
    rule: Literal["max", "mse"] = described("max", "The rule.", flag="--threshold")


def even(text: str) -> int:
    if int(text) % 2:
        raise ConfigError(f"got {text}, expected an even number")
    return int(text)


@dataclass(frozen=True, slots=True)
class Options:
    images: int = described(512, "Images.", short="-n", minimum=1)
    equalize: bool = described(True, "Equalize.")
    audit: bool = described(False, "Audit.")
    learn: bool | None = described(None, "Learn.")
    inner: Inner = field(default_factory=Inner)
    batches: tuple[int, ...] = described((1, 8), "Batches.")
    size: tuple[int, int, int] | None = described(None, "Size.")
    exclude: tuple[str, ...] = described((), "Names.")
    weights: Path | None = described(None, "File.")
    shapes: int = described(2, "Shapes.", parse=even)
    seed: int = 7  # not on the command line


FIELDS = FieldOptions(f"{__name__}:Options")


def parsed(*arguments: str, fields: FieldOptions = FIELDS) -> Any:
    """Return the dataclass that a command with these options gets."""
    made: list[Any] = []
    command = click.Command(
        "command",
        params=list(fields.options()),
        callback=lambda **values: made.append(fields.value(values)),
    )
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return made[0]


def test_without_arguments_every_default_is_that_of_the_dataclass() -> None:
    assert parsed() == Options()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-n", "3"], Options(images=3)),
        (["--images", "3"], Options(images=3)),
        (["--no-equalize"], Options(equalize=False)),
        (["--audit"], Options(audit=True)),
        (["--learn"], Options(learn=True)),
        (["--no-learn"], Options(learn=False)),
        (["--threshold", "mse"], Options(inner=Inner("mse"))),
        (["--batches", "4"], Options(batches=(4,))),
        (["--size", "3x8x16"], Options(size=(3, 8, 16))),
        (["--exclude", "a", "--exclude", "b,c"], Options(exclude=("a", "b,c"))),
        (["--weights", "w.pt"], Options(weights=Path("w.pt"))),
        (["--shapes", "4"], Options(shapes=4)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_argument_becomes_the_value_of_its_field(
    arguments: list[str], expected: Options
) -> None:
    assert parsed(*arguments) == expected


@pytest.mark.parametrize(
    "arguments",
    [["-n", "0"], ["--threshold", "kl"], ["--size", "3x8"], ["--seed", "1"], ["--no-audit"]],
    ids=" ".join,
)
def test_what_does_not_fit_a_field_is_a_usage_error(arguments: list[str]) -> None:
    with pytest.raises(click.UsageError):
        click.Command("command", params=list(FIELDS.options())).make_context("c", arguments)


def test_a_reader_of_the_package_refuses_in_its_own_words() -> None:
    with pytest.raises(ConfigError, match="got 3, expected an even number"):
        parsed("--shapes", "3")


def test_a_command_may_take_some_fields_by_another_flag() -> None:
    some = FieldOptions(f"{__name__}:Options", only=("images",), flags={"images": "--limit"})
    assert [option.opts for option in some.options()] == [["-n", "--limit"]]
    assert parsed("--limit", "5", fields=some) == Options(images=5)


def test_help_shows_text_type_and_default() -> None:
    command = click.Command("command", params=list(FIELDS.options()))
    lines = CliRunner().invoke(command, ["--help"]).stdout
    assert "-n, --images INTEGER RANGE" in lines
    assert "Images.  [default: 512; x>=1]" in lines
    assert "--equalize / --no-equalize" in lines
    assert "Batches.  [default: 1,8]" in lines
    assert "--audit" in lines
    assert "--no-audit" not in lines
