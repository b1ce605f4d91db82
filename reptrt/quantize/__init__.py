"""The decisions of calibration: splits, code ranges, thresholds, biases, learned constants."""
