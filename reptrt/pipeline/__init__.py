"""export and calibrate, as functions from values to a value and as functions from files to a file.

    export_net(source, options) -> Exported         export(source, output, options) -> report
    calibrate_net(model, dataset, options) -> Calibrated
                                        calibrate(model, images, output, options) -> report

A name is imported when it is used: the options can be had without loading torch.
"""

from typing import TYPE_CHECKING

from reptrt.core.lazy import lazily

if TYPE_CHECKING:
    from reptrt.pipeline.calibrating import (
        at_most_all,
        calibrate,
        calibrate_net,
        calibration_images,
        float_model,
    )
    from reptrt.pipeline.exporting import export, export_net
    from reptrt.pipeline.float_layers import plan_with_float_layers, with_float_layers
    from reptrt.pipeline.options import (
        PLAIN_INT8,
        CalibrateOptions,
        ExportOptions,
    )
    from reptrt.pipeline.preparing import Prepared, prepare, torch_device
    from reptrt.pipeline.reports import CalibrateReport, ExportReport, TensorScale
    from reptrt.pipeline.splitting import split_layers
    from reptrt.pipeline.values import Calibrated, Exported, Loaded
    from reptrt.sources.source import Source

__all__ = [
    "PLAIN_INT8",
    "CalibrateOptions",
    "CalibrateReport",
    "Calibrated",
    "ExportOptions",
    "ExportReport",
    "Exported",
    "Loaded",
    "Prepared",
    "Source",
    "TensorScale",
    "at_most_all",
    "calibrate",
    "calibrate_net",
    "calibration_images",
    "export",
    "export_net",
    "float_model",
    "plan_with_float_layers",
    "prepare",
    "split_layers",
    "torch_device",
    "with_float_layers",
]

__getattr__ = lazily(
    __name__,
    {
        "reptrt.pipeline.calibrating": (
            "at_most_all",
            "calibrate",
            "calibrate_net",
            "calibration_images",
            "float_model",
        ),
        "reptrt.pipeline.exporting": ("export", "export_net"),
        "reptrt.pipeline.float_layers": ("plan_with_float_layers", "with_float_layers"),
        "reptrt.pipeline.options": (
            "PLAIN_INT8",
            "CalibrateOptions",
            "ExportOptions",
        ),
        "reptrt.pipeline.preparing": ("Prepared", "prepare", "torch_device"),
        "reptrt.pipeline.reports": ("CalibrateReport", "ExportReport", "TensorScale"),
        "reptrt.pipeline.splitting": ("split_layers",),
        "reptrt.pipeline.values": ("Calibrated", "Exported", "Loaded"),
        "reptrt.sources.source": ("Source",),
    },
)
