"""What turns an image into the network's input; travels inside the ONNX file as metadata."""

import math
from dataclasses import asdict, dataclass
from typing import Any, get_args

from reptrt.core.choices import Resize
from reptrt.core.errors import ConfigError, ReptrtError, option
from reptrt.core.options_json import options_from_json
from reptrt.graph.net import Net, get_json, set_json

_KEY = "preprocess"
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
    """

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize = "none"

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
        if self.resize not in get_args(Resize):
            raise ConfigError(
                f"{option('resize')}: got {self.resize!r}, expected one of {get_args(Resize)}"
            )

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
    set_json(net, _KEY, asdict(preprocess))


def stored_preprocess(net: Net) -> Preprocess | None:
    """Return the preprocessing stored in a net's metadata; None if there is none.

    Raises:
        ArtifactError: what is stored is not what `write_preprocess` wrote.
    """
    return get_json(net, _KEY, _from_json)


def read_preprocess(net: Net) -> Preprocess:
    """Return the preprocessing stored in a net, or plain x / 255 at the size of its input.

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
    return Preprocess.plain(*shape[1:])


def _from_json(stored: dict[str, Any]) -> Preprocess:
    try:
        return options_from_json(Preprocess, {"resize": "none", **stored}, _KEY)
    except ReptrtError as err:
        raise ValueError(str(err)) from err
