"""Learned calibration on tiny nets: better than nearest, never worse; each part on its own."""

import json
import logging
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch

from reptrt.core.errors import CalibrationError, DataError, ReptrtError
from reptrt.core.grid import Grid
from reptrt.data.dataset import open_dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import (
    Net,
    bytes_from_model,
    constant_of,
    model_from_net,
    net_from_model,
    producer_of,
)
from reptrt.graph.splits import read_splits
from reptrt.pipeline import CalibrateOptions, calibrate
from reptrt.quantize.reconstruct import adam, attempt, cache, driver
from reptrt.quantize.reconstruct.cache import Store
from reptrt.quantize.reconstruct.learn import Task, learn
from reptrt.quantize.reconstruct.loss import relative_error
from reptrt.quantize.reconstruct.options import LearnOptions, ReconstructReport
from reptrt.quantize.reconstruct.state import State
from reptrt.rewrite.split_coarse_fine import split_coarse_fine
from reptrt.rewrite.split_identity import split_identity
from tests.quantize.test_bias import matmul_net
from tests.quantize.test_units import neck, tail_without_layer
from tests.support.helpers import ort_run
from tests.support.learned_nets import Case, nearest, rep_net, write_images, write_net
from tests.support.onnx_nets import basic_block
from tests.support.qdq_nets import residual_net

QUICK = LearnOptions(iterations=6, batch=16)
ENOUGH = LearnOptions(iterations=60)
COUNT = 96


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "d.npz", COUNT)


@pytest.fixture(scope="module")
def case(data: Path) -> Case:
    return nearest(rep_net(), data, weight_bits=6)


@pytest.fixture(scope="module")
def unseen(case: Case, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    path = write_images(tmp_path_factory.mktemp("unseen") / "d.npz", 300, seed=1)
    (x,) = open_dataset(path, case.data.preprocess).batches(300)
    return x


@pytest.fixture(scope="module")
def learned(case: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, ReconstructReport]:
    return case.learn(tmp_path_factory.mktemp("learned"), ENOUGH)


def codes_of(net: Net) -> dict[str, np.ndarray]:
    """Return node -> codes of every quantized weight."""
    return {node: codes for node, (codes, _) in weights_of(net).items()}


def weights_of(net: Net) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found = {}
    for node in net.graph.nodes:
        if node.op in ("Conv", "Gemm", "MatMul") and not isinstance(node.inputs[1], gs.Constant):
            inputs = producer_of(node.inputs[1]).inputs
            found[node.name] = (constant_of(inputs[0]), constant_of(inputs[1]))
    return found


def biases_of(net: Net) -> dict[str, np.ndarray]:
    layers = [node for node in net.graph.nodes if node.op in ("Conv", "Gemm")]
    return {node.name: constant_of(node.inputs[2]) for node in layers if len(node.inputs) > 2}


def steps_of(net: Net) -> dict[str, float]:
    nodes = [node for node in net.graph.nodes if node.op == "QuantizeLinear"]
    return {node.name: float(constant_of(node.inputs[1])) for node in nodes}


# What it is for ----------------------------------------------------------------------------------


def test_learned_is_better_on_images_nobody_saw(
    case: Case, learned: tuple[Net, ReconstructReport], unseen: np.ndarray
) -> None:
    """Seeds gain 7 to 9 dB here."""
    net, report = learned
    assert case.sqnr(net, unseen) > case.sqnr(case.net, unseen) + 5
    assert sum(unit.kept == "learned" for unit in report.units) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("part", ["rounding", "affine"])
def test_rounding_and_affines_help_each_alone(
    case: Case, part: str, unseen: np.ndarray, tmp_path: Path
) -> None:
    chosen = {name: name == part for name in ("rounding", "affine", "steps")}
    net, _ = case.learn(tmp_path, replace(ENOUGH, **chosen))
    assert case.sqnr(net, unseen) > case.sqnr(case.net, unseen) + 3


def test_codes_stay_floors_or_ceilings_of_the_float_weight(
    case: Case, learned: tuple[Net, ReconstructReport]
) -> None:
    net, report = learned
    before, after, changed = weights_of(case.net), codes_of(net), {}
    floats = {node.name: node for node in case.reference.graph.nodes}
    for name, (codes, scale) in before.items():
        exact = constant_of(floats[name].inputs[1]) / scale.reshape(-1, *[1] * (codes.ndim - 1))
        assert (np.abs(after[name] - exact) < 1).all()
        assert np.abs(after[name]).max() <= 31
        changed[name] = int((after[name] != codes).sum())
    for unit in report.units[:-1]:
        assert unit.changed_codes == sum(changed[layer] for layer in unit.layers)
    assert sum(changed.values()) > 20


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 6])
def test_the_report_is_what_onnxruntime_finds(
    bits: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of the whole net, as it was written, on the held-out images."""
    case = nearest(rep_net(), data, weight_bits=6, bits=bits)
    seen = watch(monkeypatch)
    net, report = case.learn(tmp_path, ENOUGH)
    last = report.units[-1]
    assert (last.unit, last.layers) == ("head", ("head",))
    (x,) = case.data.batches(COUNT)
    x = x[sorted(seen.held)]
    wanted, got = (
        next(iter(ort_run(model, {"x": x}, optimize=False).values()))
        for model in (case.model, model_from_net(net))
    )
    error = np.abs(got - wanted).mean() / np.abs(wanted).mean()
    kept = last.learned if last.kept == "learned" else last.start
    assert kept == pytest.approx(error, rel=1e-3)
    assert report.held_out == len(seen.held)


# The held-out part -------------------------------------------------------------------------------


class Seen:
    """The images that units were learned from, and those that judged them."""

    def __init__(self) -> None:
        self.learned: set[int] = set()
        self.held: set[int] = set()
        self.names: list[str] = []
        self.learning = False


def watch(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Task, State], State] | None = None
) -> Seen:
    seen = Seen()

    def watched_learn(task: Task, *arguments: object) -> State:
        seen.learning = True
        seen.names.append(task.name)
        found = learn(task, *arguments)  # type: ignore[arg-type]
        seen.learning = False
        return found if spoil is None else spoil(task, found)

    def watched_task(**fields: object) -> Task:
        task = Task(**fields)  # type: ignore[arg-type]

        def inputs(picked: torch.Tensor) -> object:
            (seen.learned if seen.learning else seen.held).update(picked.tolist())
            return task.inputs(picked)

        return replace(task, inputs=inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(attempt, "learn", watched_learn)
    monkeypatch.setattr(driver, "Task", watched_task)
    return seen


def test_held_out_images_are_never_learned_from(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch(monkeypatch)
    _, report = case.learn(tmp_path, QUICK)
    assert seen.names == ["stem", "block0", "block1", "block2", "head"]
    assert report.held_out == len(seen.held) == COUNT // 8
    assert not seen.held & seen.learned
    assert len(seen.learned) > COUNT // 2


def spoil_block1(task: Task, found: State) -> State:
    if task.name != "block1":
        return found
    return replace(found, codes={node: -codes for node, codes in found.codes.items()})


def test_a_unit_that_got_worse_keeps_nearest(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(monkeypatch, spoil_block1)
    net, report = case.learn(tmp_path, replace(ENOUGH, iterations=25))
    spoiled = next(unit for unit in report.units if unit.unit == "block1")
    assert (spoiled.kept, spoiled.changed_codes) == ("start", 0)
    assert spoiled.learned > 10 * spoiled.start
    np.testing.assert_array_equal(codes_of(net)["block1"], codes_of(case.net)["block1"])
    assert any(unit.kept == "learned" for unit in report.units)
    for unit in report.units:
        assert unit.kept == ("learned" if unit.learned < unit.start else "start")


def worse(task: Task, found: State) -> State:
    """Return values that are far worse than what was learned."""
    return State(
        {node: -codes for node, codes in found.codes.items()},
        {layer: 3.0 * gain for layer, gain in found.gain.items()},
        {layer: shift + 5.0 for layer, shift in found.shift.items()},
        {group: 4.0 * step for group, step in found.step.items()},
    )


def nothing(task: Task, found: State) -> State:
    """Return nothing learned: as good as nearest rounding, not better."""
    return State()


UNITS = ("stem", "block0", "block1", "block2", "head")


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [worse, nothing])
@pytest.mark.parametrize("spoiled", [UNITS[:1], UNITS[1:4:2], UNITS[2:], UNITS])
def test_what_is_not_better_on_held_out_images_leaves_no_trace(
    spoiled: tuple[str, ...],
    spoil: Callable[[Task, State], State],
    case: Case,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Codes, scales, biases and steps of such a unit are those of nearest rounding."""
    groups: dict[str, set[int]] = {}

    def some(task: Task, found: State) -> State:
        groups[task.name] = set(found.step)
        return spoil(task, found) if task.name in spoiled else found

    watch(monkeypatch, some)
    net, report = case.learn(tmp_path, replace(ENOUGH, iterations=20))
    assert tuple(unit.unit for unit in report.units) == UNITS
    for unit in report.units:
        assert unit.kept == ("learned" if unit.learned < unit.start else "start")
        if unit.unit in spoiled:
            assert (unit.kept, unit.changed_codes) == ("start", 0)
            assert (unit.learned == unit.start) == (spoil is nothing)
    kept = {unit.unit for unit in report.units if unit.kept == "learned"}
    assert kept or spoiled == UNITS
    before, after = weights_of(case.net), weights_of(net)
    tensors = {a.group: tensor for tensor, a in case.plan.activations.items()}
    for unit in set(UNITS) - kept:
        for old, new in zip(before[unit], after[unit], strict=True):
            np.testing.assert_array_equal(new, old)
        np.testing.assert_array_equal(biases_of(net)[unit], biases_of(case.net)[unit])
        for group in groups[unit]:
            step = f"{tensors[group]}.quantize"
            assert steps_of(net)[step] == steps_of(case.net)[step]


def file_weights(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return node -> codes and scales of a written file, read with onnx only."""
    model = onnx.load(str(path))
    values = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    return {
        node.name: (values[inputs[0]].astype(int), values[inputs[1]])
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm")
        for inputs in [makers[node.input[1]].input]
    }


@pytest.mark.slow
@pytest.mark.parametrize("qprep", [False, True])
@pytest.mark.parametrize("bits", [8, 5, 3])
def test_written_codes_are_neighbours(bits: int, qprep: bool, data: Path, tmp_path: Path) -> None:
    """A code is that of gptq or the next one towards W / s; s = max |W| / largest code."""
    write_net(tmp_path / "m.onnx", rep_net(seed=bits))
    fast = CalibrateOptions(
        images=COUNT, equalize=False, split="none", full_range=False, weight_bits=bits
    )
    learn = LearnOptions(affine=qprep, iterations=60)  # without corrected weights
    options = replace(fast, recipe="balanced", qprep=qprep, learn=learn)
    report = calibrate(tmp_path / "m.onnx", data, tmp_path / "o.onnx", options)
    calibrate(tmp_path / "m.onnx", data, tmp_path / "start.onnx", fast)
    assert report.learned is not None
    kept = {unit.unit: unit for unit in report.learned.units}
    model = onnx.load(str(tmp_path / "m.onnx"))
    floats = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    largest = 2 ** (bits - 1) - 1
    written, starts = file_weights(tmp_path / "o.onnx"), file_weights(tmp_path / "start.onnx")
    assert written.keys() == set(UNITS)
    for node, (codes, scale) in written.items():
        weight, start = floats[f"{node}.weight"].astype(np.float64), starts[node][0]
        amax = np.abs(weight).reshape(len(weight), -1).max(axis=1)
        step = (amax / largest).astype(np.float32)
        exact = weight / step.reshape(-1, *[1] * (weight.ndim - 1))
        assert np.abs(codes).max() <= largest
        moved = codes.astype(int) - start
        assert ((moved == 0) | (moved == np.sign(exact - start))).all()
        changed = int((moved != 0).sum())
        assert changed == kept[node].changed_codes
        assert changed == 0 or kept[node].kept == "learned"
        if not qprep:
            np.testing.assert_array_equal(scale, step)
    assert any(unit.changed_codes for unit in kept.values())


def test_a_huge_learning_rate_changes_nothing(case: Case, tmp_path: Path) -> None:
    options = replace(QUICK, affine_rate=1e3, rounding_rate=1e3)
    net, report = case.learn(tmp_path, options)
    assert {unit.kept for unit in report.units} == {"start"}
    assert weights_of(net).keys() == weights_of(case.net).keys()
    for name, (codes, scale) in weights_of(case.net).items():
        np.testing.assert_array_equal(weights_of(net)[name][0], codes)
        np.testing.assert_array_equal(weights_of(net)[name][1], scale)
        np.testing.assert_array_equal(biases_of(net)[name], biases_of(case.net)[name])
    assert steps_of(net) == steps_of(case.net)


# What is learned ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["rounding", "affine", "steps", "", "rounding affine steps"])
def test_each_part_alone(case: Case, tmp_path: Path, parts: str) -> None:
    names = ("rounding", "affine", "steps")
    chosen = {name: name in parts.split() for name in names}
    options = replace(QUICK, iterations=20, rounding_rate=0.1, **chosen)
    net, report = case.learn(tmp_path, options)
    before, after = weights_of(case.net), weights_of(net)
    changed = {
        "rounding": any((before[n][0] != after[n][0]).any() for n in before),
        "affine": any((before[n][1] != after[n][1]).any() for n in before),
        "steps": steps_of(net) != steps_of(case.net),
    }
    assert changed == chosen
    biases = biases_of(net)
    moved = any((biases[n] != b).any() for n, b in biases_of(case.net).items())
    assert moved == chosen["affine"]
    assert any(unit.kept == "learned" for unit in report.units) == bool(parts)


def test_steps_of_one_group_stay_together(data: Path, tmp_path: Path) -> None:
    """A Concat has one scale, and the Clips that simulate 6 bits follow its step."""
    model = residual_net()
    case = nearest(model, write_images(tmp_path / "d.npz", 32, size=8), bits=6)
    net, _ = case.learn(tmp_path, replace(QUICK, step_rate=3e-2, affine=False, rounding=False))
    before, after = steps_of(case.net), steps_of(net)
    group = {after[f"{name}.quantize"] for name in ("left.relu", "right.clip", "cat")}
    assert len(group) == 1
    assert before != after
    nodes = {node.name: node for node in net.graph.nodes}
    clips = [node for node in net.graph.nodes if node.name.endswith("clip") and node.op == "Clip"]
    for clip in (clip for clip in clips if clip.outputs[0].outputs[0].op == "QuantizeLinear"):
        quantize = clip.outputs[0].outputs[0]
        step = np.float32(constant_of(quantize.inputs[1]))
        low, high = (float(constant_of(tensor)) for tensor in clip.inputs[1:])
        assert (low, high) == (np.float32(-32) * step, np.float32(31) * step)
        dequantize = nodes[quantize.name.removesuffix("quantize") + "dequantize"]
        assert np.float32(constant_of(dequantize.inputs[1])) == step


@pytest.mark.slow
@pytest.mark.parametrize("how", ["identity", "coarse-fine"])
def test_split_layers(how: str, data: Path, unseen: np.ndarray, tmp_path: Path) -> None:
    float_net, grid = net_from_model(rep_net()), Grid.weight(4)
    names = ["block0", "block1", "block2"]
    if how == "identity":
        split_identity(float_net, names, grid=grid)
    else:
        split_coarse_fine(float_net, names, grid=grid)
    case = nearest(model_from_net(float_net), data, weight_bits=4)
    net, report = case.learn(tmp_path, ENOUGH)
    assert len(read_splits(net)) == 3
    assert [unit.unit for unit in report.units][1:4] == [split.main for split in read_splits(net)]
    assert case.sqnr(net, unseen) > case.sqnr(case.net, unseen) + 2
    for split in read_splits(net):  # one affine scales both parts
        before, after = (biases_of(one)[split.main] for one in (case.net, net))
        assert (before != after).any()
        if how == "coarse-fine":  # its codes lose nothing: there is nothing to round
            np.testing.assert_array_equal(codes_of(net)[split.side], codes_of(case.net)[split.side])


def test_zeros_of_a_dead_channel_stay_zero(data: Path, tmp_path: Path) -> None:
    model = rep_net()
    for tensor in model.graph.initializer:
        if tensor.name == "block1.weight":
            weight = onnx.numpy_helper.to_array(tensor).copy()
            weight[3], weight[:, 5] = 0.0, 0.0
            tensor.CopyFrom(onnx.numpy_helper.from_array(weight, tensor.name))
    case = nearest(model, data, weight_bits=4)
    net, _ = case.learn(tmp_path, replace(QUICK, iterations=20, rounding_rate=0.5))
    codes = codes_of(net)["block1"]
    assert not codes[3].any()
    assert not codes[:, 5].any()


NETS: dict[str, tuple[Callable[[], onnx.ModelProto], int, int]] = {
    "everything": (residual_net, 8, 7),
    "neck": (neck, 16, 3),
    "tail": (tail_without_layer, 8, 2),
    "MatMul": (matmul_net, 8, 2),
    "residual": (basic_block, 8, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_nets_of_every_shape(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, size, at_least = NETS[name]
    case = nearest(make(), write_images(tmp_path / "d.npz", 32, size=size), weight_bits=6)
    steps: list[int] = []

    def note(task: Task, state: State) -> State:
        steps.extend(state.step)
        return state

    watch(monkeypatch, note)
    net, report = case.learn(tmp_path, QUICK)
    groups = {activation.group for activation in case.plan.activations.values()}
    assert sorted(steps) == sorted(groups)  # each learned once, by the first unit that reads it
    assert len(report.units) >= at_least
    for unit in report.units:
        assert unit.kept == ("learned" if unit.learned < unit.start else "start")
        assert 0 < min(unit.start, unit.learned) < 0.5
    (x,) = case.data.batches(32)
    wanted, got = (
        ort_run(model, {"x": x}, optimize=False) for model in (case.model, model_from_net(net))
    )
    for tensor, values in wanted.items():
        assert np.linalg.norm(got[tensor] - values) < 0.3 * np.linalg.norm(values)


# How it is learned -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mae", "mse"])
def test_the_relative_error(kind: str) -> None:
    rng = np.random.default_rng(0)
    got, wanted = rng.standard_normal((2, 4, 5, 6))
    power = 1 if kind == "mae" else 2
    expected = (np.abs(got - wanted) ** power).mean() / (np.abs(wanted) ** power).mean()
    found = relative_error(torch.tensor(got), torch.tensor(wanted), kind)
    assert float(found) == pytest.approx(expected)
    assert float(relative_error(torch.zeros(3), torch.zeros(3), kind)) == 0.0


def test_the_stage_term_is_the_error_of_the_float_rest(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the error of the stage's output if the float net continues from a unit's output."""
    tasks: dict[str, Task] = {}

    def note(task: Task, *_: object) -> State:
        tasks[task.name] = task
        if task.stage is not None:
            picked = torch.tensor([5, 0, 17])
            outputs = task.targets(picked)
            assert float(task.stage(outputs, picked)) < 1e-6
            spoiled = {name: 0.5 * value for name, value in outputs.items()}
            (name,) = task.outputs
            end = {"stem": "block2.relu", "block0": "block2.relu", "block1": "block2.relu"}
            tensor = end.get(task.name, "head")
            rest = TorchGraph(case.reference)
            got, wanted = (rest.run(v, [tensor])[tensor] for v in (spoiled, outputs))
            expected = (got - wanted).abs().mean() / wanted.abs().mean()
            assert float(task.stage(spoiled, picked)) == pytest.approx(float(expected), rel=1e-4)
            assert name.startswith(task.name)
        return State()

    monkeypatch.setattr(attempt, "learn", note)
    case.learn(tmp_path, replace(QUICK, stage_weight=0.5))
    assert [name for name, task in tasks.items() if task.stage is not None] == [
        "stem",
        "block0",
        "block1",
        "block2",
    ]


def signature(net: Net) -> bytes:
    return bytes_from_model(model_from_net(net.copy()))


@pytest.mark.slow
def test_options_reach_the_learning(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each option changes what is learned; the same options give the same result."""
    found: list[bytes] = []

    def note(task: Task, state: State) -> State:
        values = [v for name in State.__slots__ for v in getattr(state, name).values()]
        found.append(b"".join(value.numpy().tobytes() for value in values))
        return state

    watch(monkeypatch, note)
    base, results, nets = QUICK, {}, {}
    for name, options in {
        "base": base,
        "again": base,
        "seed": replace(base, seed=1),
        "loss": replace(base, loss="mse"),
        "iterations": replace(base, iterations=7),
        "stage": replace(base, stage_weight=1.0),
        "batch": replace(base, batch=8),
        "rounding": replace(base, rounding_rate=base.rounding_rate / 10),
        "affine": replace(base, affine_rate=2 * base.affine_rate),
        "step": replace(base, step_rate=2 * base.step_rate),
        "regularizer": replace(base, regularizer=3 * base.regularizer, rounding_rate=0.05),
        "none": replace(base, regularizer=0.0, rounding_rate=0.05),
    }.items():
        (tmp_path / name).mkdir()
        found.clear()
        net, report = case.learn(tmp_path / name, options)
        results[name], nets[name] = b"|".join(found), signature(net)
        assert len(report.units) == 5
    assert nets["base"] == nets["again"]
    assert results.pop("base") == results["again"]
    assert len(set(results.values())) == len(results)


@pytest.mark.slow
def test_storage_of_activations_hardly_matters(
    case: Case, unseen: np.ndarray, tmp_path: Path
) -> None:
    """Peak: both nets' tensors at two boundaries, for 96 images, in float32."""
    peak = 4 * COUNT * 2 * (8 * 36 + 8 * 36)
    rest = (1 << 30) + 8 * 4 * ENOUGH.batch * (8 * 36 + 8 * 36)  # the program, and a step
    found = {}
    for storage, budget in {"float32": peak, "float16": peak - 1, "disk": peak // 2 - 1}.items():
        (tmp_path / storage).mkdir()
        net, report = case.learn(
            tmp_path / storage, replace(ENOUGH, iterations=20, memory_budget=rest + budget)
        )
        assert report.storage == storage
        assert {path.suffix for path in (tmp_path / storage).rglob("*.*")} == {".partial", ".npz"}
        found[storage] = net
    assert signature(found["float16"]) == signature(found["disk"])
    quality = {storage: case.sqnr(net, unseen) for storage, net in found.items()}
    assert quality["float16"] == pytest.approx(quality["float32"], abs=1.5)
    outputs = [
        next(iter(ort_run(model_from_net(net), {"x": unseen}, optimize=False).values()))
        for net in found.values()
    ]
    assert np.linalg.norm(outputs[0] - outputs[1]) < 0.1 * np.linalg.norm(outputs[0])


def test_rates_of_affines_and_steps_fall_to_zero(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []

    def noting(*args: Any, lr: float, **options: Any) -> None:
        rates.append(lr)
        functional(*args, lr=lr, **options)

    functional = adam.adam
    monkeypatch.setattr(adam, "adam", noting)
    case.learn(tmp_path, replace(QUICK, iterations=8, affine_rate=1e-3, step_rate=5e-4))
    first = np.reshape(rates[:24], (8, 3))  # of the stem: rounding, affine, steps
    np.testing.assert_allclose(first[:, 0], QUICK.rounding_rate)
    falling = 0.5 * (1 + np.cos(np.pi * np.arange(8) / 8))
    np.testing.assert_allclose(first[:, 1], 1e-3 * falling)
    np.testing.assert_allclose(first[:, 2], 5e-4 * falling)


# Refused -----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite(case: Case, tmp_path: Path) -> None:
    before = signature(case.net)
    with pytest.raises(CalibrationError) as caught:
        case.learn(tmp_path, replace(QUICK, step_rate=1e5))
    message = str(caught.value)
    assert re.fullmatch(
        r"unit (stem|block\d): the loss is (nan|inf) at iteration 5; lower .*", message
    )
    assert signature(case.net) == before


def test_too_few_images(tmp_path: Path) -> None:
    path = write_images(tmp_path / "d.npz", 15)
    case = nearest(rep_net(), path)
    (tmp_path / "o").mkdir()
    with pytest.raises(DataError, match=r"d\.npz: 15 images, learned calibration needs 16 \(.*; "):
        case.learn(tmp_path / "o", QUICK)
    assert list((tmp_path / "o").iterdir()) == []


def test_the_fewest_images_will_do(tmp_path: Path) -> None:
    case = nearest(rep_net(1), write_images(tmp_path / "d.npz", 16))
    _, report = case.learn(tmp_path, QUICK)
    assert report.held_out == 2
    json.dumps(asdict(report))


# The device's memory -----------------------------------------------------------------------------

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"


class Crowded:
    """Replaces `learn` and `Store` by those of a device that runs out of memory at one unit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, unit: str, times: int) -> None:
        self.unit, self.times = unit, times
        self.tried: list[str] = []
        self.left_behind: list[torch.Tensor] = []  # of failed tries, when the next one begins
        self.alive: weakref.WeakSet[Store] = weakref.WeakSet()
        self.kept_on_device: list[int] = []  # stores that were not moved, at each try
        self._moved: set[Store] = set()
        self._held: list[weakref.ref[torch.Tensor]] = []
        monkeypatch.setattr(attempt, "learn", self._learn)
        monkeypatch.setattr(cache, "Store", self._store)

    def _learn(self, task: Task, *arguments: object) -> State:
        self.tried.append(task.name)
        if task.name != self.unit:
            return learn(task, *arguments)  # type: ignore[arg-type]
        self.left_behind += [tensor for ref in self._held if (tensor := ref()) is not None]
        self.kept_on_device.append(len(set(self.alive) - self._moved))
        if self.times == 0:
            return learn(task, *arguments)  # type: ignore[arg-type]
        self.times -= 1
        generator = arguments[-1]
        assert isinstance(generator, torch.Generator)
        torch.randint(COUNT, (16,), generator=generator)  # the first batch
        activations = torch.zeros(1000)
        self._held.append(weakref.ref(activations))
        raise torch.cuda.OutOfMemoryError(FULL)

    def _store(self, *arguments: object) -> Store:
        crowded = self

        class Watched(Store):
            def to_host(self) -> None:
                crowded._moved.add(self)
                super().to_host()

        made = Watched(*arguments)  # type: ignore[arg-type]
        self.alive.add(made)
        return made


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["stem", "block1", "head"])
def test_a_full_device_gives_up_what_lies_between_units(
    unit: str,
    case: Case,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wanted, told = case.learn(tmp_path, QUICK)
    (tmp_path / "o").mkdir()
    crowded = Crowded(monkeypatch, unit, times=1)
    with caplog.at_level(logging.WARNING):
        net, report = case.learn(tmp_path / "o", QUICK)
    assert [name for name in crowded.tried if name == unit] == [unit] * 2
    assert crowded.kept_on_device[0] >= 2  # inputs and targets of the unit
    assert crowded.kept_on_device[1] == 0
    assert not crowded.left_behind  # or the second try would find the device as full
    assert signature(net) == signature(wanted)  # the same batches are drawn again
    assert [replace(u, seconds=0.0) for u in report.units] == [
        replace(u, seconds=0.0) for u in told.units
    ]
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    (message,) = (record.getMessage() for record in warnings)
    assert message == ("the device is out of memory: activations between units move to CPU memory")


def assert_one_line(error: ReptrtError) -> None:
    assert "\n" not in str(error)
    assert FULL not in str(error)


def test_a_unit_that_does_not_fit_the_device(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signature(case.net)
    crowded = Crowded(monkeypatch, "block1", times=2)
    message = (
        r"^unit block1: a learning step does not fit the memory .* smaller batch or device='cpu'$"
    )
    with pytest.raises(CalibrationError, match=message) as caught:
        case.learn(tmp_path, QUICK)
    assert_one_line(caught.value)
    assert crowded.tried == ["stem", "block0", "block1", "block1"]
    assert signature(case.net) == before


@pytest.mark.parametrize("after", [0, 4])
def test_activations_that_do_not_fit_the_device(
    after: int, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Store] = []

    def store(*arguments: object) -> Store:
        if len(made) == after:
            raise torch.cuda.OutOfMemoryError(FULL)
        made.append(Store(*arguments))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(cache, "Store", store)
    message = r"memory of the device; lower memory_budget, or use device='cpu'$"
    with pytest.raises(CalibrationError, match=message) as caught:
        case.learn(tmp_path, QUICK)
    assert_one_line(caught.value)


def test_progress_tells_the_error_of_the_last_unit_before_and_after(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels: list[str] = []

    def watched(items: range, total: int, label: Callable[[], str]) -> Iterator[int]:
        labels.append(label())
        for item in items:
            yield item
            labels.append(label())

    monkeypatch.setattr(driver, "track", watched)
    _, report = case.learn(tmp_path, QUICK)
    units = report.units[: len(labels) - 1]
    assert labels == ["learn"] + [
        f"learn, {u.unit}: {u.start:.2%} -> {u.learned:.2%}, {u.kept} kept" for u in units
    ]
    assert len(units) == 5
