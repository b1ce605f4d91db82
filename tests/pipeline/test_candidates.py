"""Equalization, splits and full ranges chosen together, and judged by the outputs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from reptrt.core.choices import Rounding, SplitForm
from reptrt.data.dataset import Dataset, open_dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import Net, net_from_model
from reptrt.graph.preprocess import read_preprocess
from reptrt.pipeline import CalibrateOptions, calibrate, prepare, preparing
from reptrt.pipeline.candidates import Candidate, Candidates
from reptrt.pipeline.trial import error_at_maxima
from reptrt.quantize.calib.channels import collect_channels
from reptrt.quantize.calib.options import ThresholdOptions
from reptrt.quantize.calib.outputs import Outputs, parts
from tests.support.helpers import ort_run
from tests.support.learned_nets import rep_net, write_images, write_net

COUNT = 32
OPTIONS = CalibrateOptions(images=COUNT, max_overhead=1.0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_images(tmp_path / "d.npz", COUNT)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_net(tmp_path / "m.onnx", rep_net(3))


def opened(path: Path, data: Path) -> tuple[Net, Dataset]:
    net = net_from_model(onnx.load(str(path)))
    return net, open_dataset(data, read_preprocess(net))


def test_the_candidate_with_the_least_error_of_the_outputs_is_taken(
    path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Candidate] = []
    monkeypatch.setattr(
        Candidates,
        "all",
        lambda self, original=Candidates.all: found.extend(original(self)) or found,
    )
    net, dataset = opened(path, data)
    prepare(net, dataset, OPTIONS)
    assert len(found) >= 2
    costs = [candidate.choice.extra_macs for candidate in found]
    assert costs == sorted(costs)
    assert not any(form != "none" for form in found[0].forms.values())
    for best in range(len(found)):
        errors = iter([float(index != best) for index in range(len(found))])
        monkeypatch.setattr(preparing, "error_at_maxima", lambda *_, e=errors: next(e))
        net, dataset = opened(path, data)
        given, found[:] = list(found), []
        prepared = prepare(net, dataset, OPTIONS)
        split = {layer: form for layer, form in given[best].forms.items() if form != "none"}
        assert {split.layer: split.form for split in prepared.splits} == split


def test_the_choice_is_as_near_to_the_float_net_as_the_best_of_the_named_forms(
    path: Path, tmp_path: Path
) -> None:
    """Oracle: files calibrated with each form, run by onnxruntime on the judging images."""
    data = write_images(tmp_path / "many.npz", 256)
    _, dataset = opened(path, data)
    x = np.concatenate(list(parts(dataset)[1].batches(64)))
    exact = ort_run(onnx.load(str(path)), {"x": x})
    errors = {}
    for split in ("none", "identity", "auto"):
        options = replace(OPTIONS, images=256, split=split)  # type: ignore[arg-type]
        calibrate(path, data, tmp_path / "o.onnx", options)
        got = ort_run(onnx.load(str(tmp_path / "o.onnx")), {"x": x})
        errors[split] = sum(np.square(got[name] - exact[name]).sum() for name in exact)
    assert errors["auto"] <= 1.05 * min(errors.values())
    assert errors["auto"] < 0.8 * errors["none"]


@pytest.mark.parametrize(
    ("split", "rounding", "bits", "most"),  # codes near a midpoint may differ; gptq is estimated
    [
        ("identity", "nearest", 8, 1.25),
        ("none", "nearest", 8, 1.25),
        ("none", "gptq", 5, 3.0),
    ],
)
def test_the_error_of_a_candidate_is_that_of_the_file_that_it_becomes(
    split: SplitForm, rounding: Rounding, bits: int, most: float, path: Path, tmp_path: Path
) -> None:
    """Oracle: the calibrated file in onnxruntime. Ranges are not narrowed, biases not corrected."""
    data = write_images(tmp_path / "many.npz", 256)
    options = replace(
        OPTIONS,
        images=256,
        split=split,
        rounding=rounding,
        weight_bits=bits,
        threshold=ThresholdOptions("max"),
        correct_bias=False,
    )
    net, dataset = opened(path, data)
    judges = parts(dataset)[1]
    outputs = Outputs(TorchGraph(net.copy()), judges)
    prepared = prepare(net, dataset, options)
    report = calibrate(path, data, tmp_path / "o.onnx", options)
    tensors = [activation.tensor for activation in prepared.placement.activations]
    with torch.inference_mode():
        stats = collect_channels(TorchGraph(net), dataset, tensors)
        shares = {name: np.ones_like(channels.maximum) for name, channels in stats.items()}
        found = error_at_maxima(
            net, prepared.placement, stats, report.full_range, shares, outputs, options
        )
    x = np.concatenate(list(judges.batches(64)))
    exact = ort_run(onnx.load(str(path)), {"x": x})
    got = ort_run(onnx.load(str(tmp_path / "o.onnx")), {"x": x})
    measured = sum(np.square(got[name] - exact[name]).sum() for name in exact)
    assert measured / most < found < measured * most


@pytest.mark.parametrize("options", [{"max_overhead": 0.0}, {"split": "none"}])
def test_where_nothing_is_to_be_chosen_no_candidate_is_run(
    options: dict[str, Any], path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unexpected(*_: object) -> float:
        raise AssertionError("one candidate needs no judge")

    monkeypatch.setattr(preparing, "error_at_maxima", unexpected)
    net, dataset = opened(path, data)
    prepared = prepare(net, dataset, replace(OPTIONS, **options))
    assert not prepared.splits
    assert prepared.equalized == 4
