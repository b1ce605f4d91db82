"""`--float auto:N`: layers that pay stay in float, by name, as if they had been excluded."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import reptrt
from reptrt.core.artifacts import read_sidecar
from reptrt.core.clock import Clock
from reptrt.core.errors import ConfigError
from reptrt.core.options_json import json_from_options, options_from_json
from reptrt.execute.torchgraph import TorchGraph
from reptrt.judge.diagnose import diagnose
from reptrt.pipeline import CalibrateOptions, calibrate, calibrate_net, float_model
from reptrt.pipeline import calibration_images as opened
from reptrt.pipeline.activation_scales import limits_of
from reptrt.pipeline.float_layers import _Trial
from reptrt.pipeline.planning import plan_net
from reptrt.quantize.calib.outputs import Outputs, parts
from reptrt.quantize.choose import in_float
from reptrt.runs.ladder import _with_names
from tests.support.onnx_nets import Builder
from tests.support.qdq_nets import images, residual_net
from tests.support.small_run import refused
from tests.support.small_run import reptrt as ran

COUNT = 64
PLAIN = CalibrateOptions(images=COUNT)


def net_with_a_bad_layer() -> onnx.ModelProto:
    """Three convolutions; the input of "bad" has one channel a hundred times as large.

    What reads that channel has small weights for it, so all others are lost to its scale. The sum
    in front of it cannot be equalized.
    """
    b = Builder(size=8)
    y = b.relu(b.conv("x", 8, "first"))
    y = b.relu(b.conv(y, 8, "second"))
    large = np.ones((1, 8, 1, 1), np.float32)
    large[0, 3] = 100.0
    y = b.node("Mul", [y, b.constant("large", large)], "scaled")
    y = b.node("Softplus", [y], "soft")
    y = b.relu(b.conv(y, 4, "bad", size=1))
    kernel = next(t for t in b.constants if t.name == "bad.weight")
    weight = numpy_helper.to_array(kernel).copy()
    weight[:, 3] *= 0.01
    kernel.CopyFrom(numpy_helper.from_array(weight, kernel.name))
    return b.model(b.head(b.relu(b.conv(y, 8, "last"))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("nets")
    for name, model in (("bad", net_with_a_bad_layer()), ("residual", residual_net())):
        onnx.save(model, str(made / f"{name}.onnx"))
    np.savez(made / "x.npz", x=images(COUNT))
    return made


def test_a_layer_that_pays_stays_in_float_as_if_it_were_excluded(folder: Path) -> None:
    data, source = folder / "x.npz", folder / "bad.onnx"
    made = calibrate(source, data, folder / "auto.onnx", replace(PLAIN, float_nodes=("auto:1",)))
    named = calibrate(source, data, folder / "named.onnx", replace(PLAIN, exclude=("^bad$",)))
    assert made.in_float is not None
    assert made.in_float.kept == made.excluded == ("bad",)
    assert made.sha256 == named.sha256
    assert made.in_float.error_after < 0.8 * made.in_float.error_before
    assert "bad; the error of the outputs falls by" in str(made)
    assert made.to_dict()["in_float"]["decisions"][0]["layer"] == "bad"
    sidecar = read_sidecar(folder / "auto.onnx")
    assert sidecar is not None
    assert sidecar.details["in_float"] == json.loads(json.dumps(made.to_dict()["in_float"]))
    assert sidecar.options["float_nodes"] == ["auto:1"]
    assert "in_float" not in read_sidecar(folder / "named.onnx").details  # type: ignore[union-attr]


def test_where_nothing_pays_the_bits_are_those_without_the_option(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_float, "LEAST_GAIN", 0.7)
    source = float_model(folder / "residual.onnx")
    dataset = opened(source, folder / "x.npz", PLAIN)
    without = calibrate_net(source, dataset, PLAIN)
    made = calibrate_net(source, dataset, replace(PLAIN, float_nodes=("auto:3",)))
    choice = made.report.in_float
    assert choice is not None
    assert choice.kept == ()
    assert made.sha256 == without.sha256
    assert without.report.in_float is None
    assert "none, no layer pays" in str(made.report)
    assert len(choice.decisions) >= 3  # with their numbers, so that one can see why


def test_layers_that_are_in_float_anyway_are_no_candidates(folder: Path) -> None:
    source = float_model(folder / "bad.onnx")
    options = replace(PLAIN, exclude=("^bad$",), float_nodes=("auto:4", "^head$"))
    report = calibrate_net(source, opened(source, folder / "x.npz", options), options).report
    assert {"bad", "head"} <= set(report.excluded)
    assert report.in_float is not None
    assert not {"bad", "head"} & {decision.layer for decision in report.in_float.decisions}


@pytest.mark.parametrize("split", ["none", "coarse-fine"])
def test_the_trial_is_the_net_with_the_layer_in_float(folder: Path, split: str) -> None:
    """Against a Q/DQ graph of which the pair and the codes of that layer were taken out."""
    source = float_model(folder / "residual.onnx")
    options = replace(PLAIN, split=split, full_range=False)  # type: ignore[arg-type]
    dataset = opened(source, folder / "x.npz", options)
    with torch.inference_mode():
        planned = plan_net(source.to_net(), dataset, options, Clock())
        trial = _Trial(planned, dataset, options)
        outputs = Outputs(TorchGraph(planned.reference), parts(dataset)[1])
        limits = limits_of(planned.prepared, planned.quantities.activations)
        for layer in ("stem", "down", "last", "head"):
            parts_of = {s.main: s for s in planned.prepared.splits if s.layer == layer}
            names = {
                layer,
                *("flat",) * (layer == "head"),
                *(n for s in parts_of.values() for n in (s.main, s.side)),
            }
            activations = {
                tensor: replace(a, readers=tuple(r for r in a.readers if r[0] not in names))
                for tensor, a in planned.plan.activations.items()
            }
            plan = replace(
                planned.plan,
                activations={t: a for t, a in activations.items() if a.readers},
                weights={n: w for n, w in planned.plan.weights.items() if n not in names},
            )
            net = replace(planned, plan=plan).quantized()
            bias = {node.name: node for node in planned.reference.graph.nodes}
            for node in net.graph.nodes:
                if node.name in names and len(node.inputs) > 2:
                    node.inputs[2].values = bias[node.name].inputs[2].values
            kept = {n: limit for n, limit in limits.items() if n in plan.activations}
            expected = outputs.error(TorchGraph(net), overrides=kept)
            assert sum(trial.errors([layer])) == pytest.approx(expected, rel=1e-4), layer
        assert sum(trial.errors(())) == pytest.approx(
            outputs.error(TorchGraph(planned.quantized()), overrides=limits), rel=1e-6
        )


def test_a_shared_input_loses_its_full_range_in_the_trial(folder: Path) -> None:
    source = float_model(folder / "residual.onnx")
    options = replace(PLAIN, equalize=False)  # the tensor's noise is then large
    dataset = opened(source, folder / "x.npz", options)
    with torch.inference_mode():
        planned = plan_net(source.to_net(), dataset, options, Clock())
        trial = _Trial(planned, dataset, options)
        shared = [
            reader
            for name in planned.plan.full_range
            if len(readers := planned.plan.activations[name].readers) > 1
            for reader, _ in readers
        ]
        halves, trial._halved = trial._halved, {}
        whole = [sum(trial.errors([layer])) for layer in shared]
        trial._halved = halves
        ratios = [
            sum(trial.errors([layer])) / error for layer, error in zip(shared, whole, strict=True)
        ]
        assert all(ratio != 1 for ratio in ratios)
        assert max(ratios) > 1.2  # by chance some errors cancel


def test_diagnose_knows_the_layers_that_stay(folder: Path) -> None:
    options = replace(PLAIN, float_nodes=("auto:1",))
    found = diagnose(folder / "bad.onnx", folder / "x.npz", options, layer_images=8)
    assert "bad" not in {layer.layer for layer in found.layers}


@pytest.mark.parametrize("entry", ["auto", "auto:", "auto:0", "auto:-1", "auto:x"])
def test_a_number_that_cannot_be_is_refused(entry: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"float_nodes='{entry}': expected auto:N once, with N of"
    ):
        CalibrateOptions(float_nodes=(entry,))


def test_auto_is_given_once_and_is_no_pattern() -> None:
    with pytest.raises(ConfigError, match="expected auto:N once"):
        CalibrateOptions(float_nodes=("auto:1", "auto:2"))
    options = CalibrateOptions(float_nodes=("autoencoder", "auto:12"))
    assert options.most_float_layers == 12
    assert options.float_patterns == ("autoencoder",)
    stored = json_from_options(options)
    assert options_from_json(CalibrateOptions, stored, "options") == options


def test_the_command_line_takes_it_and_refuses_zero(folder: Path) -> None:
    text = refused(
        *("calibrate", folder / "bad.onnx", "--data", folder / "x.npz"),
        *("-o", folder / "o.onnx", "--float", "auto:0"),
    )
    assert "--float auto:0: expected auto:N once" in text
    net = reptrt.calibrate(str(folder / "bad.onnx"), str(folder / "x.npz"), float_nodes=("auto:1",))
    assert net.report.excluded == ("bad",)


@pytest.mark.slow
def test_a_run_is_replayed_and_climbed_with_the_same_layers(folder: Path, tmp_path: Path) -> None:
    y = np.arange(COUNT) % 5
    np.savez(tmp_path / "xy.npz", x=images(COUNT), y=y)
    run = ("--data", tmp_path / "xy.npz", "-n", 32, "--bench-seconds", 0.01)
    asked = ("--float", "auto:1", "--batch", 1, "-o", tmp_path / "run")
    result = ran("run", folder / "bad.onnx", *run, *asked)
    assert result.exit_code == 0, result.output
    stored = json.loads((tmp_path / "run" / "calibrate.json").read_text())
    assert stored["excluded"] == ["bad"]
    noise = json.loads((tmp_path / "run" / "diagnosis.json").read_text())
    assert "bad" not in {layer["layer"] for layer in noise["layers"]}
    assert ran("replay", tmp_path / "run").exit_code == 0
    steps = ran("ladder", tmp_path / "run").output
    assert f"equalized ({stored['equalized']} tensor" in steps  # without the input of "bad"
    assert ran("report", tmp_path / "run").exit_code == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "At most 1 layers were to stay in float" in page


def test_the_ladder_names_the_layers_of_the_file(folder: Path) -> None:
    options = replace(PLAIN, float_nodes=("auto:1", "^head$"))
    source = float_model(folder / "bad.onnx")
    made = calibrate_net(source, opened(source, folder / "x.npz", options), options)
    path = made.save(folder / "ladder.onnx")
    for int8 in (made, path):
        named = _with_names(options, int8)
        assert (named.exclude, named.float_nodes) == ((r"\Abad\Z",), ("^head$",))
    assert _with_names(PLAIN, made) is PLAIN
