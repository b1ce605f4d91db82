"""QDQ301 to QDQ349: numbers that lose accuracy for nothing."""

from collections.abc import Iterator

import numpy as np

from reptrt.graph.queries import is_quantize, label, producer_past_casts, value_past_casts
from reptrt.linter.rule import Defect
from reptrt.linter.view import View

_FP16_NORMAL = float(np.finfo(np.float16).smallest_normal)  # 6.1e-5


def weight_per_tensor(view: View) -> Iterator[Defect]:
    """A weight has one scale per output channel.

    That costs no time, because the scales are applied after the sum. One scale for the whole weight
    has to cover its largest channel; the small ones keep a few codes only.
    """
    for layer in view.int8_layers:
        scale = None if layer.weight is None else value_past_casts(layer.weight.inputs[1])
        channels = layer.channels
        if scale is not None and scale.size == 1 and channels is not None and channels[1] > 1:
            yield Defect(label(layer.node), "one scale for the weight", f"{channels[1]} scales")


def fp16_scale_subnormal(view: View) -> Iterator[Defect]:
    """FP16 scales are in FP16's normal range, 6.1e-5 and above.

    Below it a number loses a bit of its 11 with each halving: at 1e-6 the scale is off by up to
    3 %, and with it everything that it scales.
    """
    for parameters in view.parameters:
        scale = parameters.scale
        if scale is None or scale.dtype != np.float16:
            continue
        values = scale.astype(np.float64).ravel()
        small = values[(values > 0) & (values < _FP16_NORMAL)]
        if small.size:
            got = f"FP16 scale {small.min():.3g}" + (
                f" ({small.size} of {values.size} below)" if values.size > 1 else ""
            )
            yield Defect(label(parameters.node), got, f"{_FP16_NORMAL:.2g} or more")


def float_weight_codes(view: View) -> Iterator[Defect]:
    """Weights are stored as INT8 codes behind a DequantizeLinear.

    Float weights behind Q and DQ are right too, but 2 to 4 times as large, and the codes are those
    that TensorRT's rounding gives: learned rounding would be lost.
    """
    for layer in view.int8_layers:
        source = None if layer.weight is None else producer_past_casts(layer.weight.inputs[0])
        if source is not None and is_quantize(source) and layer.has_constant_weight:
            got = f"{source.inputs[0].name} in float behind Q and DQ"
            yield Defect(label(layer.node), got, "INT8 codes behind DQ")
