"""The Python API: one function per command. Only here and in the command line do stages meet.

export -> calibrate -> build_engine -> evaluate, bench; run does it all
"""

from reptrt.pipeline.calibrating import CalibrateReport, TensorScale, calibrate
from reptrt.pipeline.exporting import ExportReport, export
from reptrt.pipeline.options import PLAIN_INT8, CalibrateOptions, ExportOptions, recorded_options
from reptrt.pipeline.preparing import Prepared, prepare, split_layers, torch_device
from reptrt.sources.source import Source

__all__ = [
    "PLAIN_INT8",
    "CalibrateOptions",
    "CalibrateReport",
    "ExportOptions",
    "ExportReport",
    "Prepared",
    "Source",
    "TensorScale",
    "calibrate",
    "export",
    "prepare",
    "recorded_options",
    "split_layers",
    "torch_device",
]
