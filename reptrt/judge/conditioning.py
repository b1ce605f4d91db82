"""Whether a net amplifies noise so much that SQNR says nothing about its INT8 form.

A pixel is known to half a grey level, because it was rounded to 8 bits. So images are run once
more with noise of that size: one pixel in twelve, chosen at random, moves by one grey level up or
down, which has the variance of rounding, 1/12. The SQNR of the float net's own outputs under this
noise is 40 to 80 dB for the nets we know. Every quantized layer adds more noise than that, so where
the images' own rounding leaves less than `LEAST_DB`, no INT8 form can be close to the float net,
and a distance to it measures the net and not the quantization. Criterion: ours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from reptrt.core.arrays import Float32Array
from reptrt.graph.preprocess import Preprocess
from reptrt.judge.outputs import Distance, Outputs

LEAST_DB = 20.0  # at which the error is a tenth of the signal
IMAGES = 16  # on which it is measured
_VARIANCE = 1 / 12  # of rounding, in squares of a grey level
_TOP = 255.0


@dataclass(slots=True)
class Conditioning:
    """Measures what the noise of rounding does to a float net, on the first images it is given."""

    preprocess: Preprocess  # of the images
    distance: Distance = field(default_factory=Distance)
    images: int = 0
    generator: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def add(
        self, batch: Float32Array, outputs: Outputs, run: Callable[[Float32Array], Outputs]
    ) -> None:
        """Add images, until there are enough.

        Args:
            batch: (n, C, H, W), or (n, H, W, C), as the preprocessing makes them.
            outputs: of the net for them.
            run: the net.
        """
        images = batch[: IMAGES - self.images]
        if not len(images):
            return
        self.images += len(images)
        noisy = run(with_pixel_noise(images, self.preprocess, self.generator))
        taken = {n: out[: len(images)] if out.ndim else out for n, out in outputs.items()}
        self.distance.add(taken, noisy)

    @property
    def sqnr_db(self) -> float | None:
        """SQNR of the net under this noise; None: it has no output but zeros, or no noise."""
        ratio = self.distance.sqnr_db if self.images else math.inf
        return ratio if math.isfinite(ratio) else None


def with_pixel_noise(
    batch: Float32Array, preprocess: Preprocess, generator: np.random.Generator
) -> Float32Array:
    """Return images of which one pixel in twelve moves by one grey level, up or down.

    Args:
        batch: (n, C, H, W), or (n, H, W, C), as the preprocessing makes them.
        preprocess: says how large a grey level is; pixels 0..255 stay in that range.
        generator: of the noise.
    """
    chance = generator.random(batch.shape)
    steps = 1.0 * (chance < _VARIANCE / 2) - 1.0 * (chance > 1 - _VARIANCE / 2)
    if preprocess.values != "normalized":
        return np.clip(batch + steps, 0, _TOP).astype(np.float32)
    std = np.asarray(preprocess.std)
    level = 1 / (_TOP * (std if preprocess.layout == "NHWC" else std[:, None, None]))
    return (batch + steps * level).astype(np.float32)


def conditioning_line(ratio: float | None) -> str | None:
    """Return a line that says so if a net is ill-conditioned.

    Args:
        ratio: `Conditioning.sqnr_db` of it.
    """
    if ratio is None or ratio >= LEAST_DB:
        return None
    return (
        f"ill-conditioned: one grey level at one pixel in twelve moves the float net's outputs to "
        f"{ratio:.1f} dB, so SQNR cannot judge an INT8 form of it; compare accuracy, and check "
        "the statistics of its batch norms and the preprocessing"
    )
