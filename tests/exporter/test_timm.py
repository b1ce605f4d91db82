"""Nets of timm: as many convolutions as timm's own reparameterization, and no norm left."""

from collections import Counter

import pytest
from torch import nn

from reptrt.exporter.from_module import ExportSettings, onnx_from_module
from reptrt.exporter.fuse import fuse
from reptrt.exporter.prove import block_outputs, prove
from reptrt.graph.net import model_from_net
from reptrt.graph.preprocess import Preprocess
from tests.support.timm_nets import reparameterized, timm_net

INPUT = Preprocess.plain(3, 64, 64)
PARTS_OF_GELU = {"Div", "Add", "Mul", "Mul_1"}  # what its nodes are called in torch's files


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fastvit_t8", "repvit_m0_9", "mobileone_s0", "repvgg_a0"])
def test_what_timm_fuses_is_fused(name: str) -> None:
    module = timm_net(name, num_classes=10)
    original = onnx_from_module(module, INPUT, ExportSettings())
    net, report = fuse(original, INPUT)
    ops = Counter(node.op for node in net.graph.nodes)
    theirs = [type(part) for part in reparameterized(module).modules()]
    assert ops["Conv"] == theirs.count(nn.Conv2d)
    assert ops["Gemm"] == theirs.count(nn.Linear)
    assert not ops["BatchNormalization"]
    assert {skip.node.rpartition("/")[2] for skip in report.skipped} <= PARTS_OF_GELU
    fused = model_from_net(net)
    blocks = block_outputs(net, original, report.changed)
    assert prove(original, fused, blocks, INPUT, tolerance=1e-4, module=module).blocks
