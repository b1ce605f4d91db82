"""Random rep-nets in every form of sum, scaling and outer norm: one convolution a block."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings

from reptrt.exporter.from_module import ExportSettings, onnx_from_module
from reptrt.exporter.fuse import fuse
from reptrt.graph.net import model_from_net
from reptrt.graph.preprocess import Preprocess
from reptrt.graph.trained import take_trained
from tests.support.helpers import ort_run
from tests.support.qdq_nets import with_outputs
from tests.support.random_nets import SIZE, Plan, plans


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(plan=plans())
def test_every_block_becomes_one_convolution(plan: Plan) -> None:
    preprocess = Preprocess.plain(plan.channels, SIZE, SIZE)
    model = onnx_from_module(plan.build(), preprocess, ExportSettings(exporters=("torchscript",)))
    original = onnx.ModelProto()
    original.CopyFrom(model)
    net, report = fuse(model, preprocess)
    ops = [node.op for node in net.graph.nodes]
    left = {"BatchNormalization", "Add", "Sub", "Div", "Concat", "ReduceSum"} & set(ops)
    assert not left - activation_ops(plan), report
    assert ops.count("Conv") == len(plan.blocks) + (plan.head == "1x1"), report
    x = torch.randn(3, plan.channels, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    known = take_trained(net)  # by name: these tensors must be what they were before fusion
    expected, got = (
        ort_run(with_outputs(m, [*known]), {"input": x.numpy()})
        for m in (original, model_from_net(net))
    )
    assert got.keys() == expected.keys() > known.keys()
    for name, value in expected.items():
        # float32 sums of a few hundred terms in another order, over at most five layers
        atol = 3e-5 * max(1, np.abs(value).max())
        np.testing.assert_allclose(got[name], value, rtol=0, atol=atol)


def activation_ops(plan: Plan) -> set[str]:
    """What a decomposed activation function consists of."""
    return {"Add", "Div"} if any(b.activation == "hardswish" for b in plan.blocks) else set()
