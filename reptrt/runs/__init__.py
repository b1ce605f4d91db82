"""Whole runs: their stages, records, repetition, comparison and report."""
