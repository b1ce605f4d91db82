"""Where a network comes from: a zoo name, a factory in a Python file or module, an ONNX file.

A factory is code that the user names and we call; a checkpoint is data and is never executed.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from reptrt.core.errors import ConfigError
from reptrt.graph.net import first_free
from reptrt.sources.checkpoint import load_state_dict, load_weights
from reptrt.sources.models import (
    ArchitectureOptions,
    build,
    is_deploy_state,
    is_variant,
    names,
    options_from_state,
)
from reptrt.sources.options import flag


@dataclass(frozen=True, slots=True)
class Source:
    """What to export."""

    name: str  # zoo name | module.py:factory | package.module:factory | file.onnx
    weights: Path | None = None  # checkpoint; None keeps the initial weights
    architecture: ArchitectureOptions = field(default_factory=ArchitectureOptions)
    seed: int = 0  # of the initial weights of a zoo net

    def __post_init__(self) -> None:
        given = ["--weights"] if self.weights is not None else []
        given += [flag(name) for name in self.architecture.given()]
        if self.is_onnx and given:
            raise ConfigError(
                f"{self.name}: an ONNX file holds its architecture and weights, got {given[0]}; "
                "leave it out"
            )

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold weights."""
        files = (Path(self.name) if self.is_onnx else None, self.weights)
        return tuple(path for path in files if path is not None)

    @property
    def is_onnx(self) -> bool:
        """Whether the source is an ONNX file rather than a torch module."""
        return self.name.lower().endswith(".onnx")

    @property
    def is_imagenet_variant(self) -> bool:
        """Whether the source is a published ImageNet net, with the preprocessing that implies."""
        return is_variant(self.name)


def module_from_source(source: Source) -> nn.Module:
    """Return the net in eval mode with its weights loaded.

    Raises:
        ConfigError: the name is unknown, or the factory cannot be found or called.
        CheckpointError: the weights cannot be read or do not fit.
    """
    module = _from_factory(source) if ":" in source.name else _from_zoo(source)
    return module.eval()


def _from_zoo(source: Source) -> nn.Module:
    import torch

    if source.name not in names() and (source.name.endswith(".py") or Path(source.name).exists()):
        raise ConfigError(
            f"{source.name}: expected a zoo name, FILE.py:FACTORY, MODULE:FACTORY or an .onnx file"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source.seed)
        if source.weights is None:
            return build(source.name, source.architecture, deploy=False)
        state = load_state_dict(source.weights)
        options = options_from_state(source.name, source.architecture, state)
        module = build(source.name, options, deploy=is_deploy_state(state))
    load_weights(module, state, str(source.weights))
    return module


def _from_factory(source: Source) -> nn.Module:
    given = source.architecture.given()
    if given:
        raise ConfigError(
            f"{source.name}: a factory is called without arguments, got {flag(given[0])}; "
            "set it inside the factory"
        )
    path, _, attribute = source.name.rpartition(":")
    factory = _find_factory(path, attribute)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            module = factory()
    except (Exception, SystemExit) as err:  # a user's function may raise anything
        raise ConfigError(f"{source.name}: the factory raised {type(err).__name__}: {err}") from err
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"{source.name}: the factory returned {type(module).__name__}, expected torch.nn.Module"
        )
    if source.weights is not None:
        load_weights(module, load_state_dict(source.weights), str(source.weights))
    return module


def _find_factory(path: str, attribute: str) -> Callable[[], Any]:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            module = _import_file(Path(path)) if path.endswith(".py") else _import_module(path)
    except ConfigError:
        raise
    except (Exception, SystemExit) as err:  # importing runs the user's code
        raise ConfigError(f"{path}: cannot be imported ({type(err).__name__}: {err})") from err
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ConfigError(f"{path}: has no callable named {attribute!r}; expected a factory")
    return factory  # type: ignore[no-any-return]


def _import_module(name: str) -> ModuleType:
    if "" not in sys.path:
        sys.path.insert(0, "")  # like `python -m`: packages in the current folder are found
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; expected a Python file with a factory")
    name = first_free(path.stem, sys.modules)  # a file called json.py does not replace json
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # modules beside the file can be imported
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
