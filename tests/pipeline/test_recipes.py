"""The learned recipes from the command line to the file that onnxruntime runs."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result

from reptrt.cli import main
from reptrt.core.errors import ConfigError, DataError, EngineError
from reptrt.data.dataset import open_dataset
from reptrt.execute.runner import OrtRunner
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import get_json, model_from_net, net_from_model, read_model
from reptrt.graph.preprocess import read_preprocess
from reptrt.graph.quantized import layer_weights
from reptrt.judge.evaluate import evaluate
from reptrt.judge.options import EvaluateOptions
from reptrt.pipeline import CalibrateOptions, calibrate
from reptrt.quantize.calib.options import ThresholdOptions
from reptrt.trt.input import read_buildable
from tests.support.helpers import ort_run
from tests.support.learned_nets import rep_net, write_images, write_net
from tests.support.onnx_nets import Builder

COUNT = 64
QUICK = CalibrateOptions(images=COUNT, recipe="balanced", iterations=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    write_net(folder / "m.onnx", rep_net())
    write_images(folder / "d.npz", COUNT)
    write_images(folder / "unseen.npz", 1000, seed=1)
    return folder


def ops(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


def unseen(folder: Path) -> np.ndarray:
    preprocess = read_preprocess(net_from_model(read_model(folder / "m.onnx")))
    (x,) = open_dataset(folder / "unseen.npz", preprocess).batches(1000)
    return x


def both(path: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits by onnxruntime as `eval` runs it, and by torch."""
    with OrtRunner(path, threads=1) as runner:
        by_ort = runner.run(x)["head"]
    with torch.inference_mode():
        by_torch = TorchGraph(net_from_model(read_model(path)))(torch.from_numpy(x)).numpy()
    return by_ort, by_torch


def compared(got: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Share of images with the same largest logit, and the relative difference.

    The net is not trained, so images with a tie are many; those within a twentieth do not count.
    """
    ordered = np.sort(wanted, axis=1)
    clear = ordered[:, -1] - ordered[:, -2] > 0.05 * wanted.std()
    assert clear.mean() > 0.8
    same = float((got.argmax(1) == wanted.argmax(1))[clear].mean())
    return same, float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


# The file ----------------------------------------------------------------------------------------

WRITTEN = {
    "balanced": QUICK,
    "no split": replace(QUICK, split="none"),
    "identity": replace(QUICK, split="identity"),
    "coarse-fine": replace(QUICK, split="coarse-fine"),
    "int8 summands": replace(QUICK, split="identity", split_precision="int8", equalize=False),
    "no full range": replace(QUICK, full_range=False),
    "kept": replace(QUICK, keep_affine=True),
    "kept beside splits": replace(QUICK, keep_affine=True, split="identity"),
    "nearest with affines": replace(QUICK, rounding="nearest"),
    "rounding alone": replace(QUICK, qprep=False),
    "fast with affines": replace(QUICK, recipe="fast", qprep=True, iterations=5),
    "six bits": replace(QUICK, weight_bits=6, activation_bits=6),
    "four-bit weights": replace(QUICK, weight_bits=4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_onnxruntime_and_torch_agree_on_what_was_written(
    name: str, folder: Path, tmp_path: Path
) -> None:
    options = WRITTEN[name]
    report = calibrate(folder / "m.onnx", folder / "d.npz", tmp_path / "o.onnx", options)
    x = unseen(folder)
    by_runner, by_torch = both(tmp_path / "o.onnx", x)
    agreement, difference = compared(by_runner, by_torch)
    # INT8 kernels round biases to the product of both steps, which is coarse where bits are few.
    assert agreement >= (0.99 if options.simulation else 0.999)
    assert difference < (0.02 if options.simulation else 5e-3)
    as_written = ort_run(onnx.load(str(tmp_path / "o.onnx")), {"x": x}, optimize=False)["head"]
    agreement, difference = compared(as_written, by_torch)
    assert agreement >= 0.999
    assert difference < 1e-3
    (result,) = evaluate(
        [tmp_path / "o.onnx"],
        folder / "unseen.npz",
        EvaluateOptions(reference=folder / "m.onnx", threads=1),
    ).results
    assert result.sqnr_db is not None
    assert result.sqnr_db > (12 if options.simulation or name == "int8 summands" else 20)
    assert report.learned is not None
    assert len(report.learned.units) == 5
    known = set(net_from_model(read_model(tmp_path / "o.onnx")).metadata)
    assert ("reptrt.affines" in known) == options.keep_affine
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.onnx", "o.onnx.json"]


@pytest.mark.slow
def test_kept_affines_compute_what_folded_ones_do(folder: Path, tmp_path: Path) -> None:
    for split, full_range in (("none", True), ("identity", True), ("coarse-fine", False)):
        options = replace(
            QUICK, iterations=20, rounding="nearest", split=split, full_range=full_range
        )
        paths = tmp_path / "folded.onnx", tmp_path / "kept.onnx"
        for path, keep in zip(paths, (False, True), strict=True):
            report = calibrate(
                folder / "m.onnx", folder / "d.npz", path, replace(options, keep_affine=keep)
            )
            assert any(unit.kept == "learned" for unit in report.learned.units)  # type: ignore
        assert ops(paths[1]) - ops(paths[0]) == Counter({"Mul": 5, "Add": 5})
        x = unseen(folder)
        (folded, folded_torch), (kept, kept_torch) = (both(path, x) for path in paths)
        # Full range makes biases of hundreds of steps: float rounding turns a code in thousands.
        for first, second in ((kept, kept_torch), (kept, folded), (kept_torch, folded_torch)):
            agreement, difference = compared(first, second)
            assert agreement >= 0.995
            assert difference < 5e-3
        net = net_from_model(read_model(paths[1]))
        tensors = net.graph.tensors()
        affines = get_json(net, "affines", dict) or {}
        assert set(affines) == {"stem", "block0", "block1", "block2", "head"}
        gains = [np.asarray(tensors[one["gain"]].values) for one in affines.values()]
        assert any((gain != 1).any() for gain in gains)


@pytest.mark.slow
def test_a_seed_is_the_result(folder: Path, tmp_path: Path) -> None:
    written = []
    for seed in (0, 0, 1):
        options = replace(QUICK, seed=seed, rounding="nearest", split="none")
        calibrate(folder / "m.onnx", folder / "d.npz", tmp_path / "o.onnx", options)
        written.append((tmp_path / "o.onnx").read_bytes())
    assert written[0] == written[1] != written[2]


@pytest.mark.slow
def test_each_recipe_beats_the_one_before_it_on_unseen_images(folder: Path, tmp_path: Path) -> None:
    base = CalibrateOptions(
        images=COUNT, weight_bits=6, split="none", threshold=ThresholdOptions("max")
    )
    recipes = {
        "nearest": replace(base, rounding="nearest"),
        "fast": base,
        "accurate": replace(base, recipe="accurate", iterations=80),
    }
    for name, options in recipes.items():
        calibrate(folder / "m.onnx", folder / "d.npz", tmp_path / f"{name}.onnx", options)
    paths = [tmp_path / f"{name}.onnx" for name in recipes]
    results = evaluate(
        paths, folder / "unseen.npz", EvaluateOptions(reference=folder / "m.onnx", threads=1)
    ).results
    found = [result.sqnr_db for result in results]
    nearest, fast, accurate = (value or 0.0 for value in found)
    assert fast > nearest + 3
    assert accurate > fast + 0.1


def test_six_bits_are_a_simulation_that_no_engine_runs(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.onnx"
    report = calibrate(folder / "m.onnx", folder / "d.npz", output, WRITTEN["six bits"])
    assert report.simulation == "6-bit weights, 6-bit activations inside INT8"
    net = net_from_model(read_model(output))
    assert net.metadata["reptrt.simulation"] == report.simulation
    weights = layer_weights(net)
    assert len(weights) == 5
    for name, weight in weights.items():
        assert weight.values.dtype == np.int8
        assert np.abs(weight.values).max() <= 31, name
    with pytest.raises(EngineError, match=r"o\.onnx: a simulation, no engine can run it \(6-bit"):
        read_buildable(output)
    result = reptrt("build-engine", output, "-o", tmp_path / "e.engine")
    assert result.exit_code == 1
    assert "a simulation, no engine can run it" in result.stderr
    assert not (tmp_path / "e.engine").exists()


def test_a_matmul_is_learned_too(tmp_path: Path) -> None:
    b = Builder()
    y = b.relu(b.conv(b.relu(b.conv("x", 6, "c1")), 6, "c2"))
    y = b.node("Flatten", [b.node("GlobalAveragePool", [y], "pool")], "flat")
    model = b.model(b.node("MatMul", [y, b.parameter("v", 6, 5)], "head"))
    write_net(tmp_path / "m.onnx", model)
    write_images(tmp_path / "d.npz", COUNT, size=8)
    report = calibrate(tmp_path / "m.onnx", tmp_path / "d.npz", tmp_path / "o.onnx", QUICK)
    assert [unit.unit for unit in report.learned.units] == [  # type: ignore[union-attr]
        "c1",
        "c2",
        "head",
    ]
    x = np.random.default_rng(0).random((20, 3, 8, 8), np.float32)
    got, wanted = both(tmp_path / "o.onnx", x)
    assert np.linalg.norm(got - wanted) < 0.02 * np.linalg.norm(wanted)


# Refused -----------------------------------------------------------------------------------------


def test_too_few_images_leave_nothing_behind(folder: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "few.npz", 15)
    with pytest.raises(DataError, match=r"few\.npz: 15 images, learned calibration needs 16"):
        calibrate(
            folder / "m.onnx", tmp_path / "few.npz", tmp_path / "o.onnx", replace(QUICK, images=15)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["few.npz"]


def test_affines_cannot_be_kept_where_nothing_is_learned() -> None:
    with pytest.raises(ConfigError, match="keep_affine: no gains and shifts are learned"):
        CalibrateOptions(keep_affine=True)


def test_what_recipes_learn() -> None:
    assert CalibrateOptions().learning is None
    for recipe in ("balanced", "accurate"):
        learning = CalibrateOptions(recipe=recipe, seed=3).learning  # type: ignore[arg-type]
        assert learning is not None
        assert (learning.rounding, learning.affine, learning.seed) == (True, True, 3)
        off = CalibrateOptions(recipe=recipe, rounding="nearest", qprep=False)  # type: ignore
        assert off.learning is None
    learning = CalibrateOptions(rounding="learned", memory_budget=0.5).learning
    assert learning is not None
    assert (learning.rounding, learning.affine) == (True, False)
    assert learning.memory_budget == 2**29
    learning = CalibrateOptions(recipe="accurate", rounding="nearest", iterations=7).learning
    assert learning is not None
    assert (learning.rounding, learning.affine, learning.iterations) == (False, True, 7)


# The command line --------------------------------------------------------------------------------


def reptrt(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


COST = (
    r"learning 5 units, 5 iterations of 32 images each, on 56 images \(8 held out\): about \d+ s; "
    r"activations in float32"
)
UNIT = (
    r"(\d) of 5  (.+)  error (\d+\.\d{3}) % -> (\d+\.\d{3}) %  (learned|corrected|start)  \d+\.\d s"
)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["balanced", "accurate"])
def test_the_cost_is_said_first(recipe: str, folder: Path, tmp_path: Path) -> None:
    command = ("calibrate", folder / "m.onnx", "--data", folder / "d.npz", "-n", COUNT)
    command += ("-o", tmp_path / "o.onnx", "--recipe", recipe, "--iterations", 5)
    done = reptrt(*command)
    assert done.exit_code == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(COST, line)
    assert re.search(r"learned +\d of 5 units are better on held-out images", done.stdout)

    done = reptrt("-v", *command, "--json", tmp_path / "r.json")
    lines = [line for line in done.stderr.splitlines() if " is not split: " not in line]
    assert re.fullmatch(COST, lines[0])
    units = [re.fullmatch(UNIT, line) for line in lines[1:]]
    assert all(units)
    learned = json.loads((tmp_path / "r.json").read_text())["learned"]
    assert learned["storage"] == "float32"
    assert learned["held_out"] == 8
    names = ["stem", "block0", "block1", "block2", "head"]
    assert [unit["unit"] for unit in learned["units"]] == names
    for i, (found, unit) in enumerate(zip(units, learned["units"], strict=True)):
        assert found is not None
        percent = [f"{100 * unit[key]:.3f}" for key in ("start", "learned")]
        assert list(found.groups()) == [str(i + 1), unit["unit"], *percent, unit["kept"]]
        assert unit.keys() == {
            "unit",
            "layers",
            "start",
            "learned",
            "kept",
            "changed_codes",
            "seconds",
        }


def test_the_fast_recipe_has_nothing_to_say(folder: Path, tmp_path: Path) -> None:
    command = ("calibrate", folder / "m.onnx", "--data", folder / "d.npz", "-n", COUNT)
    done = reptrt(*command, "-o", tmp_path / "o.onnx", "--json", tmp_path / "r.json")
    assert (done.exit_code, done.stderr) == (0, "")
    assert json.loads((tmp_path / "r.json").read_text())["learned"] is None


def test_options_of_learning(folder: Path, tmp_path: Path) -> None:
    command = ("calibrate", folder / "m.onnx", "--data", folder / "d.npz", "-n", COUNT)
    command += ("-o", tmp_path / "o.onnx", "--recipe", "balanced", "--iterations", 2)
    done = reptrt(*command, "--memory-budget", 1e-6, "--keep-affine", "--rounding", "nearest")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.strip().endswith("activations in disk")
    assert ops(tmp_path / "o.onnx")["Mul"] >= 5
    sidecar = json.loads((tmp_path / "o.onnx.json").read_text())["options"]
    assert (sidecar["keep_affine"], sidecar["rounding"]) == (True, "nearest")
    done = reptrt(*command, "--no-qprep")
    assert done.exit_code == 0, done.stderr
    assert ops(tmp_path / "o.onnx")["Mul"] == 0
    done = reptrt(*command, "--rounding", "nearest", "--no-qprep")
    assert (done.exit_code, done.stderr) == (0, "")
    assert model_from_net(net_from_model(read_model(tmp_path / "o.onnx")))
