"""The Python API: one function per command. Only here and in the command line do stages meet.

export -> calibrate -> build_engine -> evaluate, bench; run does it all

A name is imported when it is used: the options can be had without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reptrt.pipeline.calibrating import CalibrateReport, TensorScale, calibrate
    from reptrt.pipeline.exporting import ExportReport, export
    from reptrt.pipeline.options import (
        PLAIN_INT8,
        CalibrateOptions,
        ExportOptions,
        recorded_options,
    )
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

_HOMES = {
    "reptrt.pipeline.calibrating": ("CalibrateReport", "TensorScale", "calibrate"),
    "reptrt.pipeline.exporting": ("ExportReport", "export"),
    "reptrt.pipeline.options": (
        "PLAIN_INT8",
        "CalibrateOptions",
        "ExportOptions",
        "recorded_options",
    ),
    "reptrt.pipeline.preparing": ("Prepared", "prepare", "split_layers", "torch_device"),
    "reptrt.sources.source": ("Source",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
