"""A run is done again from its record alone: the same bytes, or what differs and why."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reptrt.core.artifacts import sha256_of
from tests.support.small_run import make_run, refused, reptrt, write_data, write_factory

pytestmark = pytest.mark.slow

MUST = ("float.onnx", "int8.onnx", "eval.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a factory, images and a run of them."""
    folder = tmp_path_factory.mktemp("made")
    make_run(write_factory(folder), write_data(folder / "data.npz"), folder / "run")
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """The run in a folder of its own, free to be changed."""
    return shutil.copytree(made / "run", tmp_path / "copied")


def edit(folder: Path, **changes: Any) -> None:
    """Change the record of a run."""
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def record_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "run.json").read_text()))


def replayed(*arguments: object, code: int = 0) -> dict[str, Any]:
    result = reptrt("replay", *arguments, "--json", "-")
    assert result.exit_code == code, result.output
    return dict(json.loads(result.stdout))


def by_file(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {file["file"]: file for file in report["files"]}


@pytest.mark.slow
def test_a_run_is_reproduced(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the record does not depend on where the command is given
    report = replayed(made / "run", "-o", tmp_path / "again")
    assert report["reproduced"] is True
    assert report["changes"] == []
    for name in MUST:
        assert sha256_of(made / "run" / name) == sha256_of(tmp_path / "again" / name), name
        assert by_file(report)[name]["state"] == "equal"
        assert by_file(report)[name]["must_be_equal"] is True
    assert list(by_file(report))[:2] == ["float.onnx", "int8.onnx"]
    again, before = record_of(tmp_path / "again"), record_of(made / "run")
    for name in ("source", "source_files", "data", "options"):
        assert again[name] == before[name]


@pytest.mark.slow
def test_paths_that_were_relative_are_found_from_anywhere(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    make_run("net_of_a_small_run.py:make", Path("data.npz"), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert replayed(Path("run"))["reproduced"] is True


def test_without_a_folder_nothing_is_left(made: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in made.rglob("*"))
    result = reptrt("replay", made / "run")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "replay  reproduced"
    assert sorted(path.name for path in made.rglob("*")) == before


def test_latencies_and_engines_may_differ(copied: Path) -> None:
    stages = record_of(copied)["stages"]
    engine = {"key": "0", "file": "model.engine", "sha256": "0" * 64}
    edit(copied, stages=stages | {"build-engine": engine})
    report = replayed(copied)
    assert report["reproduced"] is True
    found = by_file(report)
    assert found["model.engine"]["must_be_equal"] is False
    assert found["model.engine"]["state"] in ("differs", "not made")  # without tensorrt-rtx
    assert found["bench.json"]["reasons"] == ["latencies differ between runs"]


@pytest.mark.slow
def test_other_versions_and_machines_are_named(copied: Path) -> None:
    record = record_of(copied)
    stages = record["stages"]
    stages["calibrate"]["sha256"] = "0" * 64  # as if another torch had made it
    versions = {**record["versions"], "torch": "1.0", "abacus": "3"}
    edit(copied, stages=stages, versions=versions, machine={**record["machine"], "cpu": "Z80"})
    result = reptrt("replay", copied)
    assert result.exit_code == 1
    now = record["versions"]["torch"]
    assert f"changed: torch: 1.0 -> {now}\n" in result.stdout
    assert "changed: abacus: 3 -> none\n" in result.stdout
    assert "changed: cpu: Z80 -> " in result.stdout
    assert result.stdout.splitlines()[-1] == "replay  not reproduced"
    report = by_file(replayed(copied, code=1))
    assert f"torch: 1.0 -> {now}" in report["int8.onnx"]["reasons"]
    assert report["int8.onnx"]["expected_sha256"] == "0" * 64
    assert report["float.onnx"]["reasons"] == []
    assert report["eval.json"]["state"] == "equal"


@pytest.mark.slow
def test_a_factory_that_draws_anew_is_found(tmp_path: Path) -> None:
    source = write_factory(tmp_path, seeded=False, name="unseeded")
    run = make_run(source, write_data(tmp_path / "data.npz"), tmp_path / "run")
    found = by_file(replayed(run, code=1))
    assert "does the factory draw new weights" in found["float.onnx"]["reasons"][0]
    assert found["int8.onnx"]["reasons"] == ["it is made from float.onnx, which differs"]
    assert found["eval.json"]["reasons"] == [
        "it is made from float.onnx, which differs",
        "it is made from int8.onnx, which differs",
    ]


def test_files_of_the_run_are_not_needed_but_missed(copied: Path) -> None:
    (copied / "int8.onnx").unlink()
    (copied / "float.onnx").write_bytes(b"changed")
    found = by_file(replayed(copied))
    assert found["int8.onnx"]["kept"] == "the run's own file does not exist any more"
    assert found["float.onnx"]["kept"] == "the run's own file was changed afterwards"
    assert found["eval.json"]["kept"] is None


def test_inputs_may_move_but_not_change(made: Path, copied: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    shutil.copytree(made, other)
    moved = ("--data", other / "data.npz", "--source", f"{other}/net_of_a_small_run.py:make")
    record = record_of(copied)
    gone = tmp_path / "gone"
    lost = {**record["data"], "path": str(gone / "data.npz")}
    source = {**record["source"], "name": f"{gone}/net_of_a_small_run.py:make"}
    edit(copied, source=source, data=lost, eval_data=lost)
    line = refused("replay", copied)
    assert f"{gone}/net_of_a_small_run.py: does not exist; " in line
    line = refused("replay", copied, *moved[2:])
    assert f"{gone}/data.npz: does not exist; " in line
    assert "give --data" in line
    assert replayed(copied, *moved)["reproduced"] is True
    (other / "net_of_a_small_run.py").write_text("changed = True\n")
    line = refused("replay", copied, *moved)
    got = sha256_of(other / "net_of_a_small_run.py")
    expected = record["source_files"][0]["sha256"]
    assert f"has changed since the run: sha256 is {got}, expected {expected}" in line


def test_changed_images_are_refused(made: Path, copied: Path, tmp_path: Path) -> None:
    data = shutil.copy(made / "data.npz", tmp_path / "data.npz")
    with np.load(data) as arrays:
        content = {**arrays}
    content["x"][3, 0, 2, 2] ^= 1
    np.savez(data, **content)
    line = refused("replay", copied, "--data", data)
    assert f"{data}: has changed since the run: sha256 is {sha256_of(data)}, expected " in line
    assert record_of(copied)["data"]["sha256"] in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finished": False}, "was stopped (export, calibrate, "),
        ({"finished": False, "stages": {}}, "was stopped (nothing done)"),
        ({"format": 2}, "not the record of a run in format 1 (its format is 2)"),
        ({"wizardry": 1}, "unknown field wizardry; it was written by another version"),
        ({"options": {}}, "options: no field annotations; it was written by another version"),
        ({"data": {"path": "x"}}, "data: no field files"),
        ({"finished": 1}, "finished: got 1, expected a value of type bool"),
    ],
    ids=["stopped", "started", "format", "unknown", "missing", "data", "type"],
)
def test_a_record_that_cannot_be_used_is_one_line(
    copied: Path, changes: dict[str, Any], message: str
) -> None:
    edit(copied, **changes)
    assert message in refused("replay", copied)


def test_folders_that_are_no_runs(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty: not the folder of a run, it has no run.json" in refused(
        "replay", tmp_path / "empty"
    )
    assert "not the folder of a run" in refused("replay", tmp_path / "nowhere")
    text = (copied / "run.json").read_text()
    (copied / "run.json").write_text(text[:100])
    assert "run.json: cannot be read (" in refused("replay", copied)
    (copied / "run.json").write_text("[]")
    assert "not the record of a run in format 1" in refused("replay", copied)


def test_a_replay_is_not_made_from_what_is_there(made: Path, copied: Path) -> None:
    assert "is not empty; give a new folder" in refused("replay", made / "run", "-o", copied)
    assert "is not empty" in refused("replay", copied, "-o", copied)
