"""Ratios of speed, measured side by side: ``make benchmark``."""
