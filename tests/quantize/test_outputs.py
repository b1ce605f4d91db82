"""Choices by the outputs: threshold auto, against every choice computed in onnxruntime."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import numpy_helper

import reptrt
from reptrt.data.dataset import Dataset, open_dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import model_from_net, net_from_model
from reptrt.graph.placement import place
from reptrt.graph.plan import plan_from_placement
from reptrt.graph.preprocess import Preprocess, read_preprocess
from reptrt.graph.qdq import insert_qdq
from reptrt.judge.diagnose.measure import closeness
from reptrt.pipeline import CalibrateOptions, CalibrateReport, calibrate, prepare
from reptrt.quantize.calib.collect import watch
from reptrt.quantize.calib.options import ThresholdOptions
from reptrt.quantize.calib.outputs import Outputs, least, stride_of
from tests.support import detector_nets
from tests.support.detector_nets import detector
from tests.support.helpers import ort_run
from tests.support.learned_nets import SIZE, rep_net, write_images, write_net
from tests.support.qdq_nets import with_outputs

RULES = ("max", "percentile", "mse", "kl")
COUNT = 96
OPTIONS = CalibrateOptions(
    images=COUNT, equalize=False, split="none", correct_bias=False, activation_bits=5
)
STEP = 2 ** (1 / 8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "d.npz", COUNT)


def parted(path: Path, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the images without every eighth, and every eighth, the held-out images."""
    preprocess = read_preprocess(net_from_model(onnx.load(str(path))))
    (x,) = open_dataset(data, preprocess).batches(COUNT)
    judges = np.arange(COUNT) % 8 == 7
    return x[~judges], x[judges]


def shares_of(path: Path, parts: Sequence[np.ndarray], names: Sequence[str]) -> dict[str, float]:
    """Return by how much each tensor's range shrinks without the held-out images: new over old."""
    model = with_outputs(onnx.load(str(path)), list(names))
    found = [ort_run(model, {"x": x}, optimize=False) | {"x": x} for x in parts]
    others, judges = ({name: np.abs(one[name]).max() for name in names} for one in found)
    return {name: others[name] / max(others[name], judges[name]) for name in names}


Values = dict[str, np.ndarray]
Shares = Mapping[str, float]


def error_of(
    path: Path, x: np.ndarray, report: CalibrateReport, margin: float, shares: Shares
) -> float:
    """Return the output error with quantized activations, clipped to the ranges without ``x``."""
    (exact,), (found,) = (one.values() for one in pair_of(path, x, report, margin, shares))
    return float(np.square(found.astype(float) - exact).sum())


def pair_of(
    path: Path,
    x: np.ndarray,
    report: CalibrateReport,
    margin: float,
    shares: Shares,
    also: Sequence[str] = (),
) -> tuple[Values, Values]:
    """Return the outputs and other tensors in float, and as `error_of` says."""
    model = with_outputs(onnx.load(str(path)), list(also))
    net = net_from_model(model)
    exact = ort_run(model, {"x": x}, optimize=False)
    placement = replace(place(net), weights=())
    scales, grid = scales_of(report, margin), OPTIONS.grids[0]
    insert_qdq(net, plan_from_placement(placement, scales, {}, grid, report.full_range))
    limits = {t.tensor: np.float32(margin * t.amax * shares[t.tensor]) for t in report.tensors}
    for quantize in [node for node in net.graph.nodes if node.op == "QuantizeLinear"]:
        tensor = quantize.inputs[0]
        limit = limits[tensor.name.removesuffix(".clipped")]  # of the simulation of 5 bits
        bounds = [gs.Constant(f"{tensor.name}.{s}", np.asarray(s * limit)) for s in (-1, 1)]
        limited = gs.Variable(f"{tensor.name}.limited", np.float32)
        net.graph.nodes.append(gs.Node("Clip", limited.name, {}, [tensor, *bounds], [limited]))
        quantize.inputs[0] = limited
    return exact, ort_run(model_from_net(net), {"x": x}, optimize=False)


class Heads(torch.nn.Module):
    """Boxes in large and scores in small units."""

    def __init__(self, gains: tuple[float, float]) -> None:
        super().__init__()
        self.gains = gains

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"boxes": x * (1e3 * self.gains[0]), "scores": x * (1e-3 * self.gains[1])}


def test_every_output_counts_in_its_own_unit(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (9, 3, 4, 4), np.uint8))
    dataset = open_dataset(tmp_path / "x.npy", Preprocess.plain(3, 4, 4))
    graphs = [
        TorchGraph(reptrt.export(Heads(gains), input_size=(3, 4, 4)).to_net())
        for gains in ((1.0, 1.0), (1.01, 1.0), (1.0, 1.1))
    ]
    outputs = Outputs(graphs[0], dataset)
    errors = [outputs.error(graph) for graph in graphs]
    assert errors == pytest.approx([0, 0.01**2, 0.1**2], rel=1e-3)
    results = closeness(graphs[0], graphs, dataset)
    decibels = [math.inf, 40 + 10 * math.log10(2), 20 + 10 * math.log10(2)]
    assert [result.sqnr_db for result in results] == pytest.approx(decibels, abs=0.01)


def with_another_bias(
    folder: Path, images: int
) -> tuple[Dataset, TorchGraph, TorchGraph, dict[str, torch.Tensor]]:
    """Return images, a net twice, and a constant with which the second has other outputs."""
    path, data = write_net(folder / "m.onnx", rep_net(1)), write_images(folder / "d.npz", images)
    net = net_from_model(onnx.load(str(path)))
    exact, other = TorchGraph(net), TorchGraph(net)
    changed = {"stem.bias": other.constants["stem.bias"] + 0.5}
    return open_dataset(data, read_preprocess(net)), exact, other, changed


def test_an_error_that_is_too_large_is_not_measured_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a lower bound then; with several outputs, each in its own unit, all images count."""
    dataset, exact, other, changed = with_another_bias(tmp_path, 96)
    outputs, runs = Outputs(exact, dataset), []
    run = TorchGraph.run
    monkeypatch.setattr(
        TorchGraph,
        "run",
        lambda self, *given, **named: (
            runs.append(1) if self is other else None,
            run(self, *given, **named),
        )[1],
    )
    whole = outputs.error(other, changed)
    assert len(runs) == 3
    assert outputs.error(other, changed, most=1.01 * whole) == whole
    runs.clear()
    part = outputs.error(other, changed, most=0.01 * whole)
    assert len(runs) == 1
    assert 0.01 * whole <= part < whole
    runs.clear()
    far = outputs.error(other, changed, most=0.6 * whole)  # a third promises to exceed it by half
    assert len(runs) == 1
    assert 0.6 * whole <= far < whole


def test_outputs_of_a_pass_are_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, exact, other, changed = with_another_bias(tmp_path, 70)
    expected = Outputs(exact, dataset).error(other, changed)
    outputs = Outputs(exact, dataset)
    with torch.inference_mode():
        watch(exact, dataset, {name: [outputs.record] for name in outputs.names}, "values")
    monkeypatch.setattr(exact, "run", None)
    assert outputs.error(other, changed) == pytest.approx(expected, rel=1e-4)


def test_the_first_of_the_least_is_taken() -> None:
    asked: list[tuple[float, float]] = []

    def error(candidate: float, most: float) -> float:
        asked.append((candidate, most))
        return candidate

    assert least([3.0, 1.0, 2.0, 1.0], error) == (1.0, 1.0)
    assert asked == [(3.0, math.inf), (1.0, 3.0), (2.0, 1.0), (1.0, 1.0)]


def scales_of(report: CalibrateReport, margin: float = 1.0) -> dict[str, float]:
    return {tensor.tensor: margin * tensor.scale for tensor in report.tensors}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("full_range", [True, False])
def test_auto_takes_the_rule_and_margin_that_keep_outputs_nearest_on_images_not_seen(
    seed: int, full_range: bool, data: Path, tmp_path: Path
) -> None:
    path = write_net(tmp_path / "m.onnx", rep_net(3, seed))
    parts = parted(path, data)
    options = replace(OPTIONS, full_range=full_range)
    by_rule, errors = {}, {}
    shares: dict[str, float] = {}
    for rule in RULES:
        given = replace(options, threshold=ThresholdOptions(rule))  # type: ignore[arg-type]
        report = calibrate(path, data, tmp_path / "o.onnx", given)
        assert (report.threshold, report.margin) == (rule, 1.0)
        assert bool(report.full_range) == full_range
        shares = shares or shares_of(path, parts, [t.tensor for t in report.tensors])
        by_rule[rule] = report
        errors[rule] = error_of(path, parts[1], report, 1.0, shares)
    assert min(shares.values()) < 1
    chosen = calibrate(path, data, tmp_path / "o.onnx", options)
    assert errors[chosen.threshold] == pytest.approx(min(errors.values()), rel=1e-3)
    assert max(errors.values()) > 1.05 * min(errors.values())
    found = by_rule[chosen.threshold]
    assert chosen.full_range == found.full_range
    assert scales_of(chosen) == pytest.approx(scales_of(found, chosen.margin), rel=1e-6)
    steps = round(8 * np.log2(chosen.margin))
    assert chosen.margin == pytest.approx(STEP**steps)
    tried = [error_of(path, parts[1], found, STEP**k, shares) for k in range(steps + 2)]
    assert all(np.diff(tried[:-1]) < 0)  # every step came nearer
    assert tried[-1] > (1 - 1e-3) * tried[-2]  # and the next one did not


HEADS = ("scores.turned", "boxes.low", "boxes.high")


def by_heads(exact: Values, found: Values) -> float:
    """Return the error of scores, and of boxes by the score of their place, each relative."""
    p = exact["scores.turned"].astype(float)
    w = p.max(axis=2, keepdims=True)
    boxes = [(exact[name].astype(float), found[name]) for name in HEADS[1:]]
    power, error = (np.square(x).sum((0, 1)) for x in (p, p - found["scores.turned"]))
    scores = (error / np.sqrt(power)).sum() / np.sqrt(power).sum()
    errors = sum((w * np.square(b - c)).sum() for b, c in boxes)
    return float(scores + errors / sum((w * np.square(b)).sum() for b, _ in boxes))


def write_objects(path: Path, seed: int) -> Path:
    """Write images of faint noise, each with one bright object."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 0.4, (COUNT, 3, detector_nets.SIZE, detector_nets.SIZE))
    for image, row, column in zip(x, *rng.integers(2, 12, (2, COUNT)), strict=True):
        image[:, row : row + 3, column : column + 3] += rng.uniform(2, 3, (3, 1, 1))
    np.savez(path, x=x.astype(np.float32))
    return path


@pytest.mark.slow
def test_auto_chooses_for_a_detector_as_scores_and_boxes_with_a_score_say(tmp_path: Path) -> None:
    """The decoded boxes are in pixels: their squares would choose another rule."""
    differing = 0
    for seed in range(1, 4):
        model = detector("yolov6", seed)
        for tensor in model.graph.initializer:
            if tensor.name.startswith("cls") and tensor.name.endswith("weight"):
                steep = 4 * numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(steep, tensor.name))
        path = write_net(tmp_path / "m.onnx", model)
        data = write_objects(tmp_path / "d.npz", seed)
        parts = parted(path, data)
        options = replace(OPTIONS, full_range=False)
        heads, pixels = {}, {}
        for rule in RULES:
            given = replace(options, threshold=ThresholdOptions(rule))  # type: ignore[arg-type]
            report = calibrate(path, data, tmp_path / "o.onnx", given)
            shares = shares_of(path, parts, [t.tensor for t in report.tensors])
            exact, found = pair_of(path, parts[1], report, 1.0, shares, HEADS)
            heads[rule] = by_heads(exact, found)
            pixels[rule] = float(np.square(found["y"].astype(float) - exact["y"]).sum())
        chosen = calibrate(path, data, tmp_path / "o.onnx", options).threshold
        assert heads[chosen] == pytest.approx(min(heads.values()), rel=1e-3)
        differing += heads[min(pixels, key=lambda rule: pixels[rule])] > 1.01 * heads[chosen]
    assert differing


def test_ranges_without_the_judges_are_channel_by_channel_where_channels_are_equalized(
    data: Path, tmp_path: Path
) -> None:
    path = write_net(tmp_path / "m.onnx", rep_net(3))
    others, judges = parted(path, data)
    model = with_outputs(onnx.load(str(path)), ["stem.relu", "block0.relu"])
    net = net_from_model(onnx.load(str(path)))
    dataset = open_dataset(data, read_preprocess(net))
    found = prepare(net, dataset, replace(OPTIONS, equalize=True)).without_judges
    runs = [ort_run(model, {"x": x}, optimize=False) for x in (others, judges)]
    for name in ("stem.relu", "block0.relu"):
        without, alone = (np.abs(run[name]).max((0, 2, 3)) for run in runs)
        whole = np.maximum(without, alone)
        expected = np.maximum(without, 1e-3 * without.max()) / np.maximum(whole, 1e-3 * whole.max())
        np.testing.assert_allclose(found[name], expected, rtol=1e-4)
        assert 0 < (found[name] < 1).sum() < len(expected)


def test_few_images_get_a_wide_margin(tmp_path: Path) -> None:
    path = write_net(tmp_path / "m.onnx", rep_net(3))
    rng = np.random.default_rng(0)
    contrast = np.exp(rng.normal(0, 0.5, (512, 1, 1, 1)))
    x = contrast * rng.normal(0, 1, (512, 3, SIZE, SIZE))
    np.savez(tmp_path / "d.npz", x=x.astype(np.float32))
    images, options = tmp_path / "d.npz", replace(OPTIONS, activation_bits=8, equalize=True)
    few, many = (
        calibrate(path, images, tmp_path / "o.onnx", replace(options, images=count)).margin
        for count in (16, 512)
    )
    assert few > 1.2 * many


def test_different_widths_get_different_rules(data: Path, tmp_path: Path) -> None:
    path = write_net(tmp_path / "m.onnx", rep_net(3))
    chosen = {
        calibrate(path, data, tmp_path / "o.onnx", replace(OPTIONS, activation_bits=bits)).threshold
        for bits in (4, 5, 6, 7, 8)
    }
    assert len(chosen) > 1


@pytest.mark.parametrize(
    ("length", "judges"), [(2, 1), (8, 4), (16, 8), (33, 8), (64, 8), (128, 16), (512, 64)]
)
def test_how_many_images_judge(length: int, judges: int) -> None:
    assert length // stride_of(length) == judges


def test_at_most_64_judge_and_hardly_fewer() -> None:
    """`length // stride` of `length` images judge; a stride has no finer choice."""
    counts = {length: length // stride_of(length) for length in [*range(512, 5000), 50_000]}
    assert counts[575] == 63
    assert {min(counts.values()), max(counts.values())} == {57, 64}


def test_one_image_is_enough(tmp_path: Path) -> None:
    path = write_net(tmp_path / "m.onnx", rep_net(3))
    images = write_images(tmp_path / "d.npz", 1)
    assert calibrate(path, images, tmp_path / "o.onnx", replace(OPTIONS, images=1)).images == 1
