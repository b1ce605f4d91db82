"""Where a net comes from: a zoo name, a net of timm, a factory in Python, or an ONNX file.

A factory is code that the user names and reptrt calls; a checkpoint is data and is never executed.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from reptrt.core.errors import ConfigError, option
from reptrt.graph.net import first_free
from reptrt.graph.preprocess import Preprocess
from reptrt.sources.checkpoint import load_weights, read_checkpoint
from reptrt.sources.models import (
    ArchitectureOptions,
    build,
    is_deploy_state,
    names,
    options_from_state,
    published_input,
    training_only,
)
from reptrt.sources.module import deployable

_USUAL_SIZE = (3, 224, 224)
_TIMM = "timm:"
_CHECKPOINTS = (".pt", ".pth", ".ckpt", ".safetensors", ".bin")


@dataclass(frozen=True, slots=True)
class Source:
    """What to export.

    Raises:
        ConfigError: an ONNX file is given weights or an option of the architecture.
    """

    name: str  # zoo name | timm:NAME | module.py:factory | package.module:factory | file.onnx
    weights: Path | None = None  # checkpoint; None keeps the initial weights
    architecture: ArchitectureOptions = field(default_factory=ArchitectureOptions)
    seed: int = 0  # of the initial weights of a net of the zoo or of timm

    def __post_init__(self) -> None:
        given = ["weights"] if self.weights is not None else []
        given += self.architecture.given()
        if self.is_onnx and given:
            raise ConfigError(
                f"{self.name}: an ONNX file holds its architecture and weights, got "
                f"{option(given[0])}; leave it out"
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
    def is_timm(self) -> bool:
        """Whether the source is a net of timm."""
        return self.name.startswith(_TIMM)

    @property
    def is_factory(self) -> bool:
        """Whether the source is a function in a Python file or module."""
        return ":" in self.name and not self.is_timm and not self.is_onnx


def module_from_source(source: Source) -> nn.Module:
    """Return the net with its weights loaded: float32, on the CPU, in eval mode, unwrapped.

    Raises:
        ConfigError: the name is unknown, or the factory cannot be found or called.
        CheckpointError: the weights cannot be read or do not fit.
        MissingDependencyError: the source is a net of timm, which is not installed.
    """
    if source.is_factory:
        return _from_factory(source)
    return (_from_timm(source) if source.is_timm else _from_zoo(source)).eval()


def implied_preprocess(source: Source, size: tuple[int, int, int] | None) -> Preprocess:
    """Return the preprocessing that a torch source implies if nothing else is asked for.

    A published net has that of its family (`PublishedInput`), a net of timm what timm says; other
    nets get pixels / 255.

    Args:
        source: not an ONNX file.
        size: (C, H, W); None: what the source implies, else 3 x 224 x 224.

    Raises:
        ConfigError: the net does not take images of that size.
        MissingDependencyError: the source is a net of timm, which is not installed.
    """
    if source.is_timm:
        from reptrt.sources.timm_net import timm_preprocess

        return timm_preprocess(source.name, size)
    reads = published_input(source.name)
    if reads is None:
        return Preprocess.plain(*(size or _USUAL_SIZE))
    plain = Preprocess.plain(*(size or (3, reads.height, reads.width)))
    if plain.height % reads.multiple or plain.width % reads.multiple:
        raise ConfigError(
            f"{source.name}: {option('input_size')}: got {plain.height} x {plain.width}, expected "
            f"multiples of {reads.multiple}"
        )
    if reads.mean is None or reads.std is None:
        return replace(plain, resize=reads.resize)
    if plain.channels != len(reads.mean):
        return plain
    return replace(plain, mean=reads.mean, std=reads.std, resize=reads.resize)


def _from_zoo(source: Source) -> nn.Module:
    import torch

    if source.name.lower().endswith(_CHECKPOINTS):
        raise ConfigError(
            f"{source.name}: a checkpoint needs a network; give the network's name, such as "
            f"repvgg_a0, and {option('weights', source.name)}"
        )
    if source.name not in names() and (source.name.endswith(".py") or Path(source.name).exists()):
        raise ConfigError(
            f"{source.name}: expected a zoo name, timm:NAME, FILE.py:FACTORY, MODULE:FACTORY or an "
            ".onnx file"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source.seed)
        if source.weights is None:
            return build(source.name, source.architecture, deploy=False)
        checkpoint = read_checkpoint(source.weights)
        checkpoint = checkpoint.without(training_only(source.name))
        state = checkpoint.preferred
        options = options_from_state(source.name, source.architecture, state)
        module = build(source.name, options, deploy=is_deploy_state(state))
    load_weights(module, checkpoint)
    return module


def _from_timm(source: Source) -> nn.Module:
    import torch

    from reptrt.sources.timm_net import build_timm_net

    checkpoint = None if source.weights is None else read_checkpoint(source.weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source.seed)
        module = build_timm_net(source.name, source.architecture, checkpoint)
    if checkpoint is not None:
        load_weights(module, checkpoint)
    return module


def _from_factory(source: Source) -> nn.Module:
    given = source.architecture.given()
    if given:
        raise ConfigError(
            f"{source.name}: a factory is called without arguments, got {option(given[0])}; "
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
    module = deployable(module, source.name)
    if source.weights is not None:
        load_weights(module, read_checkpoint(source.weights))
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
