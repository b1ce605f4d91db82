"""What turns an image into the network's input; travels inside the ONNX file as metadata."""

import math
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from reptrt.core.choices import InputValues, Layout, Resize
from reptrt.core.errors import ConfigError, ReptrtError, option
from reptrt.core.options_json import options_from_json
from reptrt.graph.input_form import image_input, layout_of, values_of
from reptrt.graph.net import Net, get_json, set_json

_KEY = "preprocess"
_USUAL = {"values": "normalized", "layout": "NCHW"}
CROP_FRACTION = 0.875  # the part of the resized shorter side that the centre crop keeps
GREY = 114  # the pixel of a letterbox's border, in every channel


@dataclass(frozen=True, slots=True)
class Preprocess:
    """Image -> float32 (C, H, W): resize, x / 255, subtract mean, divide by std, per channel.

    ``resize`` says what happens to an image of another size than (H, W):

    - ``none``: it is an error, except that a folder whose images all have one (other) size is
      stretched or cropped to fit, with a note: there is no doubt about what was meant;
    - ``stretch``: bilinear to (H, W), aspect ratio ignored;
    - ``crop``: scaled until it covers `crop_cover`, then the centre (H, W): the ImageNet
      convention;
    - ``letterbox``: scaled until it fits `letterbox_of`, in the middle of pixels `GREY`: the
      convention of detectors.

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


@dataclass(frozen=True, slots=True)
class Fit:
    """Where an image lies in the network's input: scaled to a size, then moved; in pixels.

    A box keeps its place in the picture: x -> left + x * scaled_width / image_width, and y so.
    """

    image_height: int
    image_width: int
    scaled_height: int
    scaled_width: int
    top: int  # of the scaled image in the input; negative where a crop cuts it off
    left: int

    def boxes_in_input(self, boxes: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return boxes (..., 4) of the image, x1 y1 x2 y2, as boxes of the input; not clipped."""
        return np.asarray(boxes, np.float64) * self._scale + self._offset

    def boxes_in_image(self, boxes: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return boxes (..., 4) of the input, x1 y1 x2 y2, as boxes of the image; not clipped."""
        return (np.asarray(boxes, np.float64) - self._offset) / self._scale

    @property
    def _scale(self) -> npt.NDArray[np.float64]:
        x, y = self.scaled_width / self.image_width, self.scaled_height / self.image_height
        return np.array([x, y, x, y])

    @property
    def _offset(self) -> npt.NDArray[np.float64]:
        return np.array([self.left, self.top, self.left, self.top], dtype=np.float64)


def fit_of(resize: Resize, image_height: int, image_width: int, height: int, width: int) -> Fit:
    """Return where an image lies in an input of (height, width) after ``resize``, see Preprocess.

    ``none`` is for images of that size, and does to others what ``stretch`` does.
    """
    if resize == "crop":
        return _crop_of(image_height, image_width, height, width)
    if resize == "letterbox":
        return letterbox_of(image_height, image_width, height, width)
    return Fit(image_height, image_width, height, width, 0, 0)


def crop_cover(height: int, width: int) -> tuple[int, int]:
    """Return the (height, width) that ``crop`` scales an image to cover before it cuts the centre.

    They are floor(H / 0.875) and floor(W / 0.875); the aspect ratio of the image is kept.

    >>> crop_cover(224, 224)
    (256, 256)
    """
    return int(height / CROP_FRACTION), int(width / CROP_FRACTION)


def _crop_of(image_height: int, image_width: int, height: int, width: int) -> Fit:
    """Return how ``crop`` scales an image (h, w): the side that is not tight is rounded down."""
    cover_height, cover_width = crop_cover(height, width)
    if cover_height * image_width >= cover_width * image_height:  # the height is the tight side
        scaled = (cover_height, cover_height * image_width // image_height)
    else:
        scaled = (cover_width * image_height // image_width, cover_width)
    top, left = round((scaled[0] - height) / 2), round((scaled[1] - width) / 2)
    return Fit(image_height, image_width, *scaled, -top, -left)


def letterbox_of(image_height: int, image_width: int, height: int, width: int) -> Fit:
    """Return how ``letterbox`` places an image (h, w) in an input (H, W).

    It is scaled by min(H / h, W / w). One side is then H or W; the other is rounded to the nearest
    integer, halves to the even one, and is at least 1. The border is halved, rounded down at the
    top and left. This is what the official code of YOLOv5 to v8 computes for a fixed input.

    >>> letterbox_of(480, 640, 320, 320)
    Fit(image_height=480, image_width=640, scaled_height=240, scaled_width=320, top=40, left=0)
    """
    scale = min(Fraction(height, image_height), Fraction(width, image_width))
    scaled_height = max(1, round(image_height * scale))
    scaled_width = max(1, round(image_width * scale))
    top, left = (height - scaled_height) // 2, (width - scaled_width) // 2
    return Fit(image_height, image_width, scaled_height, scaled_width, top, left)


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
    tensor = image_input(net)
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
