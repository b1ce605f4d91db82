"""reptrt: re-parameterized CNNs from a PyTorch checkpoint to an accurate INT8 TensorRT engine.

    import reptrt

    net = reptrt.export(model, input_size=(3, 224, 224))
    int8 = reptrt.calibrate(net, images)
    reptrt.evaluate([net, int8], (held_out, labels))
    int8.save("a0.int8.onnx")
    reptrt.build_engine(int8, "a0.engine")

A function is imported when it is used; importing the package loads nothing heavy.
"""

from typing import TYPE_CHECKING

from reptrt.core.lazy import lazily

if TYPE_CHECKING:
    from reptrt.api.folders import ladder, report, run
    from reptrt.api.judging import bench, diagnose, evaluate, inspect, predict, rank_layers
    from reptrt.api.searching import sweep, tune
    from reptrt.api.stages import build_engine, calibrate, export, lint, load, package
    from reptrt.pipeline.options import PLAIN_INT8
else:
    __getattr__ = lazily(
        __name__,
        {
            "reptrt.api.folders": ("ladder", "report", "run"),
            "reptrt.api.judging": (
                *("bench", "diagnose", "evaluate", "inspect", "predict", "rank_layers"),
            ),
            "reptrt.api.searching": ("sweep", "tune"),
            "reptrt.api.stages": ("build_engine", "calibrate", "export", "lint", "load", "package"),
            "reptrt.pipeline.options": ("PLAIN_INT8",),
        },
    )

__version__ = "0.2.0"

__all__ = [
    "PLAIN_INT8",
    "__version__",
    "bench",
    "build_engine",
    "calibrate",
    "diagnose",
    "evaluate",
    "export",
    "inspect",
    "ladder",
    "lint",
    "load",
    "package",
    "predict",
    "rank_layers",
    "report",
    "run",
    "sweep",
    "tune",
]


def __dir__() -> list[str]:
    return __all__
