"""reptrt inspect: layers, and the audit of an engine, from the command line."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from reptrt.cli import main
from reptrt.core.artifacts import sidecar_path
from reptrt.trt import driver
from tests.support.qdq_graphs import qdq_model, save


def inspect(*args: str | Path) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, args)], catch_exceptions=False)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(driver, "find_gpu", lambda: "no NVIDIA driver on this machine")
    path = save(qdq_model(), tmp_path / "m.onnx")
    args = ["build-engine", str(path), "-o", str(tmp_path / "m.engine"), "--target", "sm80"]
    args += ["--backend", "tensorrt-rtx"]
    assert CliRunner().invoke(main, args, catch_exceptions=False).exit_code == 0
    return tmp_path / "m.engine"


def test_onnx(tmp_path: Path) -> None:
    path = save(qdq_model(), tmp_path / "m.onnx")
    done = inspect(path, "--json", tmp_path / "out.json")
    assert done.exit_code == 0
    assert "conv1" in done.stdout
    assert "INT8 4" in done.stdout  # two convolutions, two Q
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["planned"] == ["conv0", "conv1"]
    assert "audit" not in content


def test_engine_and_audit_as_json(engine: Path) -> None:
    done = inspect(engine, "--audit", "--json", "-")
    assert done.exit_code == 0
    content = json.loads(done.stdout)
    assert content["kind"] == "engine"
    assert content["audit"]["planned"] == ["conv0", "conv1"]
    assert content["audit"]["built"] == 2


def test_strict_is_an_audit_that_passes(engine: Path) -> None:
    done = inspect(engine, "--strict")
    assert done.exit_code == 0
    assert "2 of 2 planned layers run in INT8" in done.stdout


def test_strict_fails_on_a_miss(engine: Path) -> None:
    other = save(qdq_model(num_convs=3), engine.parent / "other.onnx")  # conv2 is not in the engine
    done = inspect(engine, "--plan", other)
    assert done.exit_code == 0
    assert "conv2: ?, planned INT8: no layer of the engine names it" in done.stdout
    assert inspect(engine, "--plan", other, "--strict").exit_code == 1


def test_without_a_plan(engine: Path) -> None:
    sidecar_path(engine).unlink()
    assert inspect(engine).exit_code == 0
    done = inspect(engine, "--audit")
    assert done.exit_code == 1
    assert "no sidecar says what was planned INT8; give the ONNX file too" in done.stderr


def test_an_audit_is_of_an_engine(tmp_path: Path) -> None:
    done = inspect(save(qdq_model(), tmp_path / "m.onnx"), "--strict")
    assert done.exit_code == 1
    assert "an audit is of an engine; give the .engine file" in done.stderr
