"""What is known of runtimes, and that options and choice use it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest

from reptrt.core.artifacts import read_sidecar
from reptrt.core.choices import TargetName
from reptrt.core.errors import ArtifactError, ConfigError
from reptrt.core.grid import Grid
from reptrt.graph.made_for import recorded_target
from reptrt.graph.net import constant_of
from reptrt.pipeline import CalibrateOptions, calibrate
from reptrt.quantize.choose import ChooseOptions, choose, full_range_macs
from reptrt.quantize.choose.noise import rounding_of_rest
from reptrt.quantize.targets import TARGETS
from reptrt.rewrite.split_identity import factor_of
from tests.quantize.test_choose_budget import Measured, rep_chain
from tests.support.learned_nets import rep_net, write_images, write_net
from tests.support.qdq_nets import images


def test_every_name_has_a_target() -> None:
    assert set(TARGETS) == set(get_args(TargetName))
    assert all(name == target.name for name, target in TARGETS.items())


def test_summands_follow_the_target_unless_they_are_given() -> None:
    assert CalibrateOptions().summands == "float"
    options = CalibrateOptions(target="onnxruntime")
    assert options.summands == "int8"
    assert replace(options, split_precision="float").summands == "float"
    assert replace(options, split="identity").split_form == "identity-scalar"


def test_full_range_costs_what_the_target_says() -> None:
    net = Measured(rep_chain(), images(32, size=9))
    chosen = {}
    for name, target in TARGETS.items():
        options = ChooseOptions(
            Grid.activation(8), Grid.weight(8), 0.0, "whole", costs=target.costs
        )
        ranges = {tensor: full_range_macs(net.net, tensor, target.costs) for tensor in net.ranges}
        chosen[name] = choose(net.net, net.stats, options, ranges)
    padded = [d.tensor for d in chosen["tensorrt"].ranges if d.extra_macs]
    assert padded
    assert not any(d.full for d in chosen["tensorrt"].ranges if d.tensor in padded)
    assert all(d.full and not d.extra_macs for d in chosen["onnxruntime"].ranges)


def test_a_file_and_its_sidecar_name_the_target(tmp_path: Path) -> None:
    model = write_net(tmp_path / "m.onnx", rep_net(1))
    data = write_images(tmp_path / "x.npz", 16)
    for target in get_args(TargetName):
        output = tmp_path / f"{target}.onnx"
        calibrate(model, data, output, CalibrateOptions(images=16, target=target))
        sidecar = read_sidecar(output)
        assert sidecar is not None
        assert sidecar.options["target"] == target
        assert (recorded_target(onnx.load(output)) or "tensorrt") == target


def check_file(path: Path, ratio: float, shares: tuple[float, float], batch: int = 1) -> Path:
    """Write what gpu_check writes, with engines whose times have the given ratio."""
    names = ("int8-fp16", "int8-nosplit-fp16")
    rows = [
        {"file": f"out/{name}.tensorrt.engine", "batch": batch, "median_ms": time}
        for name, time in zip(names, (2.0 * ratio, 2.0), strict=True)
    ]
    results = {
        "environment": {"gpu": "a GPU of this test"},
        "calibrate fast cpu": {"overhead": shares[0]},
        "calibrate without splits": {"overhead": shares[1]},
        "tensorrt bench, no host copies": {"results": rows},
    }
    steps = [{"name": name, "state": "done", "result": r} for name, r in results.items()]
    path.write_text(json.dumps({"steps": steps}))
    return path


@pytest.mark.parametrize("real", [0.0, 3.0, 8.0, 40.0])
def test_costs_of_passes_follow_from_timings(tmp_path: Path, real: float) -> None:
    """Engines whose passes really cost ``real`` per value, in a net whose shares are known."""
    split, whole = (1 + real * share / 8 for share in (0.09, 0.02))
    path = check_file(tmp_path / "gpu_check.json", split / whole, (0.09, 0.02))
    costs = CalibrateOptions(costs=path).runtime.costs
    assert costs.pass_macs == pytest.approx(real, abs=1e-9)
    assert costs.source == "measured: gpu_check.json, a GPU of this test"


def test_splits_are_free_where_timings_say_so_within_their_spread(tmp_path: Path) -> None:
    path = check_file(tmp_path / "gpu_check.json", 0.999, (0.09, 0.02))
    assert CalibrateOptions(costs=path).runtime.costs.pass_macs == 0


def test_files_without_measurements_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    for content in ("", "[]", '{"steps": []}'):
        other.write_text(content)
        with pytest.raises(ArtifactError, match=r"other\.json: no costs in it .*gpu_check"):
            _ = CalibrateOptions(costs=other).runtime
    late = check_file(tmp_path / "late.json", 1.1, (0.09, 0.02), batch=8)
    with pytest.raises(ArtifactError, match="no timings of int8-fp16"):
        _ = CalibrateOptions(costs=late).runtime
    with pytest.raises(ConfigError, match=r"costs: .*late\.json holds measurements of TensorRT"):
        CalibrateOptions(costs=late, target="onnxruntime")


def test_the_choice_counts_with_the_measured_costs(tmp_path: Path) -> None:
    model = write_net(tmp_path / "m.onnx", rep_net(1))
    data = write_images(tmp_path / "x.npz", 16)
    overheads = []
    for real in (8.0, 0.8):
        split, whole = (1 + real * share / 8 for share in (0.09, 0.02))
        path = check_file(tmp_path / "gpu_check.json", split / whole, (0.09, 0.02))
        options = CalibrateOptions(images=16, costs=path, split="identity")
        overheads.append(calibrate(model, data, tmp_path / "o.onnx", options).overhead)
        sidecar = read_sidecar(tmp_path / "o.onnx")
        assert sidecar is not None
        assert sidecar.details["costs"]["pass_macs"] == pytest.approx(real)
    assert overheads[1] == pytest.approx(overheads[0] / 10, rel=0.01)


def test_int8_summands_are_split_where_more_is_gained_than_rounding_one_loses() -> None:
    """The noise of the rest against its rounding by numpy, and the choice on both sides of it."""
    net = Measured(rep_chain(), images(32, size=9))
    node = next(n for n in net.net.graph.nodes if n.name == "a")
    grids = Grid.activation(8), Grid.weight(8)
    options = ChooseOptions(*grids, 1.0, "identity", "int8", costs=TARGETS["onnxruntime"].costs)
    largest = float(net.values[node.outputs[0].outputs[0].outputs[0].name].max())
    d0 = np.asarray(factor_of(constant_of(node.inputs[1]), grids[1], "identity-scalar")).max()
    x, sums = net.values[node.inputs[0].name], net.values[node.outputs[0].name]
    rest = sums - d0 * x
    step = max(largest, d0 * x.max()) / 255
    rounded = np.clip(np.rint(rest / step), -round(d0 * x.max() / step), None) * step
    off = np.maximum(rounded + d0 * x, 0) - np.maximum(sums, 0)
    on = sums > 0
    noise = np.square(off[on]).mean() * len(constant_of(node.inputs[1]))
    found = rounding_of_rest(node, net.stats["a"], largest, *grids)
    assert found == pytest.approx(noise, rel=0.1)
    forms = {}
    for output in (largest, 100 * largest):
        choice = choose(net.net, net.stats, options, outputs={"a": output})
        forms[output] = {d.layer: d.form for d in choice.splits}["a"]
    assert list(forms.values()) == ["identity-scalar", "none"]
    floats = replace(options, precision="float")
    assert choose(net.net, net.stats, floats, outputs={"a": 1e9}) == choose(
        net.net, net.stats, floats
    )
