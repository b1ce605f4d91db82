"""Workers and drivers that are killed: the same table, the same bytes, nothing done twice."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.support.pages import REPOSITORY
from tests.sweeping.sheets import write_inputs, write_sheet
from tests.sweeping.test_schedule import is_running, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds workers in /proc"),
]
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed"
)

FILE = """\
data = "calib.npz"
eval_data = "eval.npz"
targets = ["tensorrt", "onnxruntime"]
recipes = ["plain", "fast"]

[export]
input_size = [1, 8, 8]

[calibrate]
images = 24

[nets.made]
source = "net_of_a_small_run.py:make"

[nets.older]
source = "net_of_a_small_run.py:make"
targets = ["tensorrt"]

[nets.older.export]
opset = 17
"""
TRIALS = 6
MARK = "REPTRT_TEST_OF_SWEEPS"  # an environment variable that workers inherit


class Sweeps:
    """Sweeps of one file as processes that can be killed."""

    def __init__(self, file: Path, mark: str, options: tuple[str, ...]) -> None:
        self.file, self.mark, self.options = file, mark, options

    def start(self, folder: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "reptrt", "-v", "sweep", self.file, "-o", folder]
        return subprocess.Popen(
            [*map(str, command), *self.options],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", MARK: self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def finish(self, process: "subprocess.Popen[str]") -> str:
        text, _ = process.communicate(timeout=300)
        assert process.returncode == 0, text
        return text

    def workers(self) -> list[int]:
        """Return the processes that work, or wait for work."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes()
                environ = (path / "environ").read_bytes()
            except OSError:  # it has ended, or is another user's
                continue
            is_worker = words.startswith(b"ray::call_in_worker") or b"sweeping.worker" in words
            if is_worker and f"{MARK}={self.mark}".encode() in environ:
                found.append(int(path.name))
        return found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return write_sheet(folder, FILE)


@pytest.fixture(scope="module", params=["local", pytest.param("ray", marks=needs_ray)])
def sweeps(request: pytest.FixtureRequest, file: Path) -> Sweeps:
    ray = ("--ray", "local") if request.param == "ray" else ()
    return Sweeps(file, uuid.uuid4().hex, ("--workers", "2", *ray))


@pytest.fixture(scope="module")
def whole(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed sweep by local processes."""
    folder = tmp_path_factory.mktemp("whole")
    undisturbed = Sweeps(file, "whole", ("--workers", "2"))
    undisturbed.finish(undisturbed.start(folder))
    return folder


def records(folder: Path) -> dict[str, int]:
    """The records of finished tasks, with the time at which each was written."""
    paths = (folder / "store" / "records").glob("*.json")
    return {path.name: path.stat().st_mtime_ns for path in paths if path.stem.count(".") == 0}


def is_working(folder: Path) -> bool:
    return any(path.is_dir() for path in (folder / "store" / "work").glob("*"))


def artifacts(folder: Path) -> dict[str, bytes]:
    root = folder / "store" / "artifacts"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_killed_workers_and_a_killed_driver_change_nothing(
    sweeps: Sweeps, whole: Path, tmp_path: Path
) -> None:
    driver = sweeps.start(tmp_path)
    wait_for(lambda: len(records(tmp_path)) >= 2 and is_working(tmp_path) and sweeps.workers())
    os.kill(sweeps.workers()[0], signal.SIGKILL)
    before = len(records(tmp_path))
    wait_for(lambda: len(records(tmp_path)) >= before + 2)
    driver.kill()
    text, _ = driver.communicate()
    assert "started again" in text
    wait_for(lambda: not any(is_running(worker) for worker in sweeps.workers()))
    kept = records(tmp_path)
    assert len(kept) < len(records(whole))

    text = sweeps.finish(sweeps.start(tmp_path))
    assert (tmp_path / "sweep.json").read_bytes() == (whole / "sweep.json").read_bytes()
    assert artifacts(tmp_path) == artifacts(whole)
    after = records(tmp_path)
    assert after.keys() == records(whole).keys()
    assert {name: after[name] for name in kept} == kept
    assert not is_working(tmp_path)
    assert f"{TRIALS} of {TRIALS} trials are finished" in text


def test_a_trial_that_kills_its_worker_fails_alone(file: Path, tmp_path: Path) -> None:
    """The second net kills whoever exports it; its file says how often that was tried."""
    tries = tmp_path / "tries"
    (tmp_path / "deadly.py").write_text(
        "import os, signal\n\ndef make():\n"
        f"    open({str(tries)!r}, 'a').write('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    images = f'data = "{file.parent / "calib.npz"}"\n'
    sound = f'[nets.sound]\nsource = "{file.parent / "given.onnx"}"\n'
    deadly = write_sheet(tmp_path, f'{images}{sound}[nets.deadly]\nsource = "deadly.py:make"\n')
    process = Sweeps(deadly, "deadly", ("--workers", "2", "--retries", "1")).start(tmp_path)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 1, text
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    states: dict[str, Any] = {row["net"]: row["state"] for row in rows}
    assert states["sound"] == "finished"
    assert states["deadly"].startswith("failed: export: its worker died 2 times: ")
    assert tries.read_text() == "xx"
