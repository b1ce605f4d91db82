"""A run goes the whole way, keeps what is done, and continues after a kill with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from reptrt.artifacts import sha256_of
from reptrt.cli import main
from reptrt.demo.digits import WEIGHTS

NET = [
    *("repvgg", "--weights", str(WEIGHTS), "--input-size", "1x8x8"),
    *("--widths", "24,24,40,48", "--blocks", "6,3,1", "--strides", "1,1,2,2"),
    *("--mean", "0.306", "--std", "0.376"),
]
SAME = ("float.onnx", "int8.onnx", "eval.json")  # latencies and tensorrt-rtx's engines differ


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "x.npz"
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (64, 1, 8, 8), dtype=np.uint8)
    np.savez(path, x=x, y=rng.integers(0, 10, 64))
    return path


def command(data: Path, folder: Path) -> list[str]:
    return [
        "run",
        *NET,
        "--data",
        str(data),
        "-n",
        "32",
        "--batch",
        "1",
        "--bench-seconds",
        "0.05",
        "-o",
        str(folder),
    ]


def invoke(data: Path, folder: Path, *more: str) -> str:
    result = CliRunner().invoke(main, [*command(data, folder), *more])
    assert result.exit_code == 0, result.output
    return result.output


def states(folder: Path) -> dict[str, str]:
    report = json.loads((folder / "report.json").read_text())
    return {stage["name"]: stage["state"] for stage in report["stages"]}


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "whole"
    invoke(data, folder)
    return folder


def test_a_run_makes_every_file_and_says_what_it_found(finished: Path) -> None:
    for name in (*SAME, "bench.json", "report.json", "run.json"):
        assert (finished / name).is_file(), name
    report = json.loads((finished / "report.json").read_text())
    assert [len(report[name]["results"]) for name in ("eval", "bench")] == [2, 2]
    assert report["eval"]["results"][1]["sqnr_db"] > 15
    assert report["files"]["calibrate"] == sha256_of(finished / "int8.onnx")


def test_a_second_run_keeps_everything_and_changed_options_only_what_they_touch(
    data: Path, finished: Path
) -> None:
    invoke(data, finished)
    engine = states(finished)["build-engine"]
    assert set(states(finished).values()) <= {"kept", engine}
    invoke(data, finished, "--split", "none")
    again = states(finished)
    assert (again["export"], again["calibrate"], again["eval"]) == ("kept", "done", "done")
    invoke(data, finished)  # as it was, for whoever comes next


def test_a_damaged_or_missing_file_is_made_again(data: Path, finished: Path) -> None:
    before = sha256_of(finished / "int8.onnx")
    (finished / "int8.onnx").write_bytes(b"damaged")
    invoke(data, finished)
    assert states(finished)["calibrate"] == "done"
    assert sha256_of(finished / "int8.onnx") == before


@pytest.mark.parametrize("seconds", [2.0, 3.5])
def test_a_killed_run_continues_with_the_same_bytes(
    data: Path, finished: Path, tmp_path: Path, seconds: float
) -> None:
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "reptrt.cli", *command(data, folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    invoke(data, folder)
    for name in SAME:
        expected = (finished / name).read_text("latin1").replace(str(finished), "")
        assert (folder / name).read_text("latin1").replace(str(folder), "") == expected, name
    assert not (folder / "int8.onnx.json").read_text().startswith("{}")


def test_a_broken_record_is_one_line(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    result = CliRunner().invoke(main, command(data, tmp_path))
    assert result.exit_code == 1
    assert "expected the record of a run" in result.output
    assert result.output.count("\n") == 1
