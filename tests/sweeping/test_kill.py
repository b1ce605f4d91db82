"""Workers and drivers that are killed: the same table, the same bytes, nothing done twice."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.pages import REPOSITORY
from tests.sweeping.sheets import MADE, write_inputs, write_sheet
from tests.sweeping.test_schedule import is_running, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills processes by a signal"),
]
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed"
)

FILE = f"""\
{MADE}
[nets.held]
source = "held_net.py:make"
targets = ["tensorrt"]

[nets.held.export]
opset = 17
"""
TRIALS, RECORDS = 6, 14  # two exports; calibrate and eval of each trial
HELD = "REPTRT_TEST_HELD"  # folder where the held net says who works on it, and waits; inherited
FACTORY = f"""\
import os, pathlib, time
from net_of_a_small_run import make as small

def make():
    if {HELD!r} in os.environ:
        folder = pathlib.Path(os.environ[{HELD!r}])
        (folder / str(os.getpid())).touch()
        while not (folder / "go").exists():
            time.sleep(0.02)
    return small()
"""


class Sweeps:
    """Sweeps of one file as processes that can be killed."""

    def __init__(self, file: Path, options: tuple[str, ...]) -> None:
        self.file, self.options = file, options

    def start(self, folder: Path, held: Path | None = None) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "reptrt", "-v", "sweep", self.file, "-o", folder]
        return subprocess.Popen(
            [*map(str, command), *self.options],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", **({HELD: str(held)} if held else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def finish(self, process: "subprocess.Popen[str]") -> str:
        text, _ = process.communicate(timeout=300)
        assert process.returncode == 0, text
        return text


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    (folder / "held_net.py").write_text(FACTORY)
    return write_sheet(folder, FILE)


@pytest.fixture(scope="module", params=["local", pytest.param("ray", marks=needs_ray)])
def sweeps(request: pytest.FixtureRequest, file: Path) -> Sweeps:
    ray = ("--ray", "local") if request.param == "ray" else ()
    return Sweeps(file, ("--workers", "2", *ray))


@pytest.fixture(scope="module")
def whole(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed sweep by local processes."""
    folder = tmp_path_factory.mktemp("whole")
    undisturbed = Sweeps(file, ("--workers", "2"))
    undisturbed.finish(undisturbed.start(folder))
    return folder


def records(folder: Path) -> dict[str, int]:
    """The records of finished tasks, with the time at which each was written."""
    paths = (folder / "store" / "records").glob("*.json")
    return {path.name: path.stat().st_mtime_ns for path in paths if path.stem.count(".") == 0}


def artifacts(folder: Path) -> dict[str, bytes]:
    root = folder / "store" / "artifacts"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_killed_workers_and_a_killed_driver_change_nothing(
    sweeps: Sweeps, whole: Path, tmp_path: Path
) -> None:
    held, folder = tmp_path / "held", tmp_path / "out"
    held.mkdir()
    driver = sweeps.start(folder, held)
    try:
        wait_for(lambda: os.listdir(held))
        (first,) = os.listdir(held)
        os.kill(int(first), signal.SIGKILL)  # in the middle of its task
        wait_for(lambda: len(os.listdir(held)) == 2)  # it was started again, and is held again
        wait_for(lambda: len(records(folder)) == RECORDS - 5)  # the other net is finished
    finally:
        driver.kill()
        text, _ = driver.communicate()
    assert "held: export: " in text
    assert "started again" in text
    wait_for(lambda: not any(is_running(int(worker)) for worker in os.listdir(held)))
    kept = records(folder)
    assert len(kept) == RECORDS - 5

    text = sweeps.finish(sweeps.start(folder))
    assert (folder / "sweep.json").read_bytes() == (whole / "sweep.json").read_bytes()
    assert artifacts(folder) == artifacts(whole)
    after = records(folder)
    assert after.keys() == records(whole).keys()
    assert len(after) == RECORDS
    assert {name: after[name] for name in kept} == kept  # nothing was done twice
    assert list((folder / "store" / "work").iterdir()) == []
    assert f"{TRIALS} of {TRIALS} trials are finished, 4 of them before" in text


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
    process = Sweeps(deadly, ("--workers", "2", "--retries", "1")).start(tmp_path)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 1, text
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    states: dict[str, Any] = {row["net"]: row["state"] for row in rows}
    assert states["sound"] == "finished"
    assert states["deadly"].startswith("failed: export: its worker died 2 times: ")
    assert tries.read_text() == "xx"
