"""tools/profile_calibrate.py: the table, and that its passes are those that are needed."""

import re
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from reptrt.pipeline import CalibrateOptions
from reptrt.quantize.calib.outputs import stride_of
from tests.support.helpers import load_tool
from tests.support.learned_nets import rep_net, write_images, write_net

COUNT = 48
tool = load_tool("profile_calibrate")


def test_every_stage_stands_beside_what_it_needs(tmp_path: Path) -> None:
    write_net(tmp_path / "tiny.onnx", rep_net(1))
    write_images(tmp_path / "d.npz", COUNT)
    clock = time.perf_counter
    arguments = ["--data", str(tmp_path / "d.npz"), "--recipe", "balanced", "--cpu-time"]
    done = CliRunner().invoke(tool.main, [str(tmp_path / "tiny.onnx"), *arguments])
    assert done.exit_code == 0, done.output
    assert "tiny, balanced, 48 images, cpu, 1 threads, CPU time" in done.output
    for stage in ("prepare", "collect", "thresholds", "rounding", "biases", "learn"):
        assert re.search(rf"^{stage} +\d+\.\d\d +\d+\.\d\d +\d+\.\d\d$", done.output, re.M)
    assert time.perf_counter is clock


def test_seconds_are_divided_by_those_of_onnxruntime() -> None:
    options = CalibrateOptions(images=512, recipe="accurate")
    passes = {"onnxruntime": 2.0, "torch": 4.0, "steps": 30.0}
    need = tool.needed(options)
    assert {name: need[name](passes) for name in need} == pytest.approx(
        {
            "prepare": 4.0,
            "collect": 0.0,
            "thresholds": 16.0 / stride_of(512),
            "rounding": 4.0,
            "biases": 8.0 / stride_of(512),
            "learn": 38.0,
        }
    )
    lines = list(tool.table({"import": 1.0, "prepare": 5.0, "learn": 60.0}, passes, need))
    assert [line.split()[-3:] for line in lines[-3:]] == [
        ["5.00", "2.50", "4.00"],
        ["60.00", "30.00", "38.00"],
        ["65.00", "32.50", "42.00"],
    ]
