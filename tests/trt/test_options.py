"""Options of an engine build: what is parsed, what is refused and how it is said."""

import pytest

from reptrt.core.errors import ConfigError
from reptrt.trt.options import (
    BuildOptions,
    ShapeRange,
    parse_shapes,
    parse_targets,
    profile_shapes,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1:8:64", ((1,), (8,), (64,))),
        ("4", ((4,), (4,), (4,))),
        (" 1 : 2 : 3 ", ((1,), (2,), (3,))),
        ("1x3x32x32:8X3x32x32:64x3x32x32", ((1, 3, 32, 32), (8, 3, 32, 32), (64, 3, 32, 32))),
    ],
    ids=["batches", "one", "spaces", "full"],
)
def test_parse_shapes(text, expected):
    assert parse_shapes(text) == ShapeRange(*expected)


@pytest.mark.parametrize(
    "text", ["", "1:8", "a:b:c", "1:8:64:128", "1x:2:3", "-1:2:3", "1.5:2:3", "1;2;3", "9" * 10]
)
def test_parse_shapes_refuses_nonsense(text):
    with pytest.raises(ConfigError, match=r"shapes: got .*, expected MIN:OPT:MAX as batch sizes"):
        parse_shapes(text)


@pytest.mark.parametrize("text", ["8:4:64", "1:64:8", "0:1:2", "1x3:2x3:1x4"])
def test_parse_shapes_refuses_a_range_out_of_order(text):
    with pytest.raises(ConfigError, match="expected 1 <= MIN <= OPT <= MAX"):
        parse_shapes(text)


def test_parse_shapes_refuses_mixed_ranks():
    with pytest.raises(ConfigError, match="three shapes of the same rank"):
        parse_shapes("1:8x3:64")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sm89", ("sm89",)),
        ("sm120,sm80", ("sm80", "sm120")),
        (" SM_86 , 8.9 ,sm89, 120 ", ("sm86", "sm89", "sm120")),
        (" Current", ("current",)),
    ],
    ids=["one", "numeric order", "spellings", "current"],
)
def test_parse_targets(text, expected):
    assert parse_targets(text) == expected


@pytest.mark.parametrize(
    "text", ["", "sm", "rtx4090", "sm80,,sm89", "sm8", "sm8000", "ampere", "current,sm89"]
)
def test_parse_targets_refuses_nonsense(text):
    with pytest.raises(ConfigError, match=r"targets: got '.*', expected compute capabilities such"):
        parse_targets(text)


@pytest.mark.parametrize(
    ("dims", "text", "expected"),
    [
        ((-1, 3, 8, 8), None, "1x3x8x8:8x3x8x8:64x3x8x8"),
        ((-1, 3, 8, 8), "1:2:4", "1x3x8x8:2x3x8x8:4x3x8x8"),
        ((4, 3, 8, 8), None, "None"),
        ((4, 3, 8, 8), "4", "None"),
        ((-1, 3, -1, -1), "1x3x8x8:1x3x16x16:4x3x32x32", "1x3x8x8:1x3x16x16:4x3x32x32"),
    ],
    ids=["default", "batches", "fixed", "fixed and asked", "image size"],
)
def test_profile_shapes(dims, text, expected):
    shapes = None if text is None else parse_shapes(text)
    assert str(profile_shapes("input", dims, shapes)) == expected


@pytest.mark.parametrize(
    ("dims", "text", "expected"),
    [
        (
            (4, 3, 8, 8),
            "1:8:64",
            r"shapes='1x3x8x8.* does not fit input x, whose shape is 4x3x8x8",
        ),
        ((-1, 3, 8, 8), "1x3x9x9:1x3x9x9:1x3x9x9", r"whose shape is \?x3x8x8"),
        ((-1, 3, 8, 8), "1x3x8:2x3x8:4x3x8", r"whose shape is \?x3x8x8"),
        ((-1, 3, -1, -1), None, r"input x: its shape is \?x3x\?x\?; give full shapes"),
        ((-1, 3, -1, -1), "1:8:64", r"input x: its shape is \?x3x\?x\?; give full shapes"),
    ],
    ids=["fixed batch", "other size", "rank", "no default", "batch only"],
)
def test_profile_shapes_refuses_what_does_not_fit(dims, text, expected):
    shapes = None if text is None else parse_shapes(text)
    with pytest.raises(ConfigError, match=expected):
        profile_shapes("x", dims, shapes)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"workspace_mib": 0}, "workspace_mib: got 0, expected MiB, 1 or more"),
        ({"optimization_level": 6}, r"optimization_level: got 6, expected 0\.\.5"),
        ({"pinned_tactics": True}, "pinned_tactics: needs timing_cache"),
    ],
    ids=["workspace", "level", "pinned"],
)
def test_options_that_cannot_work(options, expected):
    with pytest.raises(ConfigError, match=expected):
        BuildOptions(**options)
