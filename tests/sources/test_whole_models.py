"""Whole models pickled by torch.save yield their state dict where their classes do not exist."""

import importlib
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from reptrt.core.errors import CheckpointError
from reptrt.sources.checkpoint import load_weights, read_checkpoint
from tests.support.bystander import watched

CODE = """
import torch
from torch import nn


class Scale(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(channels))
        self.register_buffer("cache", torch.zeros(3), persistent=False)
        self.register_buffer("offset", torch.rand(channels))
        self.register_buffer("nothing", None)
        self.register_parameter("bias", None)
        self.anchors = torch.rand(4)  # an attribute, not a buffer
        self.act = torch.nn.functional.silu
        self.owner = [lambda_free]

    def forward(self, x):
        return self.act(x * self.gain[:, None, None] + self.offset[:, None, None])


def lambda_free(x):
    return x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.scale = Scale(4)
        self.twice = self.scale
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(11))
        self.head = nn.ModuleDict({"cls": nn.Linear(4, 2), "none": nn.Identity()})
        self.absent = None
        self.names = {0: "cat", 1: "dog"}
        self.yaml = {"nc": 2, "depth": 0.33}

    def __getstate__(self):
        return dict(self.__dict__)


class Slotted:
    __slots__ = ("ema", "updates")


class ModelEMA:
    def __init__(self, ema):
        self.ema, self.updates = ema, 7
        self.decay = {"value": 0.9}
"""


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return a module of classes that `forget` takes away."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "their_models.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.delitem(sys.modules, "their_models", raising=False)
    return importlib.import_module("their_models")


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the classes impossible to import."""
    monkeypatch.setitem(sys.modules, "their_models", None)
    with pytest.raises(ImportError):
        importlib.import_module("their_models")


def trained(module: ModuleType) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = module.Net()
    net.stem[1].running_mean.uniform_()
    return net.eval()


def assert_read(path: Path, state: dict[str, torch.Tensor], location: str = "") -> None:
    with watched() as events:
        checkpoint = read_checkpoint(path)
    assert not events
    got = checkpoint.states[location]
    assert list(got) == list(state)
    for name, value in state.items():
        assert got[name].dtype == value.dtype
        torch.testing.assert_close(got[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("protocol", [2, 4, 5], ids=str)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_state_dict_of_a_module_whose_class_is_gone(
    tmp_path: Path, other: ModuleType, monkeypatch: pytest.MonkeyPatch, zipped: bool, protocol: int
) -> None:
    net, path = trained(other), tmp_path / "a.pt"
    torch.save(net, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    forget(monkeypatch)
    assert_read(path, net.state_dict())


def yolov6(net: nn.Module, ema: nn.Module | None) -> dict[str, Any]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return {
        "model": net.half(),
        "ema": ema and ema.half(),
        "updates": 10,
        "optimizer": optimizer.state_dict(),
        "epoch": -1,
        "results": (0.3, 0.4),
    }


def ultralytics(net: nn.Module, ema: nn.Module | None) -> dict[str, Any]:
    return {
        "epoch": -1,
        "best_fitness": None,
        "model": net.half() if ema is None else None,
        "ema": ema and ema.half(),
        "updates": None,
        "optimizer": None,
        "train_args": {"imgsz": 640, "data": "coco.yaml"},
        "train_metrics": {"mAP50": 0.5},
        "date": "2024-01-02T03:04:05",
        "license": "AGPL-3.0",
    }


@pytest.mark.parametrize("layout", [yolov6, ultralytics], ids=["yolov6", "ultralytics"])
@pytest.mark.parametrize("averaged", [True, False], ids=["ema", "model"])
def test_detectors_own_files_load_into_a_net_of_the_same_names(
    tmp_path: Path,
    other: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    layout: Callable[..., dict[str, Any]],
    averaged: bool,
) -> None:
    raw, best, target = other.Net(), trained(other), other.Net()
    content = layout(raw, best) if averaged else layout(best, None)
    torch.save(content, tmp_path / "a.pt")
    forget(monkeypatch)
    load_weights(target, read_checkpoint(tmp_path / "a.pt"))
    expected = best.float().state_dict()
    assert all(torch.equal(value, expected[k]) for k, value in target.state_dict().items())
    said = [message.partition(": ")[2] for message in caplog.messages]
    both = averaged and layout is yolov6
    assert said == (["taking the weights in ema, not model"] if both else [])


@pytest.mark.parametrize(
    ("wrap", "location"),
    [
        (lambda net, _: nn.DataParallel(net), ""),
        (lambda net, other: {"ema": other.ModelEMA(net)}, "ema.ema"),
        (lambda net, other: slotted(net, other), "ema"),
        (lambda net, _: {"a": {"b": {"c": net}}}, "a.b.c"),
    ],
    ids=["data-parallel", "object", "slots", "nested"],
)
def test_modules_inside_other_things(
    tmp_path: Path,
    other: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    wrap: Callable[..., Any],
    location: str,
) -> None:
    net, target = trained(other), other.Net()
    torch.save(wrap(net, other), tmp_path / "a.pt")
    forget(monkeypatch)
    checkpoint = read_checkpoint(tmp_path / "a.pt")
    assert list(checkpoint.states) == [location]
    load_weights(target, checkpoint)
    expected = net.state_dict()
    assert all(torch.equal(value, expected[k]) for k, value in target.state_dict().items())


def slotted(net: nn.Module, other: ModuleType) -> Any:
    made = other.Slotted()
    made.ema, made.updates = net, 3
    return made


def test_traced_graph_of_torch_fx(tmp_path: Path) -> None:
    net = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    torch.save(net, tmp_path / "fx.pt")
    assert_read(tmp_path / "fx.pt", net.state_dict())


def test_module_that_contains_itself_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(1, 1))
    net._modules["again"] = net
    torch.save(net, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="a module that contains itself"):
        read_checkpoint(tmp_path / "a.pt")


def test_module_without_weights_is_refused(tmp_path: Path) -> None:
    torch.save({"model": nn.ReLU()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"'model': torch\.nn\.modules\.activation\.ReLU"):
        read_checkpoint(tmp_path / "a.pt")


def test_tensors_that_share_memory_are_views_of_one_storage(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state = {"base": base, "row": base[1], "t": base.t(), "step": base[::2, 1::2], "e": base[:0]}
    for zipped in (True, False):
        torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        got = read_checkpoint(tmp_path / "a.pt").states[""]
        assert all(torch.equal(got[name], value) for name, value in state.items())
        assert got["row"].untyped_storage().data_ptr() == got["base"].untyped_storage().data_ptr()


def test_files_of_big_endian_machines_are_read(tmp_path: Path) -> None:
    state = {"a": torch.arange(6.0), "b": torch.tensor([1, -2]), "c": torch.tensor([1.5]).half()}
    torch.save(state, tmp_path / "little.pt")
    sizes = {"data/0": 4, "data/1": 8, "data/2": 2}
    with (
        zipfile.ZipFile(tmp_path / "little.pt") as little,
        zipfile.ZipFile(tmp_path / "big.pt", "w") as big,
    ):
        for name in little.namelist():
            content, part = little.read(name), name.partition("/")[2]
            if part in sizes:
                content = np.frombuffer(content, f"<u{sizes[part]}").byteswap().tobytes()
            big.writestr(name, b"big" if part == "byteorder" else content)
    assert_read(tmp_path / "big.pt", state)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.uint32], ids=str)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_types_without_a_storage_class_are_read(
    tmp_path: Path, dtype: torch.dtype, zipped: bool
) -> None:
    value = torch.tensor([1.0, 2.0, 8.0, 4.0]).to(dtype)
    state = {"a": value, "b": value.reshape(2, 2).t()}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with watched() as events:
        got = read_checkpoint(tmp_path / "a.pt").states[""]
    assert not events
    assert {tensor.dtype for tensor in got.values()} == {dtype}
    assert got["a"].double().tolist() == [1.0, 2.0, 8.0, 4.0]
    assert got["b"].double().tolist() == [[1.0, 8.0], [2.0, 4.0]]
