"""The options of an architecture, and what its file tells the registry; loads nothing heavy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, get_args

from reptrt.core.choices import DetectorHead, Resize
from reptrt.core.errors import ConfigError, option
from reptrt.core.option_fields import described

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class ArchitectureOptions:
    """The free choices of an architecture; None leaves one to the architecture's own default.

    Raises:
        ConfigError: a list without entries, or a number that is not positive.
    """

    widths: tuple[int, ...] | None = described(None, "Output channels of each stage, stem first.")
    blocks: tuple[int, ...] | None = described(None, "Blocks in each stage, without the stem.")
    strides: tuple[int, ...] | None = described(
        None, "Stride of the first block of each stage, stem first."
    )
    groups: int | None = described(None, "RepVGG: groups of every second layer.")
    branches: int | None = described(None, "MobileOne: k x k branches in each block.")
    se_blocks: tuple[int, ...] | None = None  # MobileOne: squeeze-excite in the last n of a stage
    block: Literal["repvgg", "conv_silu"] | None = None  # YOLOv6: block of the stages
    csp: float | None = None  # YOLOv6: part of the channels inside a CSP stage; None: plain stages
    dfl: bool | None = described(
        None,
        "YOLOv6: distances are distributions over bins; default: as in the weights, or as "
        "published (m, l).",
    )
    head: DetectorHead | None = described(
        None,
        "YOLOv6: boxes and scores (decoded, the default), or the tensors of each level before "
        "the decoding (raw).",
    )
    num_classes: int | None = described(
        None, "Number of classes; default: as many as the weights have, or 1000 (YOLOv6: 80)."
    )
    in_channels: int | None = None

    def __post_init__(self) -> None:
        if self.head is not None and self.head not in get_args(DetectorHead):
            raise ConfigError(
                f"{option('head')}: got {self.head!r}, expected one of {get_args(DetectorHead)}"
            )
        if self.csp is not None and not 0 < self.csp <= 1:
            raise ConfigError(f"{option('csp')}: got {self.csp}, expected a part above 0, up to 1")
        for name in self.given():
            if name in ("block", "csp", "dfl", "head"):
                continue
            value = getattr(self, name)
            entries = value if isinstance(value, tuple) else (value,)
            least = 0 if name == "se_blocks" else 1
            if not entries:
                raise ConfigError(
                    f"{option(name)}: the list is empty; expected one number per stage"
                )
            if not all(isinstance(entry, int) and entry >= least for entry in entries):
                raise ConfigError(
                    f"{option(name)}: got {show(entries)}, expected whole numbers from {least} up"
                )

    def given(self) -> tuple[str, ...]:
        """Return the names of the fields that are not None."""
        return tuple(item.name for item in fields(self) if getattr(self, item.name) is not None)


@dataclass(frozen=True, slots=True)
class PublishedInput:
    """The images that the published nets of a family read, unless the user says otherwise."""

    height: int
    width: int
    mean: tuple[float, ...] | None = None  # of pixels in 0..1; None: x / 255 and no more
    std: tuple[float, ...] | None = None
    resize: Resize = "none"
    multiple: int = 1  # height and width are multiples of this
    also_free: bool = False  # the free form reads the same


IMAGENET = PublishedInput(224, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "crop")


@dataclass(frozen=True, slots=True)
class Architecture:
    """One file of the zoo, as the registry sees it."""

    build: "Callable[[ArchitectureOptions, bool], nn.Module]"  # options, deploy -> the net
    variants: Mapping[str, ArchitectureOptions]  # full name -> what it stands for
    takes: tuple[str, ...]  # fields of ArchitectureOptions that the free form understands
    deploy_marker: str  # a part of parameter names that only the deploy form has
    head_weight: str  # parameter whose first axis counts the classes
    reads: PublishedInput
    variant_takes: tuple[str, ...] = ("num_classes", "in_channels")
    infer: "Callable[[ArchitectureOptions, Mapping[str, Tensor]], ArchitectureOptions] | None" = (
        None  # what else the weights say
    )
    training_only: tuple[str, ...] = ()  # parts of parameter names that inference does not have


def show(values: tuple[object, ...]) -> str:
    """Return a list as it is typed on the command line.

    >>> show((2, 4, 14, 1))
    '2,4,14,1'
    """
    return ",".join(str(value) for value in values)


def check_length(name: str, values: tuple[int, ...], expected: tuple[int, ...], why: str) -> None:
    """Refuse a list whose length is none of the expected ones.

    Raises:
        ConfigError: ``values`` has another number of entries.
    """
    if len(values) not in expected:
        lengths = " or ".join(str(length) for length in expected)
        raise ConfigError(
            f"{option(name)}: got {len(values)} entries ({show(values)}), expected {lengths} "
            f"({why})"
        )
