"""The record of which layers were split, kept in the net's metadata for placement and reports."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

from reptrt.core.choices import SplitForm, SplitPrecision
from reptrt.graph.net import Net, get_json, set_json

_KEY = "splits"
_FORMS: tuple[str, ...] = tuple(form for form in get_args(SplitForm) if form != "none")


@dataclass(frozen=True, slots=True)
class Split:
    """One split layer: ``sum`` adds the outputs of ``side`` and ``main``."""

    layer: str  # name before the split
    form: SplitForm  # never "none"
    sum: str  # the Add
    side: str  # the coarse convolution, or the Mul of the identity
    main: str  # the convolution that holds the rest
    precision: SplitPrecision  # of both summands; int8: a Q/DQ pair on each


def record_splits(net: Net, splits: Iterable[Split]) -> None:
    """Add splits to the net's metadata."""
    by_layer = {split.layer: split for split in (*read_splits(net), *splits)}
    if by_layer:
        set_json(net, _KEY, {layer: asdict(split) for layer, split in by_layer.items()})


def read_splits(net: Net) -> tuple[Split, ...]:
    """Return all splits of a net.

    Raises:
        ArtifactError: the record is damaged, or names a form or precision that does not exist.
    """
    return get_json(net, _KEY, _parse) or ()


def _parse(stored: Mapping[str, Any]) -> tuple[Split, ...]:
    splits = tuple(Split(**record) for record in stored.values())
    for split in splits:
        _refuse_unless(split.form, _FORMS, "form", split.layer)
        _refuse_unless(split.precision, get_args(SplitPrecision), "precision", split.layer)
    return splits


def _refuse_unless(value: str, choices: tuple[str, ...], field: str, layer: str) -> None:
    if value not in choices:
        raise ValueError(f"{layer}: {field} {value!r}, expected {' or '.join(choices)}")
