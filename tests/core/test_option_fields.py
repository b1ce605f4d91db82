"""Options that carry their own help text."""

from dataclasses import dataclass

from reptrt.core.option_fields import described, descriptions


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
