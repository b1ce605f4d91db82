"""Squeeze-excite: a small MobileOne, trained on digits with and without, is held to one bound."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

import reptrt
from reptrt.core.metrics import agreement, sqnr_db
from reptrt.demo import digits
from reptrt.execute.torch_runner import int8_runner
from reptrt.pipeline.values import Calibrated, Exported
from reptrt.sources.models import build
from reptrt.sources.options import ArchitectureOptions
from tests.support.helpers import load_tool

# SQNR without less SQNR with squeeze-excite, which has 26 layers instead of 10: 5.5 dB with
# seed 0 (10 epochs), 5.0 dB with seed 2 (4 epochs). Agreement differed by less than 0.015. With
# seeds 1 and 3 all channels of one squeeze are zero on every image, which calibrate refuses.
MARGIN_DB, MARGIN_AGREEMENT = 8.0, 0.04


class Pair(NamedTuple):
    exported: Exported
    int8: Calibrated


def pair(se_blocks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> Pair:
    tool = load_tool("train_digits")
    monkeypatch.setattr(tool, "EPOCHS", 4)
    torch.manual_seed(2)
    architecture = ArchitectureOptions(
        widths=(32, 48, 64, 64),
        blocks=(1, 2, 1),
        strides=(1, 1, 2, 2),
        branches=2,
        se_blocks=se_blocks,
        num_classes=10,
        in_channels=1,
    )
    module = build("mobileone", architecture, deploy=False)
    images = digits.load_digits().train
    tool.train(module, images)
    exported = reptrt.export(module, input_size=digits.INPUT_SIZE, mean=digits.MEAN, std=digits.STD)
    return Pair(exported, reptrt.calibrate(exported, images.x))


@pytest.mark.slow
def test_a_net_with_it_is_as_accurate_as_the_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    x = digits.load_digits().held_out.x
    nets = [pair(se_blocks, monkeypatch) for se_blocks in ((0, 0, 0), (1, 2, 1))]
    outputs = [(np.asarray(net.exported(x)), np.asarray(net.int8(x))) for net in nets]
    without, with_it = (sqnr_db(*values) for values in outputs)
    assert with_it > max(20.0, without - MARGIN_DB)
    same = [agreement(*values) for values in outputs]
    assert same[1] > same[0] - MARGIN_AGREEMENT

    exported, int8 = nets[1]
    operators = [node.op_type for node in exported.proto.graph.node]
    assert "BatchNormalization" not in operators
    assert operators.count("Conv") == 1 + 2 * 4 + 2 * 8  # stem, blocks, two in each gate
    assert not exported.report.skipped
    report = reptrt.lint(int8)
    assert report.int8_layers == report.layers == 26
    assert {finding.severity for finding in report.findings} <= {"info"}
    batch = (x[:64].astype(np.float32) / 255 - digits.MEAN[0]) / digits.STD[0]
    with int8_runner(int8.proto, torch.device("cpu")) as simulation:
        (simulated,) = simulation.run(batch.astype(np.float32)).values()
    assert sqnr_db(outputs[1][1][:64], simulated) > 60
