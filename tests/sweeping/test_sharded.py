"""Evaluation in parts: the numbers of all images in one, to the last digit; nothing done twice."""

import importlib.util
import json
import logging
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from reptrt.core.errors import ArtifactError, ConfigError
from reptrt.graph.net import model_from_net, net_from_model
from reptrt.graph.preprocess import write_preprocess
from reptrt.judge.evaluate import Evaluation, evaluate
from reptrt.judge.options import EvaluateOptions
from reptrt.sweeping import sharded
from reptrt.sweeping.local import LocalProcesses
from reptrt.sweeping.options import ShardOptions
from reptrt.sweeping.sharded import evaluate_in_shards, ranges
from reptrt.sweeping.tasks import Task
from tests.judge.test_segment import segmenter
from tests.support.coco_sets import constant_detector, outputs_for, preprocess, write_set
from tests.support.learned_nets import rep_net, write_images, write_net
from tests.support.small_run import reptrt

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed"
)
FILES = ("float.onnx", "near.onnx")
OPTIONS = EvaluateOptions(batch_size=8, threads=1)


def with_noise(model: onnx.ModelProto, size: float = 0.02) -> onnx.ModelProto:
    """Return a net whose constants are a little off."""
    other = onnx.ModelProto()
    other.CopyFrom(model)
    rng = np.random.default_rng(5)
    for tensor in other.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32 and value.ndim > 1:
            near = value * (1 + size * rng.standard_normal(value.shape))
            tensor.CopyFrom(numpy_helper.from_array(near.astype(np.float32), tensor.name))
    return other


def write_case(folder: Path, task: str) -> tuple[Path, EvaluateOptions]:
    """Write two nets and images for a task; return the images and the options."""
    options = replace(OPTIONS, reference=folder / FILES[0])
    if task == "classify":
        for name, model in zip(FILES, (rep_net(1), with_noise(rep_net(1))), strict=True):
            write_net(folder / name, model)
        return write_images(folder / "x.npz", 70), options
    data = folder / "val"
    if task == "detect":
        annotations = write_set(data, count=30)
        model = constant_detector(outputs_for(annotations)[0])
    else:
        rng = np.random.default_rng(2)
        for index in range(30):
            for kind, most, shape in (("val", 256, (8, 12, 3)), ("masks", 4, (8, 12))):
                (folder / kind).mkdir(exist_ok=True)
                pixels = rng.integers(0, most, shape, np.uint8)
                Image.fromarray(pixels).save(folder / kind / f"{index:02}.png")
        model = segmenter((8, 12))
    for name, proto in zip(FILES, (model, with_noise(model)), strict=True):
        net = net_from_model(proto)
        if task == "detect":
            write_preprocess(net, preprocess())
        onnx.save(model_from_net(net), folder / name)
    masks = folder / "masks" if task == "segment" else None
    return data, replace(options, task=task, annotations=masks)  # type: ignore[arg-type]


@pytest.mark.parametrize("task", ["classify", "detect", "segment", "any"])
def test_parts_give_the_numbers_of_the_whole(tmp_path: Path, task: str) -> None:
    data, options = write_case(tmp_path, task)
    files = [tmp_path / name for name in FILES]
    whole = evaluate(files, data, options)
    together = Evaluation(files, data, options)
    total = whole.results[0].images
    for start, stop in ranges(total, 3, options.batch_size):
        part = Evaluation(files, data, options, taken=range(start, stop))
        part.run(with_noise=start == 0)
        np.savez(tmp_path / "part.npz", **part.kept())  # type: ignore[arg-type]
        with np.load(tmp_path / "part.npz") as kept:
            together.add_kept(dict(kept))
    report = together.report()
    assert report.to_dict() == whole.to_dict()
    assert report.noise_db == whole.noise_db
    assert 0 < (report.results[1].sqnr_db or 0) < 100
    assert total > options.batch_size * 3
    if task == "detect":
        assert report.results[0].measures["map"] > 0


def test_parts_are_whole_batches_and_the_first_has_enough_for_noise() -> None:
    for total, shards, batch in ((100, 3, 16), (100, 100, 1), (7, 3, 32), (10_000, 8, 32)):
        parts = ranges(total, shards, batch)
        assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
        assert parts[-1][1] == total
        assert all(start % batch == 0 for start, _ in parts)
        assert len(parts) <= shards
        assert parts[0][1] >= min(16, total)


@pytest.fixture
def case(tmp_path: Path) -> tuple[list[Path], Path, EvaluateOptions]:
    data, options = write_case(tmp_path, "classify")
    return [tmp_path / name for name in FILES], data, options


def records(store: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (store / "records").glob("*.json")}


def test_what_is_finished_is_not_run_again(
    case: tuple[list[Path], Path, EvaluateOptions], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files, data, options = case
    store = tmp_path / "store"
    shards = ShardOptions(shards=3, workers=0, store=str(store))
    whole = evaluate(files, data, options).to_dict()
    assert evaluate_in_shards(files, data, options, shards).to_dict() == whole
    first = records(store)
    assert len(first) == 3
    lost = min(first)
    (store / "records" / lost).unlink()
    with caplog.at_level(logging.INFO, logger="reptrt"):
        assert evaluate_in_shards(files, data, options, shards).to_dict() == whole
    assert "70 images in 3 parts, 2 of them finished before" in caplog.text
    after = records(store)
    assert after.keys() == first.keys()
    assert {name for name in first if after[name] != first[name]} == {lost}
    sample = replace(options, limit=40)
    found = evaluate_in_shards(files, data, sample, shards).to_dict()
    assert found == evaluate(files, data, sample).to_dict()


def test_what_differs_is_judged_anew(
    case: tuple[list[Path], Path, EvaluateOptions], tmp_path: Path
) -> None:
    files, data, options = case
    shards = ShardOptions(shards=2, workers=0, store=str(tmp_path / "store"))
    before = evaluate_in_shards(files, data, options, shards)
    write_net(files[1], with_noise(rep_net(1), 0.2))
    after = evaluate_in_shards(files, data, options, shards)
    assert after.to_dict() == evaluate(files, data, options).to_dict()
    assert (after.results[1].sqnr_db or 0) < (before.results[1].sqnr_db or 0) - 6


def test_outputs_that_are_not_finite_are_counted_over_all_parts(
    case: tuple[list[Path], Path, EvaluateOptions], tmp_path: Path
) -> None:
    files, data, options = case
    write_net(files[1], with_noise(rep_net(1), np.inf))
    shards = ShardOptions(shards=3, workers=0, store=str(tmp_path / "store"))
    with pytest.raises(ArtifactError, match="NaN or infinite outputs on 70 of 70 images"):
        evaluate_in_shards(files, data, options, shards)


def test_the_command_prints_the_same(
    case: tuple[list[Path], Path, EvaluateOptions], tmp_path: Path
) -> None:
    files, data, _ = case
    asked = ("eval", *files, "--data", data, "--reference", files[0], "--threads", 1)
    parts = ("--shards", 2, "--workers", 0, "--store", tmp_path / "store")
    whole, divided = (reptrt(*asked, *more, "--json", "-") for more in ((), parts))
    assert whole.exit_code == divided.exit_code == 0
    assert json.loads(whole.stdout) == json.loads(divided.stdout)


def test_options_of_parts_need_parts() -> None:
    with pytest.raises(ConfigError, match=r"workers=2: the images are not divided; give shards"):
        ShardOptions(workers=2)


class Killing(LocalProcesses):
    """Kills the worker of the first task with -9."""

    kills = 1

    def start(self, task: Task) -> None:
        super().start(task)
        if self.kills:
            self.kills -= 1
            (worker,) = self._busy
            os.kill(worker._process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills processes by a signal")
def test_a_killed_worker_changes_nothing(
    case: tuple[list[Path], Path, EvaluateOptions],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    files, data, options = case
    monkeypatch.setattr(sharded, "executor_of", lambda _: Killing(2, 1))
    shards = ShardOptions(shards=3, store=str(tmp_path / "store"))
    with caplog.at_level(logging.INFO, logger="reptrt"):
        found = evaluate_in_shards(files, data, options, shards)
    assert found.to_dict() == evaluate(files, data, options).to_dict()
    assert "images 0 to 24: killed by SIGKILL" in caplog.text
    assert len(records(tmp_path / "store")) == 3


@pytest.mark.slow
@needs_ray
def test_parts_run_on_ray(case: tuple[list[Path], Path, EvaluateOptions], tmp_path: Path) -> None:
    files, data, options = case
    shards = ShardOptions(shards=2, workers=2, ray="local", store=str(tmp_path / "store"))
    found = evaluate_in_shards(files, data, options, shards)
    assert found.to_dict() == evaluate(files, data, options).to_dict()
