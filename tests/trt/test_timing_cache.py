"""One timing cache file and many builds: nothing that one of them measured is lost."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from reptrt.core.errors import ArtifactError
from reptrt.trt import timing_cache
from tests.support.fake_tensorrt import FakeTimingCache

_SPAWN = multiprocessing.get_context("spawn")


class SlowConfig:
    """A builder config whose build measured one layer; serializing takes a while."""

    def __init__(self, key):
        self.cache = FakeTimingCache("gpu0", {key})

    def get_timing_cache(self):
        return self

    def combine(self, other, ignore_mismatch):
        return self.cache.combine(other, ignore_mismatch)

    def create_timing_cache(self, content):
        return FakeTimingCache.parse(content, "gpu0")

    def serialize(self):
        time.sleep(0.002)  # between reading and writing: where an update could be lost
        return self.cache.serialize()


def measure(path, worker, rounds):
    for i in range(rounds):
        timing_cache.merge(SlowConfig(f"{worker}.{i}"), Path(path))


def hold(path, ready):
    with timing_cache.locked(Path(path)):
        ready.set()
        time.sleep(60)


@pytest.mark.slow
def test_two_processes_lose_nothing(tmp_path):
    path = tmp_path / "timing.cache"
    workers = [_SPAWN.Process(target=measure, args=(str(path), name, 40)) for name in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    expected = {f"{name}.{i}" for name in "ab" for i in range(40)}
    assert set(json.loads(path.read_text())["keys"]) == expected
    assert {p.name for p in tmp_path.iterdir()} <= {"timing.cache", "timing.cache.lock"}


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    path = tmp_path / "timing.cache"
    ready = _SPAWN.Event()
    holder = _SPAWN.Process(target=hold, args=(str(path), ready))
    holder.start()
    assert ready.wait(30)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(30)
    timing_cache.merge(SlowConfig("mine"), path)
    assert json.loads(path.read_text())["keys"] == ["mine"]


def test_a_lock_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "timing.cache.lock").mkdir()
    with pytest.raises(ArtifactError, match=r"timing\.cache\.lock: cannot be locked"):
        timing_cache.merge(SlowConfig("mine"), tmp_path / "timing.cache")
    assert not (tmp_path / "timing.cache").exists()


def test_a_file_that_became_another_gpus_is_left_alone(tmp_path, caplog):
    path = tmp_path / "timing.cache"
    path.write_text('{"gpu": "other", "keys": ["theirs"]}')
    timing_cache.merge(SlowConfig("mine"), path)
    assert json.loads(path.read_text())["keys"] == ["theirs"]
    assert "left as it is" in caplog.text
