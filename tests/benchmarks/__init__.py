"""Benchmarks that compare times side by side; run them with ``make benchmark``."""
