"""Measure how good a file is: its accuracy, its latency, and the reasons for both."""
