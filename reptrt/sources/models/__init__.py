"""The zoo: architectures by name, with the parameter names of their official repositories.

A family name (``repvgg``, ``mobileone``) takes free widths, blocks and strides; a named variant
(``repvgg_a0``, ``mobileone_s4``) is the published ImageNet net: 1000 classes, 3 x 224 x 224.
``yolov6n`` and its like are the published COCO detectors: 80 classes, 3 x 640 x 640.
A new architecture is one new file and one line in the table below.
"""

import difflib
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from reptrt.core.errors import ConfigError, option
from reptrt.sources.models import mobileone, repvgg, yolov6
from reptrt.sources.options import Architecture, ArchitectureOptions, PublishedInput

__all__ = [
    "ArchitectureOptions",
    "build",
    "is_deploy_state",
    "is_variant",
    "names",
    "num_classes_of",
    "options_from_state",
    "published_input",
    "training_only",
]

_ARCHITECTURES: Mapping[str, Architecture] = {
    "repvgg": repvgg.ARCHITECTURE,
    "mobileone": mobileone.ARCHITECTURE,
    "yolov6": yolov6.ARCHITECTURE,
}


def names() -> tuple[str, ...]:
    """Return every name that `build` knows, each family before its variants."""
    return tuple(
        name
        for family, architecture in _ARCHITECTURES.items()
        for name in (family, *architecture.variants)
    )


def is_variant(name: str) -> bool:
    """Return whether a name is a published net."""
    return name in names() and name not in _ARCHITECTURES


def published_input(name: str) -> PublishedInput | None:
    """Return the images that a net of the zoo reads by default; None for a free form or others."""
    if name not in names():
        return None
    reads = _find(name)[1].reads
    return reads if is_variant(name) or reads.also_free else None


def training_only(name: str) -> tuple[str, ...]:
    """Return the parts of parameter names that only training uses.

    Raises:
        ConfigError: no architecture has that name.
    """
    return _find(name)[1].training_only


def is_deploy_state(state: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a state dict holds the fused (deploy) form of a net of the zoo."""
    markers = [architecture.deploy_marker for architecture in _ARCHITECTURES.values()]
    return any(marker in f".{key}" for key in state for marker in markers)


def options_from_state(
    name: str, options: ArchitectureOptions, state: Mapping[str, torch.Tensor]
) -> ArchitectureOptions:
    """Return the options, with what a state dict says where they leave it open.

    That is the number of classes, and what else the architecture reads from its weights.

    Raises:
        ConfigError: no architecture has that name.
    """
    architecture = _find(name)[1]
    if options.num_classes is None:
        num_classes = num_classes_of(state, architecture.head_weight)
        options = replace(options, num_classes=num_classes)
    return architecture.infer(options, state) if architecture.infer else options


def num_classes_of(state: Mapping[str, torch.Tensor], head_weight: str) -> int | None:
    """Return the length of the last layer's weight in a state dict, whatever its prefix.

    None if there is no such weight, or if several differ in length.
    """
    lengths = {
        len(value)
        for name, value in state.items()
        if f".{name}".endswith(f".{head_weight}") and value.ndim and len(value)
    }
    return lengths.pop() if len(lengths) == 1 else None


def build(name: str, options: ArchitectureOptions, *, deploy: bool) -> nn.Module:
    """Return a net in train mode, randomly initialised from torch's global generator.

    Args:
        name: one of `names`.
        options: a variant takes only what does not make another net of it.
        deploy: build the fused form (one convolution per block) instead of the train form.

    Raises:
        ConfigError: an unknown name, an option that this name does not take, or lists that do not
            fit each other.
    """
    family, architecture = _find(name)
    variant = architecture.variants.get(name)
    if variant is None:
        _refuse_untaken(name, options, architecture.takes, remedy="leave the others out")
    else:
        takes = architecture.variant_takes
        _refuse_untaken(name, options, takes, remedy=f"{family!r} is the free form")
        options = replace(variant, **{field: getattr(options, field) for field in options.given()})
    return architecture.build(options, deploy)


def _find(name: str) -> tuple[str, Architecture]:
    """Return the family that a name belongs to, and its architecture."""
    for family, architecture in _ARCHITECTURES.items():
        if name == family or name in architecture.variants:
            return family, architecture
    wanted = name.lower().replace("-", "_")
    nearest = difflib.get_close_matches(wanted, names(), n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(nearest)}?" if nearest else f"known: {', '.join(names())}"
    raise ConfigError(f"architecture {name!r} is not known; {hint}")


def _refuse_untaken(
    name: str, options: ArchitectureOptions, takes: tuple[str, ...], remedy: str
) -> None:
    untaken = [option(field) for field in options.given() if field not in takes]
    if untaken:
        raise ConfigError(
            f"{name}: got {', '.join(untaken)}, expected only "
            f"{', '.join(map(option, takes))}; {remedy}"
        )
