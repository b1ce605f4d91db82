"""A run that is killed at any moment and started again gives the bytes of an undisturbed run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.small_run import make_run, write_data, write_factory

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("REPTRT_KILLS", "6"))
EQUAL = ("float.onnx", "float.onnx.json", "int8.onnx", "int8.onnx.json")
EQUAL += ("eval.json", "diagnosis.json")
MEASURED = ("bench", "build-engine")  # times; tensorrt-rtx need not write the same bytes twice

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="attempts are forked"),
]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of all runs, and when each was killed."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.killing", str(folder), str(KILLS)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    logs = "\n".join(path.read_text()[-1000:] for path in sorted(folder.glob("*.log")))
    assert done.returncode == 0, done.stderr + logs
    return folder, json.loads(done.stdout)


def files(folder: Path) -> list[str]:
    """Every file of a run, hidden and temporary ones included."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def without_seconds(content: Any) -> Any:
    """JSON content without what is measured in seconds."""
    if isinstance(content, dict):
        return {key: without_seconds(v) for key, v in content.items() if key != "seconds"}
    return [without_seconds(v) for v in content] if isinstance(content, list) else content


def record(folder: Path) -> dict[str, Any]:
    """The record of a run without the sums of files that are measured."""
    content: dict[str, Any] = json.loads((folder / "run.json").read_text())
    for name in MEASURED:
        content["stages"].get(name, {}).pop("sha256", None)
    return content


def test_the_moments_are_spread_over_the_run(killed: tuple[Path, dict[str, Any]]) -> None:
    """No stage in particular, which would hang on the clock; but not one and the same."""
    moments = [tuple(kill["found"]) for kill in killed[1]["kills"]]
    assert len(moments) == KILLS
    assert KILLS < 4 or len(set(moments)) > 2


def test_learning_is_part_of_the_run(killed: tuple[Path, dict[str, Any]]) -> None:
    content = json.loads((killed[0] / str(KILLS) / "calibrate.json").read_text())
    kept = [unit["kept"] for unit in content["learned"]["units"]]
    assert {*kept} >= {"corrected", "learned"}  # what is taken up again has a say in the bytes


@pytest.mark.parametrize("number", range(KILLS + 1))
def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(
    killed: tuple[Path, dict[str, Any]], number: int
) -> None:
    """The last number is a second undisturbed run."""
    whole = killed[0] / str(KILLS + 1)
    run = killed[0] / str(number)
    assert files(run) == files(whole)
    assert not [name for name in files(run) if ".part" in name]
    for name in EQUAL:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    found, expected = (
        without_seconds(json.loads((folder / "calibrate.json").read_text()))
        for folder in (run, whole)
    )
    assert found == expected
    assert record(run) == record(whole)


def test_parts_of_files_of_a_killed_run_go(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".int8.onnx.a1b2.part").write_bytes(b"a part")
    make_run(write_factory(tmp_path), write_data(tmp_path / "x.npz"), folder)
    assert [name for name in files(folder) if name.startswith(".")] == []
