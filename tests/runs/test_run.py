"""A run goes the whole way, keeps what is done, and continues after a kill with the same bytes."""

import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from reptrt.cli import main
from reptrt.core.artifacts import sha256_of
from reptrt.demo.digits import WEIGHTS
from reptrt.pipeline import CalibrateOptions

pytestmark = pytest.mark.slow

NET = [
    *("repvgg", "--weights", str(WEIGHTS), "--input-size", "1x8x8"),
    *("--widths", "48,48,96,96", "--blocks", "6,3,1", "--strides", "1,1,2,2"),
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
        *("--recipe", "fast"),
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


def test_a_killed_run_continues_with_the_same_bytes(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    """The command in a process of its own; `test_kill` forks, and kills at any moment."""
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "reptrt", *command(data, folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not (folder / "int8.onnx").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((folder / "run.json").read_text())["finished"] is False
    invoke(data, folder)
    for name in SAME:
        assert sha256_of(folder / name) == sha256_of(finished / name), name


def test_the_record_has_what_it_takes(data: Path, finished: Path) -> None:
    record = json.loads((finished / "run.json").read_text())
    assert record["finished"] is True
    assert record["source"]["name"] == "repvgg"
    assert record["source"]["weights"] == str(WEIGHTS)
    assert record["source"]["architecture"]["widths"] == [48, 48, 96, 96]
    assert record["source_files"] == [{"path": str(WEIGHTS), "sha256": sha256_of(WEIGHTS)}]
    expected = {"path": str(data), "sha256": sha256_of(data), "files": 1}
    assert record["data"] == record["eval_data"] == expected
    assert record["options"]["export"]["input_size"] == [1, 8, 8]
    assert record["options"]["calibrate"]["images"] == 32
    fields = {item.name for item in dataclasses.fields(CalibrateOptions)}
    assert record["options"]["calibrate"].keys() == fields
    for stage in record["stages"].values():
        assert sha256_of(finished / stage["file"]) == stage["sha256"]
    assert record["versions"]["torch"] == torch.__version__
    assert record["machine"]["python"] == platform.python_version()


def test_results_name_files_by_their_place_in_the_folder(finished: Path) -> None:
    for name in ("eval", "bench"):
        content = json.loads((finished / f"{name}.json").read_text())
        assert [row["file"] for row in content["results"]] == ["float.onnx", "int8.onnx"]
    assert content["baseline"] == "float.onnx"


def small_run(source: str, data: Path, folder: Path) -> dict[str, str]:
    """Run a net of 1 x 8 x 8 images; return what became of each stage."""
    arguments = [source, "--input-size", "1x8x8", "--data", str(data), "-n", "8", "-o", str(folder)]
    arguments += ["--recipe", "fast", "--batch", "1", "--bench-seconds", "0.01"]
    result = CliRunner().invoke(main, ["run", *arguments])
    assert result.exit_code == 0, result.output
    return states(folder)


def factory(bias: bool) -> str:
    return (
        "import torch\nfrom torch import nn\ndef make():\n    torch.manual_seed(0)\n    return "
        f"nn.Sequential(nn.Conv2d(1, 4, 3, bias={bias}), nn.ReLU(), nn.Flatten(), "
        "nn.Linear(144, 10))\n"
    )


def test_an_image_of_the_same_name_and_size_in_bytes_is_another_image(tmp_path: Path) -> None:
    images, net = tmp_path / "images", tmp_path / "made_for_a_run_test.py"
    images.mkdir()
    net.write_text(factory(True))
    rng = np.random.default_rng(0)
    for index in range(8):
        pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.bmp")
    small_run(f"{net}:make", images, tmp_path / "run")
    Image.fromarray(255 - pixels).save(images / "7.bmp")
    (images / "notes.txt").write_text("no image")
    again = small_run(f"{net}:make", images, tmp_path / "run")
    assert (again["export"], again["calibrate"]) == ("kept", "done")
    assert small_run(f"{net}:make", images, tmp_path / "run")["calibrate"] == "kept"


def test_a_changed_factory_is_exported_again(tmp_path: Path, data: Path) -> None:
    net = tmp_path / "another_made_for_a_run_test.py"
    net.write_text(factory(True))
    small_run(f"{net}:make", data, tmp_path / "run")
    net.write_text(factory(False))
    assert small_run(f"{net}:make", data, tmp_path / "run")["export"] == "done"


def test_a_broken_record_is_one_line(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    result = CliRunner().invoke(main, command(data, tmp_path))
    assert result.exit_code == 1
    assert "expected the record of a run" in result.output
    assert result.output.count("\n") == 1


def test_a_simulation_of_fewer_bits_is_judged_and_gets_no_engine(
    data: Path, tmp_path: Path
) -> None:
    invoke(data, tmp_path / "six", "--weight-bits", "6", "--no-diagnose")
    found = states(tmp_path / "six")
    assert found["build-engine"].startswith("skipped: a simulation, no engine can run it (6-bit")
    assert found["eval"] == "done"
    assert not (tmp_path / "six" / "model.engine").exists()
