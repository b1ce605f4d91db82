"""Stopped calibrations: finished units are loaded, all others are learned again."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reptrt.core.errors import ArtifactError
from reptrt.pipeline import CalibrateOptions, CalibrateReport, calibrate
from reptrt.quantize.reconstruct import attempt, units
from reptrt.quantize.reconstruct.learn import Task, learn
from reptrt.quantize.reconstruct.options import LearnOptions, UnitReport
from reptrt.quantize.reconstruct.resume import Finished, remove_finished
from reptrt.quantize.reconstruct.state import State
from tests.support.detector_nets import SIZE as DETECTOR_SIZE
from tests.support.detector_nets import detector
from tests.support.learned_nets import rep_net, write_images, write_net

CPU = torch.device("cpu")
REPORT = UnitReport("c1", ("c1", "c1.coarse"), 0.25, 0.125, "learned", 3, 1.5)
STATE = State(
    {"a.b:c": torch.tensor([[1.0, -127.0]]), "d": torch.zeros(2, 1, 3, 3)},
    {"a.b": torch.tensor([[[[0.5]], [[-2.0]]]])},
    {"a.b": torch.full((1, 2, 1, 1), 1e-30)},
    {0: torch.tensor(0.017), 12: torch.tensor(3.0)},
)
FIELDS = ("codes", "gain", "shift", "step")


def same(first: State, second: State) -> bool:
    return all(
        getattr(first, name).keys() == getattr(second, name).keys()
        and all(torch.equal(v, getattr(second, name)[k]) for k, v in getattr(first, name).items())
        for name in FIELDS
    )


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# One unit's file ---------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    finished = Finished(tmp_path / "o.onnx", {"a": 1})
    assert finished.load(0, CPU) is None
    finished.save(0, STATE, REPORT)
    finished.save(1, State(), replace(REPORT, kept="start"))
    again = Finished(tmp_path / "o.onnx", {"a": 1})
    state, report = again.load(0, CPU) or (State(), None)
    assert same(state, STATE)
    assert report == REPORT
    state, report = again.load(1, CPU) or (STATE, None)
    assert same(state, State())
    assert report == replace(REPORT, kept="start")
    assert again.load(2, CPU) is None
    remove_finished(tmp_path / "o.onnx")
    assert list(tmp_path.iterdir()) == []
    remove_finished(tmp_path / "o.onnx")  # nothing there: nothing to do


def test_nothing_is_made_before_a_unit_is_finished(tmp_path: Path) -> None:
    Finished(tmp_path / "o.onnx", {"a": 1})
    assert list(tmp_path.iterdir()) == []


def test_another_calibration_starts_anew(tmp_path: Path) -> None:
    Finished(tmp_path / "o.onnx", {"a": 1}).save(0, STATE, REPORT)
    Finished(tmp_path / "p.onnx", {"a": 1}).save(0, STATE, REPORT)
    (tmp_path / "o.onnx.partial" / "tmp_of_a_killed_process").write_bytes(b"x")
    other = Finished(tmp_path / "o.onnx", {"a": 2})
    assert other.load(0, CPU) is None
    assert [name.split("/")[0] for name in files(tmp_path)] == ["p.onnx.partial"]
    assert not (tmp_path / "o.onnx.partial").exists()
    assert Finished(tmp_path / "o.onnx", {"a": 1}).load(0, CPU) is None


def test_the_folder_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "o.onnx.partial").write_bytes(b"a file of the user")
    with pytest.raises(ArtifactError, match=r"^\S+o\.onnx\.partial: .*; remove it$"):
        Finished(tmp_path / "o.onnx", {})
    finished = Finished(tmp_path / "p.onnx", {})
    (tmp_path / "p.onnx.partial").write_bytes(b"made in between")
    with pytest.raises(ArtifactError, match=r"p\.onnx\.partial: cannot be made"):
        finished.save(0, STATE, REPORT)
    assert (tmp_path / "o.onnx.partial").read_bytes() == b"a file of the user"


@pytest.fixture(scope="module")
def unit_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, Finished]:
    folder = tmp_path_factory.mktemp("unit")
    finished = Finished(folder / "o.onnx", {})
    finished.save(0, STATE, REPORT)
    (path,) = folder.rglob("*.npz")
    return path, path.read_bytes(), finished


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_as_good_as_none(
    unit_file: tuple[Path, bytes, Finished], data: st.DataObject
) -> None:
    """Nothing raises; a file that is loaded nevertheless has passed the checksums of its arrays."""
    path, content, finished = unit_file
    damaged = bytearray(content)
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(1, 3))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    found = finished.load(0, CPU)
    if found is not None:
        assert found[1] == REPORT
        for name in FIELDS:
            for key, value in getattr(found[0], name).items():
                assert torch.equal(value, getattr(STATE, name)[key])


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"not a zip", "npy", "text", "fields", 8, 10]
)
def test_other_files_in_its_place(
    unit_file: tuple[Path, bytes, Finished], content: bytes | str | int
) -> None:
    path, whole, finished = unit_file
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, int):  # it says that it is encrypted, or compressed in another way
        damaged = bytearray(whole)
        damaged[whole.index(b"PK\x01\x02") + content] ^= 1
        path.write_bytes(damaged)
    elif content == "npy":
        with path.open("wb") as stream:
            np.save(stream, np.zeros(3))
    elif content == "text":
        np.savez(path, report=np.array("not json"))
    else:
        np.savez(path, report=np.array(json.dumps({"unit": "c1", "layers": []})))
    assert finished.load(0, CPU) is None


# A calibration -----------------------------------------------------------------------------------

LEARN = LearnOptions(iterations=4)
OPTIONS = CalibrateOptions(images=48, learn=LEARN, split="none", weight_bits=6)
UNITS = 5  # three blocks between a stem and a head


class KilledError(Exception):
    """Raised in place of a signal that kills the process."""


class Counting:
    """Replaces `learn`: records the units that are learned, and stops at one of the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> None:
        self.names: list[str] = []
        self.stop = stop
        monkeypatch.setattr(attempt, "learn", self)

    def __call__(self, task: Task, *arguments: object) -> State:
        if len(self.names) == self.stop:
            raise KilledError
        self.names.append(task.name)
        return learn(task, *arguments)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_net(folder / "m.onnx", rep_net())
    write_images(folder / "d.npz", 48)
    return folder


def make(folder: Path, output: Path, options: CalibrateOptions = OPTIONS) -> CalibrateReport:
    return calibrate(folder / "m.onnx", folder / "d.npz", output, options)


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[bytes, CalibrateReport]:
    report = make(folder, folder / "whole.onnx")
    return (folder / "whole.onnx").read_bytes(), report


def stopped(folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> Path:
    """Calibrate until ``after`` tasks are done; return the folder of finished units."""
    with monkeypatch.context() as patch:
        Counting(patch, stop=after)
        with pytest.raises(KilledError):
            make(folder, output)
    assert not output.exists()
    return output.with_name(f"{output.name}.partial")


def without_seconds(report: CalibrateReport) -> list[UnitReport]:
    assert report.learned is not None
    return [replace(unit, seconds=0.0) for unit in report.learned.units]


@pytest.mark.slow
@pytest.mark.parametrize("after", range(UNITS))
def test_a_stopped_calibration_ends_with_the_same_bytes(
    after: int,
    folder: Path,
    whole: tuple[bytes, CalibrateReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    partial = stopped(folder, tmp_path / "o.onnx", monkeypatch, after)
    assert len(files(tmp_path)) == after
    counting = Counting(monkeypatch)
    report = make(folder, tmp_path / "o.onnx")
    assert counting.names == ["stem", "block0", "block1", "block2", "head"][after:]  # none twice
    assert (tmp_path / "o.onnx").read_bytes() == whole[0]
    assert without_seconds(report) == without_seconds(whole[1])
    assert not partial.exists()
    assert files(tmp_path) == ["o.onnx", "o.onnx.json"]


@pytest.mark.slow
def test_a_stopped_detector_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units between which several tensors are alive, and raw heads in units of their own."""
    monkeypatch.setattr(units, "MAX_LAYERS", 1)
    onnx.save(detector("yolov6"), tmp_path / "m.onnx")
    write_images(tmp_path / "d.npz", 48, size=DETECTOR_SIZE)
    for number, after in enumerate((None, 0, 1, 2)):
        output = tmp_path / f"{number}.onnx"
        if after is not None:
            stopped(tmp_path, output, monkeypatch, after)
        counting = Counting(monkeypatch)
        report = make(tmp_path, output)
        assert report.learned is not None
        assert len(report.learned.units) == 3
        assert len(counting.names) == 3 - (after or 0)
        assert output.read_bytes() == (tmp_path / "0.onnx").read_bytes()


def other_seed(partial: Path) -> CalibrateOptions:
    return replace(OPTIONS, seed=1, learn=replace(LEARN, seed=1))


def longer(partial: Path) -> CalibrateOptions:
    return replace(OPTIONS, learn=replace(LEARN, iterations=5))


@pytest.mark.slow
@pytest.mark.parametrize("change", [other_seed, longer])
def test_units_of_other_options_are_not_taken_up(
    change: Callable[[Path], CalibrateOptions],
    folder: Path,
    whole: tuple[bytes, CalibrateReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    partial = stopped(folder, tmp_path / "o.onnx", monkeypatch, 2)
    counting = Counting(monkeypatch)
    make(folder, tmp_path / "o.onnx", change(partial))
    assert len(counting.names) == UNITS
    assert not partial.exists()
    assert (tmp_path / "o.onnx").read_bytes() != whole[0]


@pytest.mark.slow
def test_units_of_other_images_or_another_net_are_not_taken_up(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, net = tmp_path / "images", tmp_path / "net"
    for other in (images, net):
        other.mkdir()
        write_net(other / "m.onnx", rep_net(seed=int(other is net)))
        write_images(other / "d.npz", 48, seed=int(other is images))
        stopped(folder, tmp_path / "o.onnx", monkeypatch, 2)
        with monkeypatch.context() as patch:
            counting = Counting(patch)
            make(other, tmp_path / "o.onnx")
        assert len(counting.names) == UNITS
        (tmp_path / "o.onnx").unlink()


def test_a_damaged_unit_is_learned_again(
    folder: Path,
    whole: tuple[bytes, CalibrateReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    partial = stopped(folder, tmp_path / "o.onnx", monkeypatch, 4)
    damaged = sorted(partial.rglob("*.npz"))[1]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 3] ^= 0xFF
    damaged.write_bytes(content)
    counting = Counting(monkeypatch)
    make(folder, tmp_path / "o.onnx")
    assert counting.names == ["block0", "head"]
    assert (tmp_path / "o.onnx").read_bytes() == whole[0]


def test_without_an_output_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    finished = Finished(None, {"a": 1})
    finished.save(0, STATE, REPORT)
    assert finished.load(0, CPU) is None
    assert list(tmp_path.iterdir()) == []
