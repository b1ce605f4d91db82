"""What the choice of splits and full ranges has to know about a runtime; importing it is cheap."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from reptrt.core.choices import SplitForm, SplitPrecision, TargetName


@dataclass(frozen=True, slots=True)
class Costs:
    """What work beside the convolutions costs, in multiply-accumulates of an INT8 convolution."""

    pass_macs: float  # one elementwise pass over one element of a layer's output
    border_macs: float  # full range, for one element of a border map or of an average
    float_macs: float  # one multiply-accumulate of a layer in float
    crossing_macs: float  # one value that goes from float to INT8 or back
    source: str  # where the numbers come from
    # layer -> form -> cost of the split, where it was measured; in place of passes
    of_splits: Mapping[str, Mapping[SplitForm, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Roofline:
    """What limits a layer; `reptrt.quantize.targets.roofline` has the formula."""

    macs_per_byte: float  # INT8 multiply-accumulates in the time in which one byte is moved
    float_bytes: float  # bytes of a value in float there, as a share of those in the file
    fuses_sums: bool  # sums behind a layer run in its kernel
    source: str  # where the numbers come from


@dataclass(frozen=True, slots=True)
class Target:
    """A runtime."""

    name: TargetName
    precision: SplitPrecision  # of the summands of a split layer, unless another is asked for
    # activations have UINT8 codes with any zero point; if not: INT8 codes with zero point 0
    unsigned: bool
    float_ends: bool  # layers at both ends of the net stay in float where that is cheap and helps
    costs: Costs
    roofline: Roofline
