import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.support.helpers import load_tool

gpu_table = load_tool("gpu_table")


def step(name: str, state: str = "done", why: str | None = None, **result: Any) -> dict[str, Any]:
    return {"name": name, "state": state, "why": why, "result": result}


def write(path: Path, gpu: str | None) -> Path:
    row = {"file": "o/int8.tensorrt.engine", "batch": 8, "median_ms": 0.5, "throughput_ips": 16000}
    both = {"cpu_seconds": 12.0, "cuda_seconds": 3.0, "max_relative_difference": 1e-7}
    steps = [
        step("environment", gpu=gpu, driver="580.65"),
        step("calibrate fast cuda", images=512),
        step("calibrate fast cpu against cuda", **both),
        step("tensorrt bench", results=[{**row, "ratio": 0.61}]),
        step("tensorrt bench, no host copies", results=[{**row, "median_ms": 0.4}]),
        step("tensorrt parity int8", outputs={"y": {"sqnr_db": 41.2}}),
        step("tensorrt audit int8", built=20, planned=["layer"] * 21),
        step("tensorrt-rtx build int8", state="failed", why="SM90 | refused"),
    ]
    path.write_text(json.dumps({"model": "a0.onnx", "steps": steps}))
    return path


def test_files_of_several_gpus_become_one_table(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.json", "RTX 4090"), write(tmp_path / "b.json", "H100")]
    done = CliRunner().invoke(gpu_table.main, [str(file) for file in files])
    assert done.exit_code == 0, done.output
    engines, calibrations, failed = done.stdout.strip().split("\n\n")
    rows = engines.splitlines()[2:]
    assert rows == [
        f"| {gpu}, driver 580.65 | a0.onnx | tensorrt int8 | 8 | 0.500 | 0.400 | 16000 | 0.61 "
        "| 41.2 | 20 of 21 |"
        for gpu in ("RTX 4090", "H100")
    ]
    assert "| H100, driver 580.65 | a0.onnx | fast | 512 | 12.0 | 3.0 | 1.0e-07 |" in calibrations
    assert r"| tensorrt-rtx build int8 | failed | SM90 \| refused |" in failed
    assert all(line.count("|") == 11 for line in engines.splitlines())


@pytest.mark.parametrize("text", ["", "[]", '{"steps": []}', '{"model": "a", "steps": 1}'])
def test_another_file_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    done = CliRunner().invoke(gpu_table.main, [str(tmp_path / "x.json")])
    assert done.exit_code == 1
    assert "expected gpu_check.json of tools/gpu_check.py" in done.output
    assert "Traceback" not in done.output
