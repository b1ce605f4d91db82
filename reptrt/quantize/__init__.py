"""Decisions of calibration: splits, ranges, thresholds, biases, learned constants."""
