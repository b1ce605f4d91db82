"""The store in a folder and behind fsspec, and the simulation that uses it."""

import hashlib
import json
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from reptrt.core.errors import ArtifactError, ConfigError, DataError, MissingDependencyError
from reptrt.sweeping.places import Remote, open_place
from reptrt.sweeping.store import Made, Store
from tests.support.pages import REPOSITORY
from tests.support.small_run import refused
from tests.sweeping.sheets import write_inputs

fsspec = pytest.importorskip("fsspec")
KEY = "k" * 64


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    where = str(tmp_path / "store")
    if request.param == "memory":
        where = f"memory://{uuid.uuid4().hex}/store"
    store = Store(where)
    store.prepare()
    yield store
    if request.param == "memory":
        fsspec.filesystem("memory").rm(where, recursive=True)


def make(folder: Path) -> Made:
    (folder / "a.onnx").write_bytes(b"net")
    (folder / "notes.json").write_text("{}")
    return Made({"found": 1}, (folder / "a.onnx",), {"notes.json": folder / "notes.json"})


def never(folder: Path) -> Made:
    raise AssertionError("it is finished")


def test_what_is_finished_is_not_done_again(store: Store, tmp_path: Path) -> None:
    assert store.keys() == set()
    record = store.once(KEY, make)
    other = Store(store.where)
    other.prepare()
    assert other.once(KEY, never) == record
    assert other.keys() == {KEY}
    assert record["result"] == {"found": 1}
    path = other.fetch(record, "a.onnx", tmp_path / "copies")
    assert path.read_bytes() == b"net"
    line = f"{hashlib.sha256(b'net').hexdigest()} a.onnx\n"
    assert record["artifact"] == hashlib.sha256(line.encode()).hexdigest()


def test_a_failure_leaves_no_record(store: Store) -> None:
    def fail(folder: Path) -> Made:
        raise DataError("no images")

    with pytest.raises(DataError):
        store.once(KEY, fail)
    assert store.finished(KEY) is None
    assert store.keys() == set()


def test_a_record_without_its_files_is_done_again(store: Store) -> None:
    record = store.once(KEY, make)
    at = f"artifacts/{record['artifact']}/a.onnx"
    if store.where.startswith("memory://"):
        fsspec.filesystem("memory").rm(f"{store.where}/{at}")
    else:
        (Path(store.where) / at).unlink()
    assert store.finished(KEY) is None
    assert store.once(KEY, make)["artifact"] == record["artifact"]


def test_a_cut_off_record_is_none(store: Store) -> None:
    store.once(KEY, make)
    open_place(store.where).write(f"records/{KEY}.json", b'{"key": ')
    assert store.finished(KEY) is None


def test_changed_files_behind_a_url_are_refused(tmp_path: Path) -> None:
    where = f"memory://{uuid.uuid4().hex}"
    store = Store(where)
    record = store.once(KEY, make)
    open_place(where).write(f"artifacts/{record['artifact']}/a.onnx", b"other")
    with pytest.raises(ArtifactError, match=r"a\.onnx: is gone or has changed"):
        store.fetch(record, "a.onnx", tmp_path)


def test_two_at_a_time_do_it_once(tmp_path: Path) -> None:
    times: list[int] = []
    both = threading.Barrier(2)

    def once() -> None:
        both.wait()
        Store(str(tmp_path)).once(KEY, lambda folder: (times.append(1), make(folder))[1])

    threads = [threading.Thread(target=once) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(times) == 1
    assert list((tmp_path / "work").iterdir()) == []


def test_a_dead_worker_leaves_its_work(tmp_path: Path) -> None:
    store = Store(str(tmp_path))

    def die(folder: Path) -> Made:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.once(KEY, die)

    def go_on(folder: Path) -> Made:
        assert (folder / "half").exists()
        return make(folder)

    store.once(KEY, go_on)
    assert list((tmp_path / "work").iterdir()) == []


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    assert open_place(f"file://{tmp_path}").path == tmp_path
    assert isinstance(open_place("memory://a"), Remote)


def test_places_that_cannot_be_used_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"store nowhere://a: expected a folder or a URL"):
        Store("nowhere://a")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(MissingDependencyError, match=r"store s3://a: .*'reptrt\[fsspec\]'.*s3://"):
        Store("s3://a")


@pytest.mark.slow
def test_a_sweep_into_a_url_is_that_into_a_folder(tmp_path: Path) -> None:
    from reptrt.sweeping.options import SweepOptions
    from reptrt.sweeping.reading import read_sheet
    from reptrt.sweeping.sweeping import sweep

    file, where = write_inputs(tmp_path), f"memory://{uuid.uuid4().hex}"
    sheet = read_sheet(file)
    there = sweep(sheet, tmp_path / "there", SweepOptions(workers=0, store=where))
    here = sweep(sheet, tmp_path / "here", SweepOptions(workers=0))
    assert there.to_dict() == here.to_dict()
    for row in here.rows:
        content = fsspec.filesystem("memory").cat_file(f"{where}/{row.file}")
        assert content == (Path(here.store) / str(row.file)).read_bytes()
    again = sweep(sheet, tmp_path / "there", SweepOptions(workers=0, store=where))
    assert again.kept == len(again.rows)
    line = refused("sweep", file, "-o", tmp_path / "out", "--store", "memory://a")
    assert "--store memory://a: is the memory of one process; give --workers 0 too" in line


@pytest.mark.slow
def test_the_simulation_is_a_whole_sweep() -> None:
    few = ("--nets", "3", "--recipes", "2", "--seconds", "0.01")
    done = subprocess.run(
        [sys.executable, "tools/simulate_sweep.py", "--json", *few],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (line,) = json.loads(done.stdout)["lines"]
    assert line["trials"] == 6
    assert line["wall_s"] > 3 * 0.01
