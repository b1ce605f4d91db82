"""The record of which layers carry an affine (QPRep), kept in the net's metadata."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from reptrt.graph.net import Net, get_json, set_json

_KEY = "affines"


@dataclass(frozen=True, slots=True)
class Affine:
    """y = gain * layer(x) + shift, per output channel, before the activation function."""

    layer: str  # a convolution or Gemm; a split layer has one for its sum
    mul: str  # the Mul node
    add: str  # the Add node
    gain: str  # the constant it multiplies by
    shift: str  # the constant it adds


def record_affines(net: Net, affines: Iterable[Affine]) -> None:
    """Set the record; no affines remove it."""
    by_layer = {affine.layer: asdict(affine) for affine in affines}
    if by_layer:
        set_json(net, _KEY, by_layer)
    else:
        net.metadata.pop(f"reptrt.{_KEY}", None)


def read_affines(net: Net) -> tuple[Affine, ...]:
    """Return all affines of a net."""
    return get_json(net, _KEY, lambda stored: tuple(Affine(**r) for r in stored.values())) or ()
