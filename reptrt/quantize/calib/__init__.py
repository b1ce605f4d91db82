"""Calibration: images -> one streaming histogram per tensor -> amax per tensor.

Collecting (`collect`) and choosing (`thresholds`) are separate: a threshold rule is a pure
function of a histogram, and a histogram does not depend on batch size or image order.

    collect, histogram    statistics of tensors over all images
    channels              statistics per channel, for equalization and the choice of splits
    thresholds, options   rules that turn a histogram into amax
    saturation            values that a ReLU hides, which no threshold has to cover
    bias                  mean error of quantized weights, to be subtracted from biases
    sensitivity           error of the outputs if only one layer is INT8
    measure               what of a net is compared, and in which unit: outputs, or raw heads
    outputs               error of the outputs on held-out images, which judges choices
"""
