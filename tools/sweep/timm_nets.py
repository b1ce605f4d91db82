"""Nets of timm, whose model code needs no more of torchvision than that it can be imported."""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn

_PARTS = (
    *("", ".datasets", ".models", ".models.feature_extraction", ".ops", ".ops.misc"),
    *(".transforms", ".transforms.functional", ".utils"),
)


class _Anything(type):
    """A class whose every attribute is another such class: base classes, enums, functions."""

    def __getattr__(cls, name: str) -> "_Anything":
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _StandIn(ModuleType):
    """A module that has every name."""

    __version__ = "0"
    __path__: list[str] = []  # noqa: RUF012 - the import system reads it

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


def build_timm_net(name: str) -> nn.Module:
    """Return a net of timm with its own random weights and ten classes."""
    timm = _import_timm()
    module: nn.Module = timm.create_model(name, pretrained=False, num_classes=10)
    return module


def reparameterized(module: nn.Module) -> nn.Module:
    """Return what timm's own reparameterization makes of a copy of a net."""
    result: Any = importlib.import_module("timm.utils.model").reparameterize_model(module)
    fused: nn.Module = result
    return fused


def _import_timm() -> ModuleType:
    """Import timm, with stand-ins in the place of torchvision where that is not installed."""
    if "timm" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module("timm")
    modules = {name: _StandIn(name) for name in (f"torchvision{part}" for part in _PARTS)}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
    sys.modules.update(modules)
    try:
        return importlib.import_module("timm")
    finally:
        for name in modules:
            del sys.modules[name]
