"""Detections: boxes from the outputs of detectors, and their mAP."""
