"""The time of a file by its shapes: every layer waits for arithmetic or for memory.

    time = sum over layers of max(multiply-accumulates / R, bytes that are moved)

in units of the time to move one byte, where R is the number of INT8 multiply-accumulates that the
processor computes meanwhile (doi 10.1145/1498765.1498785). The bytes are those of input, weight and
output. Where sums run in the kernel of the layer before them, the second summand adds its bytes to
the memory side alone: behind a layer that waits for arithmetic it is free. Else the sum is a pass
of its own that reads both summands and writes their sum.

Nothing here knows caches or launches. The model says which of two files moves and computes more; it
is no latency.
"""

from collections import Counter
from dataclasses import dataclass

import onnx

from reptrt.graph.layer_costs import LayerCost, coarse_layers, layer_costs, operands
from reptrt.quantize.targets.target import Target

_PASS = 3  # bytes that a sum of its own moves for each byte of a summand


@dataclass(frozen=True, slots=True)
class ModelledTime:
    """The time of a file, in units of the time to move one byte."""

    layers: float  # without splits and full ranges
    extra: float  # what these add

    @property
    def total(self) -> float:
        """The time of the whole file."""
        return self.layers + self.extra

    @property
    def extra_share(self) -> float:
        """What splits and full ranges add, as a fraction of the rest."""
        return self.extra / self.layers if self.layers else 0.0


def modelled_time(model: onnx.ModelProto, target: Target, batch: int) -> ModelledTime:
    """Return the time of a Q/DQ file by the roofline of its target.

    Args:
        model: the file.
        target: the runtime.
        batch: number of images.
    """
    roofline, coarse = target.roofline, coarse_layers(model)
    added: Counter[str | None] = Counter()
    for operand in operands(model, batch):
        added[operand.layer] += operand.bytes_moved
    layers = extra = 0.0
    for cost in layer_costs(model, batch):
        more = added.pop(cost.layer, 0) if roofline.fuses_sums else 0
        time = _time(cost, target, more)
        alone = 0.0 if cost.layer in coarse else _time(cost, target)
        layers += alone
        extra += time - alone
    passes = added.total() * (1 if roofline.fuses_sums else _PASS)
    return ModelledTime(layers, extra + passes)


def _time(cost: LayerCost, target: Target, more_bytes: int = 0) -> float:
    roofline = target.roofline
    if cost.is_int8:
        return max(cost.macs / roofline.macs_per_byte, float(cost.bytes_moved + more_bytes))
    work = cost.macs * target.costs.float_macs / roofline.macs_per_byte
    return max(work, cost.bytes_moved * roofline.float_bytes + more_bytes)
