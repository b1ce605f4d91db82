"""Random rep-nets in every form of sum, scaling and outer norm: one convolution a block."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from reptrt.exporter.from_module import ExportSettings, onnx_from_module
from reptrt.exporter.fuse import fuse
from reptrt.graph.net import model_from_net
from reptrt.graph.preprocess import Preprocess
from tests.support.helpers import ort_run
from tests.support.random_nets import SIZE, Plan, plans


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(plan=plans())
def test_every_block_becomes_one_convolution(plan: Plan) -> None:
    preprocess = Preprocess.plain(plan.channels, SIZE, SIZE)
    model = onnx_from_module(plan.build(), preprocess, ExportSettings(exporters=("torchscript",)))
    net, report = fuse(model, preprocess)
    ops = [node.op for node in net.graph.nodes]
    left = {"BatchNormalization", "Add", "Sub", "Div", "Concat", "ReduceSum"} & set(ops)
    assert not left - activation_ops(plan), report
    assert ops.count("Conv") == len(plan.blocks) + (plan.head == "1x1"), report
    x = torch.randn(3, plan.channels, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    (expected,), (got,) = (
        ort_run(m, {"input": x.numpy()}).values() for m in (model, model_from_net(net))
    )
    # float32 sums of a few hundred terms in another order, over at most five layers
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-5 * max(1, np.abs(expected).max()))


def activation_ops(plan: Plan) -> set[str]:
    """What a decomposed activation function consists of."""
    return {"Add", "Div"} if any(b.activation == "hardswish" for b in plan.blocks) else set()
