"""The record of which layers were split, kept in the net's metadata for placement and reports."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from reptrt.core.choices import SplitPrecision
from reptrt.graph.net import Net, get_json, set_json

_KEY = "splits"


@dataclass(frozen=True, slots=True)
class Split:
    """One split layer: ``sum`` adds the outputs of ``side`` and ``main``."""

    layer: str  # name before the split
    form: str  # "coarse-fine", "identity" or "identity-scalar"
    sum: str  # the Add
    side: str  # the coarse convolution, or the Mul of the identity
    main: str  # the convolution that holds the rest
    precision: SplitPrecision  # of both summands; int8: a Q/DQ pair on each


def record_splits(net: Net, splits: Iterable[Split]) -> None:
    """Add splits to the net's metadata."""
    known = {split.layer: split for split in read_splits(net)}
    known |= {split.layer: split for split in splits}
    if known:
        set_json(net, _KEY, {layer: asdict(split) for layer, split in known.items()})


def read_splits(net: Net) -> tuple[Split, ...]:
    """Return all splits of a net."""
    return get_json(net, _KEY, lambda stored: tuple(Split(**r) for r in stored.values())) or ()
