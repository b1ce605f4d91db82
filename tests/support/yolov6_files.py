"""Files as meituan/YOLOv6 writes them: the whole module, pickled under its class paths."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

_CLASSES = {  # of the parts that lie outermost; any others are read the same
    "": "yolov6.models.yolo.Model",
    "backbone": "yolov6.models.efficientrep.EfficientRep",
    "neck": "yolov6.models.reppan.RepBiFPANNeck",
    "detect": "yolov6.models.heads.effidehead_fuseab.Detect",
    "backbone.stem": "yolov6.layers.common.RepVGGBlock",
}


def save_official(path: Path, net: nn.Module, *, extra: dict[str, nn.Module], ema: bool) -> Path:
    """Write a net of the zoo as the official training script would, in half precision.

    Args:
        path: the file.
        net: with the official parameter names.
        extra: layers that the head has beside those of ``net``, by name.
        ema: store the net under "ema", and another one under "model".
    """
    with _modules():
        model = _as_official(net, "")
        for name, layers in extra.items():
            model.detect.add_module(name, layers)
        model.detect.stride = torch.tensor([8, 16, 32])  # an attribute, not a buffer
        model.half()
        other = nn.Sequential(nn.Conv2d(1, 1, 1)) if ema else model
        content = {"model": other, "ema": model if ema else None, "updates": 3, "epoch": -1}
        torch.save({**content, "optimizer": None}, path)
    return path


def _as_official(module: nn.Module, path: str) -> Any:
    """Return a copy of a module in which the outermost classes are the official ones."""
    where, _, name = _CLASSES.get(path, "torch.nn.modules.module.Module").rpartition(".")
    made: Any = getattr(sys.modules[where], name)()
    for key, child in module.named_children():
        is_plain = type(child).__module__.startswith("torch.nn.modules.") and not any(
            child.children()
        )
        inner = f"{path}.{key}" if path else key
        made.add_module(key, child if is_plain else _as_official(child, inner))
    for key, parameter in module.named_parameters(recurse=False):
        made.register_parameter(key, parameter)
    return made


@contextmanager
def _modules() -> Iterator[None]:
    """Let the official classes exist meanwhile."""
    made: list[str] = []
    for path in _CLASSES.values():
        package = path.split(".")[:-1]
        for end in range(1, len(package) + 1):
            name = ".".join(package[:end])
            if name not in sys.modules:
                sys.modules[name] = ModuleType(name)
                made.append(name)
        name = path.rpartition(".")[2]
        kind = type(name, (nn.Module,), {"__module__": ".".join(package)})
        setattr(sys.modules[".".join(package)], name, kind)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]
