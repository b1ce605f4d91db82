"""Calibration: images -> one streaming histogram per tensor -> amax per tensor.

Collecting (`collect`) and choosing (`thresholds`) are separate: a threshold rule is a pure
function of a histogram, and a histogram does not depend on batch size or image order.
"""
