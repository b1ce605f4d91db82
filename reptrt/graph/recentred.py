"""The record of recentred activations, kept in the net's metadata.

`reptrt.rewrite.recentre` gives tensors that are never negative all 256 codes under zero point 0:
their pair carries x - c, and biases on both sides make up for c. The record names the nodes that
took part. The way back, `reptrt.rewrite.restore`, computes c and what makes up for it from the
scales and weights that the graph then has: they may have been rounded in the meantime.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from reptrt.graph.net import Net, get_json, set_json

_KEY = "recentred"


@dataclass(frozen=True, slots=True)
class Recentred:
    """One tensor whose pair carries x - c, and the names of all nodes that were changed for it."""

    tensor: str  # that the pair quantized before: the output of the ReLU
    offset: float  # c, in units of the tensor
    code: int  # c / scale: 128, or half the number of codes of a simulated grid
    quantize: str
    relu: str | None  # was removed: the saturation of Q takes its place
    clips: tuple[str, ...]  # Clips before Q; their bounds moved by -c
    producer: str  # layer, or Add of a constant; its bias took -c
    layers: tuple[str, ...]  # consumers; their biases took c * (sum of each channel's weights)
    factors: tuple[tuple[str, str], ...]  # Mul, and the layer whose bias took c * factor
    skips: tuple[str, ...]  # layers, or Adds of a constant; they took c for a residual Add
    added: tuple[str, ...]  # new Adds: border maps, and c behind average pools


def record_recentred(net: Net, records: Iterable[Recentred]) -> None:
    """Set the record; no entries remove it."""
    by_tensor = {record.tensor: asdict(record) for record in records}
    if by_tensor:
        set_json(net, _KEY, by_tensor)
    else:
        net.metadata.pop(f"reptrt.{_KEY}", None)


def read_recentred(net: Net) -> tuple[Recentred, ...]:
    """Return the record; empty if nothing was recentred."""

    def parse(stored: dict[str, Any]) -> tuple[Recentred, ...]:
        fields = ({k: _tuples(v) for k, v in record.items()} for record in stored.values())
        return tuple(Recentred(**values) for values in fields)

    return get_json(net, _KEY, parse) or ()


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
