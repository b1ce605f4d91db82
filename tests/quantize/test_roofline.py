"""The time of files by their shapes, against numbers worked out by hand.

The net has a stem (3 to 8 channels), one block (8 to 8) and a head; images are 6 x 6. The block
reads and writes 288 values; its weight has 576.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from reptrt.core.choices import SplitMode
from reptrt.graph.net import read_model
from reptrt.pipeline import CalibrateOptions, CalibrateReport, calibrate
from reptrt.quantize.targets import TARGETS
from reptrt.quantize.targets.roofline import modelled_time
from tests.support.learned_nets import rep_net, write_images, write_net

GPU, CPU = TARGETS["tensorrt"], TARGETS["onnxruntime"]
VALUES, WEIGHT = 288, 576


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, CalibrateReport]]:
    folder = tmp_path_factory.mktemp("made")
    model = write_net(folder / "m.onnx", rep_net(1))
    data = write_images(folder / "x.npz", 16)
    options = CalibrateOptions(images=16, full_range=False)
    splits: tuple[SplitMode, ...] = ("none", "identity", "coarse-fine")
    different = {split: replace(options, split=split) for split in splits}
    different["full range"] = replace(options, split="none", full_range=True)
    different["cpu"] = replace(options, split="identity", target="onnxruntime")
    return {
        name: (path, calibrate(model, data, path, o))
        for name, o in different.items()
        for path in [folder / f"{name}.onnx"]
    }


def extra(made: dict[str, tuple[Path, CalibrateReport]], name: str, batch: int = 1) -> float:
    return modelled_time(read_model(made[name][0]), GPU, batch).extra


def test_a_whole_net_takes_the_time_of_its_layers(
    made: dict[str, tuple[Path, CalibrateReport]],
) -> None:
    whole = modelled_time(read_model(made["none"][0]), GPU, 1)
    assert whole.extra == 0
    split = modelled_time(read_model(made["identity"][0]), GPU, 1)
    assert split.layers == whole.layers
    assert split.total == whole.layers + split.extra


def test_a_skip_moves_one_byte_a_value_where_memory_is_the_limit(
    made: dict[str, tuple[Path, CalibrateReport]],
) -> None:
    assert extra(made, "identity") == VALUES
    assert extra(made, "identity", batch=32) == 32 * VALUES


def test_a_skip_is_free_behind_a_layer_that_waits_for_arithmetic(
    made: dict[str, tuple[Path, CalibrateReport]],
) -> None:
    """The block has 20736 multiply-accumulates and 1152 bytes, 1440 with the skip."""
    model = read_model(made["identity"][0])
    for rate, expected in ((14.0, 0.0), (16.0, 1440 - 20736 / 16), (18.0, VALUES)):
        slow = replace(GPU, roofline=replace(GPU.roofline, macs_per_byte=rate))
        assert modelled_time(model, slow, 1).extra == pytest.approx(expected)


def test_a_coarse_layer_counts_whole_and_is_read_in_half_precision(
    made: dict[str, tuple[Path, CalibrateReport]],
) -> None:
    """The stem, which reads 108 values, and the block: input, weight, output of a 1 x 1 layer."""
    coarse = (108 + 24 + 2 * VALUES) + (VALUES + 64 + 2 * VALUES)
    assert extra(made, "coarse-fine") == coarse + 2 * (2 * VALUES)


def test_border_maps_are_read_once_for_all_images(
    made: dict[str, tuple[Path, CalibrateReport]],
) -> None:
    """One behind the block, which pads, and one constant behind the average of the head."""
    assert all(decision.full for decision in made["full range"][1].ranges)
    assert extra(made, "full range") == extra(made, "full range", batch=32) == 2 * VALUES + 2


def test_a_sum_is_a_pass_of_its_own_in_onnxruntime(
    made: dict[str, tuple[Path, CalibrateReport]],
) -> None:
    modelled = modelled_time(read_model(made["cpu"][0]), CPU, 1)
    assert modelled.extra == 3 * VALUES


def test_layers_in_float_take_half_the_rate_and_two_bytes(tmp_path: Path) -> None:
    model = read_model(write_net(tmp_path / "m.onnx", rep_net(1)))
    small, large = (
        modelled_time(
            model, replace(GPU, roofline=replace(GPU.roofline, macs_per_byte=rate)), 1
        ).layers
        for rate in (1e9, 1e-3)
    )
    values = 3 * 36 + VALUES + VALUES + VALUES
    assert small >= 2 * (values + WEIGHT + 27 * 8)
    macs = (27 * 8 + WEIGHT) * 36
    assert large >= 2e3 * macs


def test_the_report_says_what_splits_add(made: dict[str, tuple[Path, CalibrateReport]]) -> None:
    path, report = made["identity"]
    share = modelled_time(read_model(path), GPU, 1).extra_share
    assert report.extra_time == report.to_dict()["extra_time"] == share > 0
    assert f"{100 * share:.1f} % at batch 1" in str(report)
    assert made["none"][1].extra_time == 0
