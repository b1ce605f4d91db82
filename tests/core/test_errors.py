"""Messages name options as their reader knows them: parameters in a program, flags in a shell."""

import pickle

import pytest

from reptrt.core.errors import ConfigError, ReptrtError, option


@pytest.mark.parametrize(
    ("marked", "in_python", "on_cli"),
    [
        (option("seed"), "seed", "--seed"),
        (option("memory_budget"), "memory_budget", "--memory-budget"),
        (option("split", "none"), "split='none'", "--split none"),
        (option("opset", 19), "opset=19", "--opset 19"),
        (option("equalize", True), "equalize=True", "--equalize"),
        (option("correct_bias", False), "correct_bias=False", "--no-correct-bias"),
    ],
    ids=["short", "long", "choice", "number", "on", "off"],
)
def test_an_option_has_two_forms(marked: str, in_python: str, on_cli: str) -> None:
    err = ConfigError(f"{marked}: got 1; see {marked}")
    assert str(err) == f"{in_python}: got 1; see {in_python}"
    assert err.on_cli() == f"{on_cli}: got 1; see {on_cli}"


def test_a_command_may_name_an_option_otherwise() -> None:
    err = ConfigError(f"{option('eval_limit')}: got 0")
    assert err.on_cli({"eval_limit": "--limit"}.__getitem__) == "--limit: got 0"


def test_other_text_stays_as_it_is() -> None:
    text = "<function <lambda> at 0x1>: got {0}, --x y='z'"
    assert str(ReptrtError(text)) == ReptrtError(text).on_cli() == text


def test_an_error_survives_another_process() -> None:
    err = pickle.loads(pickle.dumps(ConfigError(f"{option('seed')}: got -1")))
    assert (str(err), err.on_cli()) == ("seed: got -1", "--seed: got -1")
