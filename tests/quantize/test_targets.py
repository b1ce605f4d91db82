"""What is known of runtimes, and that options and choice use it."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import onnx

from reptrt.core.artifacts import read_sidecar
from reptrt.core.choices import TargetName
from reptrt.core.grid import Grid
from reptrt.graph.made_for import recorded_target
from reptrt.pipeline import CalibrateOptions, calibrate
from reptrt.quantize.choose import ChooseOptions, choose
from reptrt.quantize.targets import TARGETS
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
        chosen[name] = choose(net.net, net.stats, options, net.ranges)
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
