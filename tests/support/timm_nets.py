"""Nets of timm, whose code needs no more of torchvision than that it can be imported."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import nn


class _Empty(type):
    """A class with any attribute, each a class like it."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Empty(name, (), {})
        setattr(cls, name, made)
        return made


class _StandIn(ModuleType):
    """A module with any name in it, each an empty class."""

    __path__: ClassVar[list[str]] = []
    __file__ = "stand-in for torchvision"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Empty(name, (), {})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def _torchvision() -> Iterator[None]:
    """Let torchvision be importable while timm is imported, if it is not installed."""
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n, m in sys.modules.items() if isinstance(m, _StandIn)]:
            del sys.modules[name]


def timm_net(name: str, **options: Any) -> nn.Module:
    """Return a net of timm in eval mode, its batch norms with statistics that matter."""
    with _torchvision():
        timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    module: nn.Module = timm.create_model(name, pretrained=False, **options)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.1)
            nn.init.normal_(part.running_mean, std=0.1)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    return module.eval()


def reparameterized(module: nn.Module) -> nn.Module:
    """Return what timm's own reparameterization makes of a net."""
    from timm.utils.model import reparameterize_model

    return reparameterize_model(module)
