"""Which nodes are arithmetic of an activation function, and which only stand beside one."""

import numpy as np
import pytest
import torch
from torch import nn

import reptrt
from reptrt.graph.net import net_from_model
from reptrt.rewrite.activations import nodes_in_activations
from tests.rewrite.test_absorb_affines import norm
from tests.support.onnx_nets import Builder


def constants(b: Builder, **values: float) -> None:
    for name, value in values.items():
        b.channels[b.constant(name, np.float32(value))] = 0


def test_gelu_by_tanh() -> None:
    b = Builder(channels=4)
    constants(b, three=3.0, cubic=0.045, root=0.8, one=1.0, half=0.5)
    x = norm(b, b.relu("x"), "bn")
    cube = b.node("Mul", [b.node("Pow", [x, "three"], "p"), "cubic"], "c")
    inner = b.node("Mul", [b.node("Add", [x, cube], "s"), "root"], "r")
    outer = b.node("Add", [b.node("Tanh", [inner], "t"), "one"], "o")
    y = b.node("Mul", [b.node("Mul", [x, outer], "m"), "half"], "h")
    graph = net_from_model(b.model(b.node("Mul", [b.relu(y), "half"], "later"))).graph
    assert nodes_in_activations(graph) == set("pcsrtoh")


def test_a_gate_and_a_residual_sum_are_none() -> None:
    b = Builder(channels=4)
    constants(b, two=2.0)
    gate = b.node("Sigmoid", [b.conv(b.node("GlobalAveragePool", ["x"], "pool"), 4, "c", 1)], "g")
    y = b.node("Mul", [b.node("Mul", ["x", gate], "m"), "two"], "scaled")
    y = b.node("Add", [y, b.node("Mul", [y, "two"], "twice")], "sum")
    assert nodes_in_activations(net_from_model(b.model(y)).graph) == frozenset()


def test_a_norm_before_an_activation_is_not_inside() -> None:
    b = Builder(channels=4)
    x = norm(b, b.relu("x"), "bn")
    y = b.node("Mul", [x, b.node("Sigmoid", [x], "g")], "silu")
    assert nodes_in_activations(net_from_model(b.model(y)).graph) == {"g"}


@pytest.mark.parametrize("function", [nn.GELU, nn.Hardswish, nn.SiLU, nn.Mish, nn.Softplus])
def test_export_names_nothing_of_them(function: type[nn.Module]) -> None:
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), function(), nn.Conv2d(8, 4, 1)
    exported = reptrt.export(nn.Sequential(*parts).eval(), input_size=(3, 8, 8))
    assert not exported.report.skipped
