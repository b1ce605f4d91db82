"""What turns an image into the network's input; travels inside the ONNX file as metadata."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from reptrt.core.choices import InputValues, Layout, Resize
from reptrt.core.errors import ConfigError, ReptrtError, option
from reptrt.core.options_json import options_from_json
from reptrt.graph.input_form import layout_of, values_of
from reptrt.graph.net import Net, get_json, set_json

_KEY = "preprocess"
_USUAL = {"values": "normalized", "layout": "NCHW"}
CROP_FRACTION = 0.875  # the part of the resized shorter side that the centre crop keeps


@dataclass(frozen=True, slots=True)
class Preprocess:
    """Image -> float32 (C, H, W): resize, x / 255, subtract mean, divide by std, per channel.

    ``resize`` says what happens to an image of another size than (H, W):

    - ``none``: it is an error, except that a folder whose images all have one (other) size is
      stretched or cropped to fit, with a note: there is no doubt about what was meant;
    - ``stretch``: bilinear to (H, W), aspect ratio ignored;
    - ``crop``: scaled until it covers `crop_cover`, then the centre (H, W): the ImageNet
      convention.

    ``values`` says what becomes of a pixel: ``normalized`` as above; ``pixels`` and ``bytes`` stay
    0..255, for nets that scale them inside and take FLOAT or UINT8. ``layout`` NHWC moves the
    channels behind the width at the very end.
    """

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize = "none"
    values: InputValues = "normalized"
    layout: Layout = "NCHW"

    def __post_init__(self) -> None:
        for name in ("channels", "height", "width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected a positive number")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ConfigError(
                    f"{option(name)}: got {len(values)} values, expected {self.channels}, one per "
                    "channel"
                )
        if not all(math.isfinite(value) for value in self.mean):
            raise ConfigError(f"{option('mean')}: got {self.mean}, expected numbers")
        if not all(math.isfinite(value) and value > 0 for value in self.std):
            raise ConfigError(f"{option('std')}: got {self.std}, expected positive numbers")
        if max(self.mean) > 1 and max(self.std) > 1:
            raise ConfigError(
                f"{option('mean')}: got {self.mean}, {option('std')} {self.std}, which are those "
                "of pixels 0..255; expected those of pixels 0..1: divide both by 255"
            )
        plain = ((0.0,) * self.channels, (1.0,) * self.channels)
        if self.values != "normalized" and (self.mean, self.std) != plain:
            raise ConfigError(
                f"{option('mean')}: got {self.mean}, {option('std')} {self.std}; expected neither: "
                "the net takes pixels 0..255 and scales them itself"
            )
        if self.resize not in get_args(Resize):
            raise ConfigError(
                f"{option('resize')}: got {self.resize!r}, expected one of {get_args(Resize)}"
            )

    @property
    def doubt(self) -> str | None:
        """Why mean and std are hardly those of pixels 0..1; None if they may be."""
        if max(self.mean) > 1:
            return f"mean {self.mean} is above 1, the largest pixel"
        if max(self.std) > 1:
            return f"std {self.std} is above 1, the whole range of pixels"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; ``values`` and ``layout`` only where they are unusual."""
        return {k: v for k, v in asdict(self).items() if (k, v) not in _USUAL.items()}

    @staticmethod
    def plain(channels: int, height: int, width: int) -> "Preprocess":
        """Return x / 255 with neither mean nor std: what a net without metadata gets."""
        return Preprocess(channels, height, width, (0.0,) * channels, (1.0,) * channels)


def crop_cover(height: int, width: int) -> tuple[int, int]:
    """Return the (height, width) that ``crop`` scales an image to cover before it cuts the centre.

    They are floor(H / 0.875) and floor(W / 0.875); the aspect ratio of the image is kept.

    >>> crop_cover(224, 224)
    (256, 256)
    """
    return int(height / CROP_FRACTION), int(width / CROP_FRACTION)


def write_preprocess(net: Net, preprocess: Preprocess) -> None:
    """Store the preprocessing in the net's metadata."""
    set_json(net, _KEY, preprocess.to_dict())


def stored_preprocess(net: Net) -> Preprocess | None:
    """Return the preprocessing stored in a net's metadata; None if there is none.

    Raises:
        ArtifactError: what is stored is not what `write_preprocess` wrote.
    """
    return get_json(net, _KEY, _from_json)


def read_preprocess(net: Net) -> Preprocess:
    """Return the preprocessing stored in a net, or what its input tells.

    That is plain x / 255 at the size of the input; pixels as they are where the net scales them
    itself; channels last where the net starts with a Transpose from NHWC.

    Raises:
        ArtifactError: what is stored is not what `write_preprocess` wrote.
        ConfigError: nothing is stored and the input is not a fixed-size image batch (N, C, H, W).
    """
    stored = stored_preprocess(net)
    if stored is not None:
        return stored
    tensor = net.graph.inputs[0]
    shape = tuple(tensor.shape or ())
    if len(shape) != 4 or not all(isinstance(size, int) and size > 0 for size in shape[1:]):
        raise ConfigError(
            f"input {tensor.name}: shape is {list(shape)}, expected (N, C, H, W) with C, H, W "
            f"fixed; export the ONNX file with {option('input_size')}"
        )
    layout = layout_of(net)
    height_width_last = (shape[3], *shape[1:3]) if layout == "NHWC" else shape[1:]
    return replace(Preprocess.plain(*height_width_last), values=values_of(net), layout=layout)


def _from_json(stored: dict[str, Any]) -> Preprocess:
    try:
        return options_from_json(Preprocess, {"resize": "none", **_USUAL, **stored}, _KEY)
    except ReptrtError as err:
        raise ValueError(str(err)) from err
