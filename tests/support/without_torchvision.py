"""Import timm where torchvision is not installed; timm's models do not need its code."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

_PARTS = (
    *("", ".datasets", ".models", ".models.feature_extraction", ".ops", ".ops.misc"),
    *(".transforms", ".transforms.functional", ".utils"),
)


class _Anything(type):
    """A class whose attributes are such classes too; they stand for base classes and functions."""

    def __getattr__(cls, name: str) -> "_Anything":
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Empty(ModuleType):
    __version__ = "0"
    __path__: list[str] = []  # noqa: RUF012 - the import system reads it

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


def import_timm() -> ModuleType:
    """Import timm with empty modules in place of torchvision; skip the test without timm."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    if "timm" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        names = [f"torchvision{part}" for part in _PARTS]
        modules = {name: _Empty(name) for name in names}
        for name, module in modules.items():
            module.__spec__ = ModuleSpec(name, None)
        sys.modules.update(modules)
        try:
            return importlib.import_module("timm")
        finally:
            for name in names:
                del sys.modules[name]
    return importlib.import_module("timm")
