"""Nets of timm by their names there: ``timm:repvgg_a0``, ``timm:repvgg_a0.rvgg_in1k``.

timm is optional and imported when a source asks for it. A name with a tag (``.rvgg_in1k``) stands
for pretrained weights, as it does in timm: they come from its download cache or the Hugging Face
hub. A name without a tag stands for the architecture, with weights from a checkpoint.
"""

import difflib
import importlib
import logging
from dataclasses import replace
from types import ModuleType
from typing import Any

from torch import nn

from reptrt.core.errors import CheckpointError, ConfigError, MissingDependencyError, option
from reptrt.graph.preprocess import CROP_FRACTION, Preprocess
from reptrt.sources.checkpoint import Checkpoint
from reptrt.sources.models import num_classes_of
from reptrt.sources.options import ArchitectureOptions

logger = logging.getLogger(__name__)

PREFIX = "timm:"  # of the names of such sources
_TAKES = ("num_classes", "in_channels")


def build_timm_net(
    source: str, architecture: ArchitectureOptions, checkpoint: Checkpoint | None
) -> nn.Module:
    """Return a net of timm, without the weights of the checkpoint.

    Args:
        source: ``timm:NAME`` or ``timm:NAME.TAG``.
        architecture: ``num_classes`` and ``in_channels`` only.
        checkpoint: says the number of classes if the options do not; no pretrained weights are
            loaded if it is given.

    Raises:
        MissingDependencyError: timm is not installed.
        ConfigError: timm has no such net, or an option does not apply.
        CheckpointError: the pretrained weights cannot be loaded.
    """
    timm = _import_timm(source)
    name = source.removeprefix(PREFIX)
    _check(timm, source, name, architecture)
    num_classes = architecture.num_classes
    if checkpoint is not None and num_classes is None:
        num_classes = num_classes_of(checkpoint.preferred, f"{_head(timm, name)}.weight")
    choices = {"num_classes": num_classes, "in_chans": architecture.in_channels}
    arguments = {key: value for key, value in choices.items() if value is not None}
    if checkpoint is not None or "." not in name:
        if checkpoint is None:
            logger.warning(
                "%s: random weights; give a checkpoint, or a name with pretrained weights (%s)",
                *(source, ", ".join(_tagged(timm, name)) or "timm has none of this net"),
            )
        return _create(timm, source, arguments, pretrained=False)
    try:
        return _create(timm, source, arguments, pretrained=True)
    except ConfigError as err:
        raise CheckpointError(
            f"{err}; check the network, or download the weights and give {option('weights')}"
        ) from err


def timm_preprocess(source: str, size: tuple[int, int, int] | None) -> Preprocess:
    """Return the preprocessing that timm gives for a net: size, mean, std, centre crop.

    Args:
        source: ``timm:NAME`` or ``timm:NAME.TAG``.
        size: (C, H, W), instead of timm's.

    Raises:
        MissingDependencyError: timm is not installed.
    """
    config = _config(_import_timm(source), source.removeprefix(PREFIX))
    if config.crop_pct != CROP_FRACTION or config.interpolation != "bilinear":
        logger.warning(
            "%s: timm evaluates it with crop %g, %s; images of other sizes are resized with crop "
            "%g, bilinear, which can change its accuracy a little",
            *(source, config.crop_pct, config.interpolation, CROP_FRACTION),
        )
    base = Preprocess.plain(*(size or config.input_size))
    if base.channels != len(config.mean):
        return base
    return replace(base, mean=tuple(config.mean), std=tuple(config.std), resize="crop")


def _create(
    timm: ModuleType, source: str, arguments: dict[str, Any], *, pretrained: bool
) -> nn.Module:
    try:
        module = timm.create_model(source.removeprefix(PREFIX), pretrained=pretrained, **arguments)
    except Exception as err:  # each of timm's architectures has its own errors
        reason = " ".join(str(err).split())[:200]
        raise ConfigError(f"{source}: timm raised {type(err).__name__}: {reason}") from err
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{source}: timm returned a {type(module).__name__}")
    return module


def _import_timm(source: str) -> ModuleType:
    try:
        return importlib.import_module("timm")
    except ImportError as err:
        raise MissingDependencyError(
            f"{source}: timm cannot be imported ({err}): pip install 'reptrt[timm]'"
        ) from err


def _check(timm: ModuleType, source: str, name: str, architecture: ArchitectureOptions) -> None:
    untaken = [option(field) for field in architecture.given() if field not in _TAKES]
    if untaken:
        raise ConfigError(
            f"{source}: got {', '.join(untaken)}, expected only "
            f"{', '.join(map(option, _TAKES))}; leave the others out"
        )
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        nearest = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.6)
        hint = f"did you mean {', '.join(nearest)}?" if nearest else "see timm.list_models()"
        raise ConfigError(f"{source}: timm has no net {base!r}; {hint}")
    if tag and name not in _tagged(timm, base):
        tagged = ", ".join(_tagged(timm, base)) or "none"
        raise ConfigError(f"{source}: timm has no weights {tag!r}; it has {tagged}")


def _tagged(timm: ModuleType, base: str) -> list[str]:
    """Return the names with tags under which timm has weights of an architecture."""
    names: list[str] = timm.list_models(f"{base}.*", pretrained=True)
    return names


def _config(timm: ModuleType, name: str) -> Any:
    return timm.get_pretrained_cfg(name)


def _head(timm: ModuleType, name: str) -> str:
    """Return the name of the layer that yields the classes; the first one if there are several."""
    head = _config(timm, name).classifier
    return str(head if isinstance(head, str) else next(iter(head or ("",))))
