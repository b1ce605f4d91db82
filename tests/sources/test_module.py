"""Modules in another float type or inside wrappers become what inference runs."""

import logging

import pytest
import torch
from torch import nn

from reptrt.core.errors import ConfigError
from reptrt.sources.module import deployable, deployable_copy


def small_net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    net.register_buffer("steps", torch.tensor(3))
    return net


def deep(wrap) -> nn.Module:
    return nn.ModuleDict({"body": wrap(small_net()), "head": nn.Linear(2, 2)})


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")


IMAGES = torch.rand(2, 3, 8, 8)


def test_plain_module_is_put_in_eval_mode(caplog):
    net = small_net().train()
    assert deployable(net, "net") is net
    assert not any(module.training for module in net.modules())
    assert not caplog.messages


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"], ids=str)
def test_other_float_types_become_float32_and_that_is_said(dtype, caplog):
    net = small_net().to(getattr(torch, dtype))
    got = deployable(net, "net.py:make")
    assert {value.dtype for value in got.state_dict().values()} == {torch.float32, torch.int64}
    assert got(IMAGES).dtype == torch.float32
    assert caplog.record_tuples == [
        (
            "reptrt.sources.module",
            logging.WARNING,
            f"net.py:make: weights of type {dtype} are converted to float32",
        )
    ]


def test_mixed_float_types_are_all_named(caplog):
    net = nn.Sequential(nn.Linear(2, 2).half(), nn.Linear(2, 2).double(), nn.Linear(2, 2))
    deployable(net, "net")
    assert caplog.messages == ["net: weights of type float16, float64 are converted to float32"]


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        compiled,
        torch.optim.swa_utils.AveragedModel,
        lambda net: nn.DataParallel(compiled(net)),
        lambda net: compiled(torch.optim.swa_utils.AveragedModel(net)),
    ],
    ids=["data-parallel", "compiled", "averaged", "parallel-compiled", "compiled-averaged"],
)
def test_wrappers_are_taken_off(wrap):
    expected = small_net().eval()
    got = deployable(wrap(small_net()), "net")
    assert type(got) is nn.Sequential
    assert got.state_dict().keys() == expected.state_dict().keys()
    torch.testing.assert_close(got(IMAGES), expected(IMAGES), rtol=0, atol=0)


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled], ids=["parallel", "compiled"])
def test_wrappers_inside_a_module_are_taken_off_a_copy(wrap):
    net = deep(wrap).half()
    got = deployable_copy(net)
    assert "body.0.weight" in got.state_dict()
    assert "body.0.weight" not in net.state_dict()
    assert {value.dtype for value in net.parameters()} == {torch.float16}


def test_compiling_in_place_leaves_no_trace():
    net = small_net()
    net.compile(backend="eager")
    got = deployable(net, "net")
    assert got._compiled_call_impl is None
    assert got.state_dict().keys() == net.state_dict().keys()


def complex_layer() -> nn.Module:
    return nn.Linear(2, 2, dtype=torch.complex64)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (lambda: nn.Linear(2, 2, device="meta"), "net: is on the meta device, without weights"),
        (lambda: nn.LazyLinear(2), "net: lazy layers have no weights yet; run one batch"),
        (complex_layer, "net: has complex weights, expected real numbers"),
        (
            lambda: nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)),
            "net: 0 normalizes by the statistics of each batch",
        ),
    ],
    ids=["meta", "lazy", "complex", "batch-statistics"],
)
def test_modules_without_usable_weights_are_refused(net, message):
    with pytest.raises(ConfigError, match=message):
        deployable(net(), "net")
