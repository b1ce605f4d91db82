"""Options survive JSON, for any dataclass; whatever does not fit is named."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reptrt.core.errors import ArtifactError, ConfigError
from reptrt.core.options_json import json_from_options, options_from_json
from reptrt.pipeline import CalibrateOptions, ExportOptions
from reptrt.runs.options import RunOptions
from reptrt.trt.options import BuildOptions, ShapeRange


@dataclass(frozen=True, slots=True)
class Inner:
    mode: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Options:
    count: int = 1
    share: float = 0.5
    on: bool = False
    name: str = ""
    path: Path | None = None
    pair: tuple[int, float] = (1, 2.0)
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    size: int | str = 1
    table: Mapping[str, int] = field(default_factory=dict)
    free: Any = None


numbers = st.integers(-5, 5)
inner = st.builds(
    Inner, mode=st.sampled_from(["a", "b"]), sizes=st.lists(numbers, max_size=3).map(tuple)
)
options = st.builds(
    Options,
    count=numbers,
    share=st.floats(allow_nan=False),
    on=st.booleans(),
    name=st.text(max_size=4),
    path=st.none() | st.just(Path("/some/where")),
    pair=st.tuples(numbers, st.floats(-1, 1)),
    inner=inner,
    maybe=st.none() | inner,
    size=numbers | st.text(max_size=3),
    table=st.dictionaries(st.text(max_size=3), numbers, max_size=2),
    free=st.none() | st.lists(numbers),
)


@pytest.mark.slow
@given(options)
def test_options_come_back(found: Options) -> None:
    content = json.loads(json.dumps(json_from_options(found)))
    assert set(content) == set(get_type_hints(Options))
    assert options_from_json(Options, content, "options") == found


def test_the_options_of_a_run_come_back() -> None:
    found = RunOptions(
        export=ExportOptions(input_size=(3, 8, 8), mean=(0.1, 0.2, 0.3)),
        calibrate=CalibrateOptions(exclude=("head.*",)),
        build=BuildOptions(shapes=ShapeRange((1,), (2,), (4,)), timing_cache=Path("cache")),
        eval_limit=7,
    )
    content = json.loads(json.dumps(json_from_options(found)))
    assert options_from_json(RunOptions, content, "options") == found


def test_a_field_of_another_version_is_named() -> None:
    content = json_from_options(RunOptions())
    content["calibrate"]["wizardry"] = 1
    with pytest.raises(ArtifactError, match=r"run: options\.calibrate: unknown field wizardry; it"):
        options_from_json(RunOptions, content, "run: options")
    del content["calibrate"]["wizardry"], content["calibrate"]["threshold"]
    with pytest.raises(ArtifactError, match=r"options\.calibrate: no field threshold; it was"):
        options_from_json(RunOptions, content, "run: options")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": "1"}, r"options\.count: got '1', expected a value of type int"),
        ({"count": True}, r"options\.count: got True, expected a value of type int"),
        ({"count": 1.5}, r"options\.count: got 1\.5, expected a value of type int"),
        ({"on": 1}, r"options\.on: got 1, expected a value of type bool"),
        ({"name": None}, r"options\.name: got None, expected a value of type str"),
        ({"path": 3}, r"options\.path: got 3, expected a value of type Path"),
        ({"pair": [1]}, r"options\.pair: got \[1\], expected 2 entries"),
        ({"pair": "no"}, r"options\.pair: got 'no', expected a list"),
        ({"inner": 3}, r"options\.inner: got 3, expected an object"),
        ({"inner": {"mode": "c", "sizes": []}}, r"inner\.mode: got 'c', expected one of a, b"),
        ({"inner": {"mode": "a", "sizes": [1, None]}}, r"inner\.sizes\[1\]: got None, expected"),
        ({"maybe": {"mode": "a"}}, r"options\.maybe: no field sizes"),
        ({"size": None}, r"options\.size: got None, expected a value of type str"),
        ({"table": {"a": "b"}}, r"options\.table\.a: got 'b', expected a value of type int"),
        ({"table": []}, r"options\.table: got \[\], expected an object"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value),
)
def test_a_value_that_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        options_from_json(Options, json_from_options(Options()) | change, "options")


def test_whole_numbers_are_floats_too() -> None:
    content = json_from_options(Options()) | {"share": 1}
    found = options_from_json(Options, content, "options")
    assert found == replace(Options(), share=1.0)
    assert isinstance(found.share, float)


def test_what_a_dataclass_refuses_is_its_own_error() -> None:
    content = json_from_options(CalibrateOptions()) | {"weight_bits": 9}
    with pytest.raises(ConfigError, match="weight_bits: got 9"):
        options_from_json(CalibrateOptions, content, "options")
