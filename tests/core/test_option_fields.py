"""Options that carry their own help text."""

from dataclasses import dataclass

import pytest

from reptrt.core.errors import ConfigError
from reptrt.core.option_fields import described, descriptions, require_at_least


@dataclass(frozen=True, slots=True)
class Options:
    images: int = described(512, "Number of images.", short="-n", minimum=1)
    learn: bool = False


def test_a_described_field_is_a_field_with_a_default() -> None:
    assert Options() == Options(512, False)
    assert Options(images=3).images == 3


def test_only_described_fields_have_a_description() -> None:
    (name, description), *more = descriptions(Options).items()
    assert not more
    assert name == "images"
    assert (description.help, description.short, description.minimum) == (
        "Number of images.",
        "-n",
        1,
    )
    assert description.flag is None


@pytest.mark.parametrize("value", [0, -3, float("nan")])
def test_a_value_below_the_bound_is_named(value: int) -> None:
    with pytest.raises(ConfigError, match=f"^images: got {value}, expected 1 or more$"):
        require_at_least(1, Options(images=value), "images")


@pytest.mark.parametrize("value", [1, 7, None])
def test_the_bound_itself_and_none_pass(value: int) -> None:
    require_at_least(1, Options(images=value), "images")
