"""What calibration decides: splits, code ranges, thresholds, biases, learned constants."""
