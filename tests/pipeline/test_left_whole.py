"""Layers that are not split: each is named with its reason, whatever the mode."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

from reptrt.cli import main
from reptrt.core.choices import SplitMode, SplitPrecision
from reptrt.pipeline import CalibrateOptions, calibrate
from tests.support.learned_nets import rep_net, write_images, write_net

COUNT = 64
LAYERS = {"stem", "block0", "block1", "block2", "head"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("left_whole")
    write_net(folder / "m.onnx", rep_net())
    write_images(folder / "d.npz", COUNT)
    return folder


def reasons(folder: Path, **options: Any) -> dict[str, str]:
    """Return layer -> reason of the layers left whole, after checking that no layer is lost."""
    chosen = CalibrateOptions(images=COUNT, recipe="fast", **options)
    report = calibrate(folder / "m.onnx", folder / "d.npz", folder / "o.onnx", chosen)
    left = {skip.node: skip.reason for skip in report.left_whole}
    split = {split.layer for split in report.splits}
    assert len(left) == len(report.left_whole)
    assert not split & left.keys()
    convolutions = {n.name for n in onnx.load(folder / "m.onnx").graph.node if n.op_type == "Conv"}
    assert convolutions - {*chosen.exclude} <= split | left.keys() <= LAYERS
    return left


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "precision", "expected"),
    [
        (
            "identity",
            "float",
            {"stem": "input and output channels differ", "head": "not a 2-D convolution"},
        ),
        ("coarse-fine", "float", {"head": "not a 2-D convolution"}),
        (
            "identity",
            "int8",
            {"stem": "input and output channels differ", "head": "not a 2-D convolution"},
        ),
        (
            "coarse-fine",
            "int8",
            {"stem": "rounding the INT8 summands", "head": "not a 2-D convolution"},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_explicit_form_names_the_layers_that_do_not_take_it(
    split: SplitMode, precision: SplitPrecision, expected: dict[str, str], folder: Path
) -> None:
    equalize = (split, precision) != ("coarse-fine", "int8")
    left = reasons(folder, split=split, split_precision=precision, equalize=equalize)
    assert left.keys() == expected.keys()
    for layer, start in expected.items():
        assert left[layer].startswith(start)


def test_auto_names_them_with_the_reason_of_the_decision(folder: Path) -> None:
    left = reasons(folder, split="auto", weight_bits=4)
    assert left["stem"].startswith("weight noise is ")


def test_excluded_layers_and_split_none_have_no_reason(folder: Path) -> None:
    assert reasons(folder, split="identity", exclude=("stem",)).keys() == {"head"}
    options = CalibrateOptions(images=COUNT, recipe="fast", split="none")
    report = calibrate(folder / "m.onnx", folder / "d.npz", folder / "o.onnx", options)
    assert report.left_whole == ()


def test_the_command_line_names_them_with_v_and_in_json(folder: Path) -> None:
    command = ["calibrate", "m.onnx", "--data", "d.npz", "-n", "64", "-o", "o.onnx"]
    command += ["--recipe", "fast", "--split", "identity", "--json", "o.json"]
    paths = [str(folder / word) if "." in word else word for word in command]
    done = CliRunner().invoke(main, ["-v", *paths])
    assert done.exit_code == 0, done.output
    assert "stem is not split: input and output channels differ" in done.stderr
    left = json.loads((folder / "o.json").read_text())["left_whole"]
    assert {skip["node"] for skip in left} == {"stem", "head"}
    quiet = CliRunner().invoke(main, paths)
    assert "is not split" not in quiet.output
