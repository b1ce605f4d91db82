"""Measured costs of splits: the models, the choice and the cache, with an injected timer."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from reptrt.core.artifacts import read_sidecar
from reptrt.core.errors import ConfigError
from reptrt.core.grid import Grid
from reptrt.execute.timing import time_models
from reptrt.graph.net import net_from_model, weighted_nodes
from reptrt.pipeline import CalibrateOptions, calibrate, measuring
from reptrt.pipeline.measuring import measured_costs
from reptrt.quantize.choose import ChooseOptions, choose
from reptrt.quantize.choose.cost import layer_macs
from reptrt.quantize.targets.timings import Timings, cache_folder
from tests.quantize.test_choose_budget import Measured, rep_chain
from tests.support.helpers import ort_run
from tests.support.learned_nets import rep_net, write_images, write_net
from tests.support.qdq_nets import images

MEASURE = CalibrateOptions(images=16, target="onnxruntime", measure=True)
NET = net_from_model(onnx.shape_inference.infer_shapes(rep_net(2)))
LAYERS = [node.name for node in weighted_nodes(NET.graph)]


class Clock:
    """Says that a run takes 1 s for the call, 10 s for a whole layer and more for its sum."""

    def __init__(self, extra: float) -> None:
        self.extra, self.timed = extra, list[Sequence[onnx.ModelProto]]()

    def __call__(
        self, models: Sequence[onnx.ModelProto], inputs: Sequence[np.ndarray]
    ) -> list[float]:
        self.timed.append(models)
        sums = [any(node.op_type == "Add" for node in model.graph.node) for model in models[1:]]
        return [1.0, *(11.0 + self.extra * has_sum for has_sum in sums)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    return cache_folder() / "timings.json"


def clock(monkeypatch: pytest.MonkeyPatch, extra: float) -> Clock:
    made = Clock(extra)
    monkeypatch.setattr(measuring, "time_models", made)
    return made


def test_a_split_costs_the_share_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 s each for the stem and two blocks; a sum takes 2 s."""
    clock(monkeypatch, 2.0)
    costs = measured_costs(NET, LAYERS, MEASURE)
    convolutions = [node for node in weighted_nodes(NET.graph) if node.op == "Conv"]
    rate = sum(map(layer_macs, convolutions)) / 30
    assert set(costs.of_splits) == {"block0", "block1"}
    for of in costs.of_splits.values():
        assert of == {"identity-scalar": pytest.approx(2 * rate)}
    assert costs.source.startswith("measured: onnxruntime")


def test_layers_of_one_shape_are_timed_once_and_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    timer = clock(monkeypatch, 2.0)
    with caplog.at_level(logging.INFO, logger="reptrt"):
        first = measured_costs(NET, LAYERS, MEASURE)
        assert len(timer.timed) == 2  # the stem; both blocks
        assert measured_costs(NET, LAYERS, MEASURE) == first
    assert len(timer.timed) == 2
    assert "3 layers have 2 shapes; 2 were timed in onnxruntime, 0 are known" in caplog.text
    assert "0 were timed in onnxruntime, 2 are known from before" in caplog.text


def test_another_version_or_machine_is_timed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = clock(monkeypatch, 2.0)
    measured_costs(NET, LAYERS, MEASURE)
    for name in ("ort_version", "cpu_name"):
        monkeypatch.setattr(measuring, name, lambda: "another")
        before = len(timer.timed)
        measured_costs(NET, LAYERS, MEASURE)
        assert len(timer.timed) == before + 2


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": 1, "timings": {"k": 3}}', '{"format": 1}']
)
def test_a_cache_that_cannot_be_used_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cache: Path, content: str
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    timer = clock(monkeypatch, 2.0)
    measured_costs(NET, LAYERS, MEASURE)
    assert len(timer.timed) == 2
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "layers are timed anew" in lines[0]
    assert not any("\n" in line for line in lines)
    assert len(json.loads(cache.read_text())["timings"]) == 2


def test_who_writes_at_a_time_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "timings.json"

    def add(number: int) -> None:
        for index in range(5):
            Timings(path).add({f"{number}.{index}": {"none": float(number)}})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    assert set(Timings(path).read()) == {f"{n}.{i}" for n in range(4) for i in range(5)}


def test_a_cache_that_cannot_be_written_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cache: Path
) -> None:
    cache.parent.parent.mkdir(parents=True, exist_ok=True)
    cache.parent.write_text("a file where the folder should be")
    clock(monkeypatch, 2.0)
    assert measured_costs(NET, LAYERS, MEASURE).of_splits
    assert "timings are not kept" in caplog.text


def test_the_models_are_int8_kernels_from_codes_to_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = clock(monkeypatch, 2.0)
    measured_costs(NET, ["block0"], MEASURE)
    (_, whole, split), rng = timer.timed[0], np.random.default_rng(0)
    codes = rng.integers(0, 256, (1, 8, 6, 6), dtype=np.uint8)
    for model, sums in ((whole, 0), (split, 1)):
        onnx.checker.check_model(model, full_check=True)
        kinds = Counter(node.op_type for node in model.graph.node)
        assert (kinds["Conv"], kinds["Relu"], kinds["Add"]) == (1, 1, sums)
        assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
        (result,) = ort_run(model, {model.graph.input[0].name: codes}).values()
        assert result.dtype == np.uint8
        assert result.shape == codes.shape
        assert result.max() > 0
    assert len(time_models([whole, split], [codes, codes])) == 2


def test_the_choice_counts_with_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits that cost nothing are taken within any budget, dear ones are not."""
    net = Measured(rep_chain(), images(32, size=9))
    number = {}
    for extra in (0.0, 8.0):
        clock(monkeypatch, extra)
        monkeypatch.setattr(measuring, "cpu_name", lambda extra=extra: f"takes {extra}")
        costs = measured_costs(net.net, net.stats, MEASURE)
        options = ChooseOptions(Grid.activation(8), Grid.weight(8), 0.01, "identity", "int8")
        choice = choose(net.net, net.stats, replace(options, costs=costs))
        number[extra] = sum(decision.form != "none" for decision in choice.splits)
    assert number[0.0] > number[8.0] == 0


def test_the_report_and_the_sidecar_have_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two sums of 3 s each, of layers that take 10 s each and have nearly all of the work."""
    clock(monkeypatch, 3.0)
    model = write_net(tmp_path / "m.onnx", rep_net(2))
    data = write_images(tmp_path / "x.npz", 16)
    options = replace(MEASURE, split="identity")
    report = calibrate(model, data, tmp_path / "o.onnx", options)
    assert len(report.splits) == 2
    assert report.overhead == pytest.approx(2 * 3 / 30, rel=0.01)
    sidecar = read_sidecar(tmp_path / "o.onnx")
    assert sidecar is not None
    assert set(sidecar.details["costs"]["of_splits"]) == {"block0", "block1"}


def test_layers_are_not_timed_for_tensorrt() -> None:
    with pytest.raises(ConfigError, match=r"measure=True: .*gpu_check\.py .* costs"):
        CalibrateOptions(measure=True)
