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

# Three seeds gave 28.6 to 29.7 dB with squeeze-excite and 29.4 to 30.6 dB without, on 26 layers and
# 10; agreement was 0.000 to 0.011 lower. With one of them all channels of one squeeze were zero on
# every image, so that the layer behind it stays in float.
LEAST_DB, MARGIN_DB, MARGIN_AGREEMENT = 25.0, 5.0, 0.04


class Pair(NamedTuple):
    exported: Exported
    int8: Calibrated


def pair(se_blocks: tuple[int, ...], seed: int, monkeypatch: pytest.MonkeyPatch) -> Pair:
    tool = load_tool("train_digits")
    monkeypatch.setattr(tool, "EPOCHS", 4)
    torch.manual_seed(seed)
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
@pytest.mark.parametrize("seed", [1, 3])
def test_a_net_with_it_is_as_accurate_as_the_one_without(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = digits.load_digits().held_out.x
    nets = [pair(se_blocks, seed, monkeypatch) for se_blocks in ((0, 0, 0), (1, 2, 1))]
    outputs = [(np.asarray(net.exported(x)), np.asarray(net.int8(x))) for net in nets]
    without, with_it = (sqnr_db(*values) for values in outputs)
    assert with_it > max(LEAST_DB, without - MARGIN_DB)
    same = [agreement(*values) for values in outputs]
    assert same[1] > same[0] - MARGIN_AGREEMENT

    exported, int8 = nets[1]
    operators = [node.op_type for node in exported.proto.graph.node]
    assert "BatchNormalization" not in operators
    assert operators.count("Conv") == 1 + 2 * 4 + 2 * 8  # stem, blocks, two in each gate
    assert not exported.report.skipped
    idle = int8.report.idle
    assert len(idle) == len(int8.report.dead)
    assert all(layer.endswith("se.expand") for layer in idle)
    report = reptrt.lint(int8)
    assert (report.layers, report.int8_layers) == (26, 26 - len(idle))
    assert {finding.severity for finding in report.findings} <= {"info", "warning"}
    assert all(f.severity == "info" or f.node in idle for f in report.findings), report.findings
    batch = (x[:64].astype(np.float32) / 255 - digits.MEAN[0]) / digits.STD[0]
    with int8_runner(int8.proto, torch.device("cpu")) as simulation:
        (simulated,) = simulation.run(batch.astype(np.float32)).values()
    assert sqnr_db(outputs[1][1][:64], simulated) > 50
