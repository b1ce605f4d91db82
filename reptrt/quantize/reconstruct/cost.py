"""What learning will cost, before it starts."""

import time
from collections.abc import Callable

import torch

from reptrt.quantize.reconstruct.options import LearnOptions

_STEP_COST = 4.0  # of a learning step, in forward passes of the quantized unit
_OTHER_PASSES = 3  # of all images: both nets move past every unit, and units are judged


def passes_of(options: LearnOptions, images: int) -> float:
    """Return the forward passes of the whole net, with as many images as an iteration has.

    Args:
        options: with the number of images per iteration.
        images: of calibration.
    """
    return _STEP_COST * options.iterations + _OTHER_PASSES * images / options.batch


def seconds_of_a_pass(run: Callable[[], object], device: torch.device) -> float:
    """Return the shorter time of two runs; the first one is slower.

    Args:
        run: runs the net once.
        device: that computes.
    """
    seconds = []
    with torch.no_grad():
        for _ in range(2):
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return min(seconds)
