"""Every rung on the same images: numbers against onnxruntime, torch and numpy done by hand."""

import json
import re
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from reptrt.core.errors import ArtifactError, DataError, EngineError, MissingDependencyError
from reptrt.data.dataset import Dataset, open_dataset
from reptrt.demo import digits
from reptrt.execute.runner import OrtRunner, Runner
from reptrt.execute.torch_runner import TorchRunner, float_activations, graph_runner
from reptrt.exporter.from_module import ExportSettings, onnx_from_module
from reptrt.graph.net import Net, model_from_net, net_from_model
from reptrt.graph.preprocess import Preprocess
from reptrt.graph.quantized import activation_scales, plan_from_net
from reptrt.judge.rungs import Step, measure
from reptrt.pipeline import CalibrateOptions, ExportOptions
from reptrt.rewrite.recentre import recentre
from reptrt.runs import ladder as ladder_module
from reptrt.runs.options import RunOptions
from reptrt.sources.source import Source, module_from_source
from reptrt.trt.driver import Gpu
from tests.support.full_range_nets import unsigned
from tests.support.helpers import ort_run
from tests.support.qdq_nets import images, quantized, residual_net
from tests.support.small_run import SIZE, make_run, refused, reptrt, write_data, write_factory

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
NET = [
    *("repvgg", "--weights", str(digits.WEIGHTS), "--input-size", "1x8x8"),
    *("--widths", "48,48,96,96", "--blocks", "6,3,1", "--strides", "1,1,2,2"),
    *("--mean", "0.306", "--std", "0.376"),
]


def rows_of(*arguments: object) -> list[dict[str, Any]]:
    result = reptrt("ladder", *arguments, "--json", "-")
    assert result.exit_code == 0, result.output
    return list(json.loads(result.stdout)["rungs"])


def sqnr(reference: np.ndarray, output: np.ndarray) -> float:
    noise = np.square(reference.astype(float) - output).sum()
    return float(10 * np.log10(np.square(reference.astype(float)).sum() / noise))


# Measuring ---------------------------------------------------------------------------------------


def dataset(folder: Path, number: int, labels: np.ndarray | None) -> Dataset:
    x = np.zeros((number, 1, 2, 2), dtype=np.uint8)
    x[:, 0, 0, 0] = np.arange(number)  # which image it is
    arrays = {"x": x} if labels is None else {"x": x, "y": labels}
    np.savez(folder / "d.npz", **arrays)
    return open_dataset(folder / "d.npz", Preprocess.plain(1, 2, 2))


def table_of(outputs: np.ndarray) -> Runner:
    """A runner that looks its outputs up by the number in the first pixel."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(outputs)[(x[:, 0, 0, 0] * 255).round().long()]

    return TorchRunner("table", forward, CPU)


def steps_of(*tables: np.ndarray) -> list[Step]:
    return [Step(str(i), "numpy", lambda t=table: table_of(t)) for i, table in enumerate(tables)]


def test_distances_are_those_of_numpy(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 100)
    tables = [rng.normal(size=(100, 5)).astype(np.float32)]
    for noise in (0.5, 0.1):
        tables.append(tables[-1] + rng.normal(0, noise, (100, 5)).astype(np.float32))
    found = measure(steps_of(*tables), dataset(tmp_path, 100, labels))
    assert found.images == 100
    assert found.largest_output == np.abs(tables[0]).max()
    top1 = [float((table.argmax(1) == labels).mean()) for table in tables]
    assert [rung.top1 for rung in found.rungs] == top1
    assert found.rungs[0].from_first is found.rungs[0].from_before is None
    for index in (1, 2):
        rung = found.rungs[index]
        for distance, other in ((rung.from_first, 0), (rung.from_before, index - 1)):
            assert distance is not None
            same = (tables[index].argmax(1) == tables[other].argmax(1)).mean()
            assert distance.agreement == same
            assert distance.top1_change == top1[index] - top1[other]
            assert distance.sqnr_db == pytest.approx(sqnr(tables[other], tables[index]))
            largest = np.abs(tables[index].astype(float) - tables[other]).max()
            assert distance.max_difference == largest


def test_every_output_counts_in_its_own_unit(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(20, 5)).astype(np.float32)
    tables = [
        {"boxes": 1e3 * values, "scores": values},
        {"boxes": 1e3 * values, "scores": 1.1 * values},
    ]

    def opened(table: dict[str, np.ndarray]) -> Runner:
        def forward(x: torch.Tensor) -> dict[str, torch.Tensor]:
            rows = (x[:, 0, 0, 0] * 255).round().long()
            return {name: torch.from_numpy(value)[rows] for name, value in table.items()}

        return TorchRunner("table", forward, CPU)

    steps = [Step(str(i), "numpy", lambda t=table: opened(t)) for i, table in enumerate(tables)]
    distance = measure(steps, dataset(tmp_path, 20, None)).rungs[1].from_first
    assert distance is not None
    assert distance.max_difference == 0  # of the first output
    assert distance.sqnr_db == pytest.approx(20 + 10 * np.log10(2), abs=0.01)


def test_equal_outputs_have_no_sqnr(tmp_path: Path) -> None:
    table = np.eye(4, dtype=np.float32)
    found = measure(steps_of(table, table), dataset(tmp_path, 4, None))
    distance = found.rungs[1].from_first
    assert distance is not None
    assert (distance.sqnr_db, distance.max_difference, distance.agreement) == (None, 0, 1)
    assert (distance.top1_change, found.rungs[1].top1) == (None, None)
    json.dumps(found.to_dict(), allow_nan=False)


def test_maps_have_no_top1(tmp_path: Path) -> None:
    maps = np.random.default_rng(0).normal(size=(4, 3, 2, 2)).astype(np.float32)
    found = measure(steps_of(maps, maps + 1), dataset(tmp_path, 4, np.arange(4) % 3))
    distance = found.rungs[1].from_first
    assert distance is not None
    assert (found.rungs[1].top1, distance.agreement) == (None, None)
    assert distance.max_difference == pytest.approx(1)


@pytest.mark.parametrize(
    ("error", "may_fail"),
    [(EngineError("no GPU"), True), (MissingDependencyError("no pycuda"), True)],
    ids=["gpu", "package"],
)
def test_a_rung_that_may_fail_says_why(tmp_path: Path, error: Exception, may_fail: bool) -> None:
    def fail() -> Runner:
        raise error

    steps = [*steps_of(np.eye(4, dtype=np.float32)), Step("engine", "tensorrt", fail, may_fail)]
    found = measure(steps, dataset(tmp_path, 4, None))
    assert found.rungs[1].not_run == str(error)
    assert found.to_lines() == [f"engine: not run: {error}"]
    with pytest.raises(type(error)):
        measure([steps[0], steps[1]._replace(may_fail=False)], dataset(tmp_path, 4, None))


def test_outputs_that_cannot_be_compared(tmp_path: Path) -> None:
    table = np.eye(4, dtype=np.float32)
    broken = table.copy()
    broken[1, 2] = np.nan
    with pytest.raises(ArtifactError, match="1 in numpy: NaN or infinite outputs on 1 of 4 images"):
        measure(steps_of(table, broken), dataset(tmp_path, 4, None))
    with pytest.raises(ArtifactError, match=r"output output has shape \(4, 3\), .* \(4, 4"):
        measure(steps_of(table, table[:, :3]), dataset(tmp_path, 4, None))
    with pytest.raises(DataError, match="label 4 in the data, but the net has 4 classes"):
        measure(steps_of(table), dataset(tmp_path, 4, np.arange(4) + 1))


def test_outputs_of_three_rungs_are_kept_at_most(tmp_path: Path) -> None:
    data = dataset(tmp_path, 200, None)
    table = np.random.default_rng(0).normal(size=(200, 5000)).astype(np.float32)  # 4 MB
    peaks = []
    for count in (4, 16):
        steps = steps_of(*[table] * count)
        tracemalloc.start()
        measure(steps, data)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + table.nbytes


# Forms -------------------------------------------------------------------------------------------


def without_activation_pairs(model: onnx.ModelProto) -> onnx.ModelProto:
    """The float graph with the weights that the codes stand for, made with onnx alone."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    names = {node.name for node in model.graph.node}
    renamed: dict[str, str] = {}
    kept, weights = [], {}
    for node in changed.graph.node:
        simulates = node.op_type == "Clip" and f"{node.name[:-5]}.quantize" in names
        if node.op_type == "DequantizeLinear" and node.input[0] in values:
            axis = node.attribute[0].i
            shape = [1] * values[node.input[0]].ndim
            shape[axis] = -1
            scale = values[node.input[1]].reshape(shape)
            weights[node.output[0]] = values[node.input[0]].astype(np.float32) * scale
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear") or simulates:
            renamed[node.output[0]] = renamed.get(node.input[0], node.input[0])
        else:
            kept.append(node)
    for node in kept:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del changed.graph.node[:], changed.graph.value_info[:]
    changed.graph.node.extend(copies)
    changed.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in weights.items())
    return changed


@pytest.mark.parametrize("bits", [8, 5])
def test_weights_alone_are_those_of_a_graph_without_pairs(bits: int) -> None:
    x = images(6)
    model = quantized(residual_net(), x, bits)
    expected = ort_run(without_activation_pairs(model), {"x": x}, optimize=False)
    net = net_from_model(model)
    with graph_runner(net, CPU, float_activations(net)) as runner:
        (found,) = runner.run(x).values()
    (output,) = expected.values()
    np.testing.assert_allclose(found, output, rtol=1e-4, atol=1e-5)
    with graph_runner(net, CPU) as runner:
        (whole,) = runner.run(x).values()
    assert np.abs(whole - output).max() > 1e-2 * np.abs(output).max()  # pairs do something


def num_relus(net: Net) -> int:
    return sum(node.op == "Relu" for node in net.graph.nodes)


@pytest.mark.parametrize("bits", [8, 5])
def test_weights_alone_keep_the_relu_that_a_pair_stands_in_for(bits: int) -> None:
    x = images(6)
    net, wanted = unsigned(net_from_model(residual_net()), x, bits=bits, exact=False)
    (expected,) = ort_run(
        without_activation_pairs(model_from_net(net.copy())), {"x": x}, optimize=False
    ).values()
    pairs, relus = set(activation_scales(net)), num_relus(net)
    recentre(net, plan_from_net(net))
    assert num_relus(net) == relus - len(wanted) < relus - 5
    assert set(activation_scales(net)) == pairs
    with graph_runner(net, CPU, float_activations(net)) as runner:
        (found,) = runner.run(x).values()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_module_may_return_any_containers() -> None:
    x = np.ones((2, 1, 2, 2), dtype=np.float32)
    runner = TorchRunner("torch", lambda x: [(x.half() * 2, x), {"boxes": x}], CPU)
    with runner:
        outputs = runner.run(x)
    assert list(outputs) == list(runner.output_names) == ["output", "output_1", "boxes"]
    assert {value.dtype for value in outputs.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(outputs["output"], 2 * x)
    with pytest.raises(ValueError, match="closed"):
        runner.run(x)


# The command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of digits and a run of the demo's net."""
    folder = tmp_path_factory.mktemp("made")
    digits.write_arrays(folder)
    result = reptrt(
        "run", *NET, "--data", folder / "train.npz", "--eval-data", folder / "held_out.npz",
        "--recipe", "fast", "--rounding", "nearest", "-n", 128, "--eval-limit", 300,
        "--batch", 1, "--bench-seconds", 0.01,
        "-o", folder / "run",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def rungs(made: Path) -> list[dict[str, Any]]:
    return rows_of(made / "run")


def by_name(rungs: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(rung["name"].partition(" (")[0], rung["runs_in"]): rung for rung in rungs}


def test_the_rungs_of_a_checkpoint(rungs: list[dict[str, Any]], made: Path) -> None:
    names = [(rung["name"].partition(" (")[0], rung["runs_in"]) for rung in rungs]
    assert names == [
        ("train-form", "torch"),
        ("fused", "torch graph"),
        ("fused", "onnxruntime"),
        ("equalized", "onnxruntime"),
        ("identity split", "onnxruntime"),
        ("coarse-fine split", "onnxruntime"),
        ("INT8 weights", "torch graph"),
        ("INT8", "torch graph"),
        ("INT8", "onnxruntime"),
        ("engine", "tensorrt"),
    ]
    splits = json.loads((made / "run/int8.onnx.json").read_text())["details"]["splits"]
    forms = [split["form"].partition("-")[0] for split in splits]
    for name, form in (("identity split", "identity"), ("coarse-fine split", "coarse")):
        (rung,) = (rung for rung in rungs if rung["name"].startswith(name))
        number = forms.count(form)
        assert rung["name"] == f"{name} ({number} layer{'s' * (number > 1)})"


def test_float_rungs_lose_nothing_and_int8_is_what_eval_says(
    rungs: list[dict[str, Any]], made: Path
) -> None:
    for rung in rungs[1:6]:
        assert rung["from_first"]["sqnr_db"] > 100, rung
        assert rung["from_before"]["sqnr_db"] > 100, rung
    judged = json.loads((made / "run/eval.json").read_text())["results"]
    found = by_name(rungs)
    assert found["fused", "onnxruntime"]["top1"] == judged[0]["top1"]
    int8 = found["INT8", "onnxruntime"]
    assert int8["top1"] == judged[1]["top1"]
    assert int8["from_first"]["agreement"] == judged[1]["agreement"]
    assert int8["from_first"]["sqnr_db"] == pytest.approx(judged[1]["sqnr_db"], abs=1e-3)
    assert int8["from_before"]["max_difference"] == 0  # torch's codes are onnxruntime's
    weights, both = found["INT8 weights", "torch graph"], found["INT8", "torch graph"]
    assert weights["from_first"]["sqnr_db"] > both["from_first"]["sqnr_db"]
    assert both["from_before"]["sqnr_db"] > both["from_first"]["sqnr_db"]


def test_the_first_rung_is_the_checkpoint_in_torch(rungs: list[dict[str, Any]], made: Path) -> None:
    with np.load(made / "held_out.npz") as arrays:
        x, y = arrays["x"], arrays["y"]
    taken = np.sort(np.random.default_rng(0).permutation(len(x))[:300])
    pixels = (x[taken] / np.float32(255) - np.float32(0.306)) / np.float32(0.376)
    architecture = replace(digits.ARCHITECTURE, in_channels=1)
    module = module_from_source(Source("repvgg", digits.WEIGHTS, architecture))
    with torch.inference_mode():
        logits = module(torch.from_numpy(pixels)).numpy()
    assert rungs[0]["top1"] == (logits.argmax(1) == y[taken]).mean()
    (fused,) = ort_run(onnx.load(made / "run/float.onnx"), {"input": pixels}).values()
    largest = np.abs(fused.astype(float) - logits).max()
    assert rungs[2]["from_first"]["max_difference"] == pytest.approx(largest, rel=0.5)


def test_a_source_gives_what_its_run_gives(rungs: list[dict[str, Any]], made: Path) -> None:
    found = rows_of(
        *NET, "--data", made / "held_out.npz", "--calib-data", made / "train.npz", "-n", 128,
        "--recipe", "fast", "--rounding", "nearest", "--limit", 300,
    )  # fmt: skip
    assert found == rungs


@pytest.mark.skipif(not hasattr(CalibrateOptions, "learning"), reason="nothing is learned yet")
def test_learning_is_a_step_of_its_own(made: Path) -> None:
    source = Source("repvgg", digits.WEIGHTS, digits.ARCHITECTURE)
    exporting = ExportOptions(digits.INPUT_SIZE, digits.MEAN, digits.STD)
    learned, nearest = (
        ladder_module.ladder(
            source,
            made / "held_out.npz",
            made / "train.npz",
            RunOptions(exporting, CalibrateOptions(images=32, **recipe), eval_limit=100),
        ).rungs
        for recipe in ({"recipe": "balanced", "iterations": 2}, {"recipe": "fast"})
    )
    assert [(rung.name, rung.runs_in) for rung in learned[-5:-1]] == [
        ("INT8 weights, gptq", "torch graph"),
        ("INT8, gptq", "torch graph"),
        ("INT8, learned", "torch graph"),
        ("INT8, learned", "onnxruntime"),
    ]
    assert [rung.from_first for rung in learned[-5:-3]] == [
        rung.from_first for rung in nearest[-4:-2]
    ]
    assert learned[-3].from_before != learned[-3].from_first
    assert learned[-3].from_first != nearest[-3].from_first


def test_no_rewrite_no_rung(made: Path) -> None:
    found = rows_of(
        *NET, "--data", made / "held_out.npz", "--calib-data", made / "train.npz", "-n", 16,
        "--recipe", "fast", "--limit", 50, "--split", "none", "--no-equalize",
        "--no-full-range", "--no-correct-bias",
        "--activation-bits", 6,
    )  # fmt: skip
    assert [rung["name"] for rung in found[2:]] == [
        "fused",
        "W8A6 weights",
        "W8A6",
        "W8A6",
        "engine",
    ]


def test_an_onnx_file_is_its_own_first_rung(tmp_path: Path) -> None:
    source, data = write_factory(tmp_path), write_data(tmp_path / "data.npz")
    module = module_from_source(Source(source))
    path = str(tmp_path / "train.onnx")
    onnx.save(onnx_from_module(module, Preprocess.plain(1, 8, 8), ExportSettings()), path)
    num_convs = [node.op_type for node in onnx.load(path).graph.node].count("Conv")
    found = rows_of(path, "--data", data, "--calib-data", data, "-n", 32)
    assert num_convs == 5  # train-form: the branches are there
    assert (found[0]["name"], found[0]["runs_in"]) == ("source", "onnxruntime")
    assert found[1]["from_first"]["sqnr_db"] > 100


def test_the_table_for_people(made: Path) -> None:
    result = reptrt("ladder", made / "run", "--limit", 100)
    assert result.exit_code == 0, result.output
    header, *lines = result.stdout.splitlines()
    assert re.findall(r"\S+(?: \S+)*", header)[:4] == ["rung", "runs in", "top-1", "agreement"]
    assert re.match(r"train-form +torch +\d+\.\d\d % +- +- +- +- +- +- +-", lines[0])
    number = r"-?\d+\.\d\d"
    assert re.match(
        rf"INT8 +onnxruntime +{number} % +{number} % +{number} +\S+ +[+-]\d\.\d\d +{number} % ",
        lines[8],
    )
    assert any(line.startswith("100 images; outputs up to ") for line in lines)


def test_the_engine_is_the_last_rung_where_there_is_a_gpu(
    made: Path, rungs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []

    def build(model: Path, output: Path, options: object) -> None:
        built.append(shutil.copy(model, output))

    def open_any(path: Path, **options: Any) -> Runner:
        return OrtRunner(path.read_bytes() if path in built else path, **options)

    monkeypatch.setattr(ladder_module.driver, "find_gpu", lambda: Gpu("GPU", "sm89", (12, 8)))
    monkeypatch.setattr(ladder_module, "build_engine", build)
    monkeypatch.setattr(ladder_module, "open_runner", open_any)
    copied = shutil.copytree(made / "run", made / "without engine")
    record = json.loads((copied / "run.json").read_text())
    record["stages"].pop("build-engine", None)
    (copied / "run.json").write_text(json.dumps(record))
    found = rows_of(copied)
    assert found[:-1] == rungs[:-1]
    assert found[-1]["not_run"] is None
    assert found[-1]["from_before"]["max_difference"] == 0
    assert found[-1]["from_first"] == found[-2]["from_first"]


def test_without_a_gpu_the_reason_is_said(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder_module.driver, "find_gpu", lambda: "no NVIDIA driver here")
    result = reptrt("ladder", made / "run", "--limit", 20)
    assert result.stdout.splitlines()[-1] == "engine: not run: no NVIDIA driver here"


def test_a_factory_that_draws_anew_is_refused(tmp_path: Path) -> None:
    source = write_factory(tmp_path, seeded=False, name="unseeded")
    data = write_data(tmp_path / "data.npz")
    line = refused("ladder", source, *SIZE, "--data", data, "--calib-data", data, "-n", 8)
    assert "makes other weights at each call (first 0.weight)" in line
    assert "--weights" in line


def test_what_a_run_has_cannot_be_given_again(made: Path) -> None:
    for option in (("--split", "none"), ("--calib-data", made), ("-n", 512)):
        result = reptrt("ladder", made / "run", *option)
        assert result.exit_code == 2
        assert f"{option[0]}: {made / 'run'} is a run, its options are recorded" in result.stderr
    result = reptrt("ladder", "repvgg", "--data", made / "train.npz")
    assert result.exit_code == 2
    assert "SOURCE needs --data and --calib-data" in result.stderr


def test_a_run_that_cannot_be_climbed_is_one_line(tmp_path: Path) -> None:
    source, data = write_factory(tmp_path), write_data(tmp_path / "data.npz")
    run = make_run(source, data, tmp_path / "run")
    (tmp_path / "empty").mkdir()
    assert "it has no run.json" in refused("ladder", tmp_path / "empty")
    int8 = (run / "int8.onnx").read_bytes()
    (run / "int8.onnx").write_bytes(b"changed")
    assert "int8.onnx: was changed after the run" in refused("ladder", run)
    (run / "int8.onnx").write_bytes(int8)
    assert rows_of(run, "--data", data, "--limit", 8)[0]["name"] == "train-form"
    write_factory(tmp_path, seeded=False)
    assert "net_of_a_small_run.py: has changed since the run" in refused("ladder", run)
