"""YOLOv6 through export: static decoding for any batch, everything fused, the same outputs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from reptrt.graph.net import net_from_model
from reptrt.graph.preprocess import stored_preprocess
from reptrt.pipeline import export_net
from reptrt.pipeline.options import ExportOptions
from reptrt.sources.options import ArchitectureOptions
from reptrt.sources.source import Source, module_from_source
from tests.support.helpers import ort_run

SMALL = ArchitectureOptions(
    widths=(8, 8, 16, 16, 16, 16, 8, 8, 16, 16, 16), blocks=(1, 2, 1, 1, 2, 1, 1, 1), num_classes=3
)
# Operators of graphs that work out shapes while they run.
DYNAMIC = {"Shape", "Range", "ConstantOfShape", "Expand", "Gather", "Unsqueeze", "Where"}


@pytest.mark.parametrize("head", ["decoded", "raw"])
@pytest.mark.parametrize("csp", [None, pytest.param(0.5, marks=pytest.mark.slow)], ids=str)
def test_export_is_static_fused_and_equal(csp: float | None, head: str) -> None:
    options = replace(SMALL, csp=csp, dfl=csp is not None, head=head)
    source = Source("yolov6", architecture=options)
    exported = export_net(source, ExportOptions(input_size=(3, 64, 96)))
    ops = {node.op_type for node in exported.proto.graph.node}
    assert not ops & {*DYNAMIC, "BatchNormalization"}
    assert not exported.report.skipped
    module = module_from_source(source)
    for batch in (1, 3):
        images = np.random.default_rng(batch).random((batch, 3, 64, 96), dtype=np.float32)
        got = ort_run(exported.proto, {"input": images})
        with torch.no_grad():
            result = module(torch.from_numpy(images))
        expected = {"output": result} if head == "decoded" else result
        assert list(got) == list(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-3)
    preprocess = stored_preprocess(net_from_model(exported.proto))
    assert preprocess is not None
    assert preprocess.resize == "letterbox"


# Rep blocks: the stem, four with stride 2, those of the stages; in M two in each residual pair, of
# which a stage of n blocks has n // 2; L has convolutions with SiLU instead.
BLOCKS = {
    "yolov6n": 5 + (2 + 4 + 6 + 2) + 4 * 4,
    "yolov6m": 5 + 2 * (4 // 2 + 7 // 2 + 11 // 2 + 4 // 2) + 2 * 4 * (7 // 2),
    "yolov6l": 0,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_the_published_nets_are_fused_completely(name: str) -> None:
    exported = export_net(Source(name), ExportOptions(input_size=(3, 32, 32)))
    ops = [node.op_type for node in exported.proto.graph.node]
    assert "BatchNormalization" not in ops
    assert not exported.report.skipped
    assert len(exported.report.proof.blocks) == BLOCKS[name]
