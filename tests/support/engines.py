"""Engine files with the sidecar that build-engine writes."""

from pathlib import Path
from typing import Any

from reptrt.graph.preprocess import Preprocess
from reptrt.trt.details import EngineDetails, Rest, TensorInfo, write_engine
from reptrt.trt.options import BuildOptions, ShapeRange


def engine_details(**changes: Any) -> EngineDetails:
    """Return details of an engine with one image input and two outputs; some may be changed."""
    values: dict[str, Any] = {
        "backend": "tensorrt",
        "backend_version": "10.13.0.35",
        "targets": ("sm89",),
        "inputs": (TensorInfo("input", (-1, 3, 32, 48), "FLOAT"),),
        "outputs": (
            TensorInfo("logits", (-1, 3), "FLOAT"),
            TensorInfo("features", (-1, 8, 2, 2), "HALF"),
        ),
        "profile": {"input": ShapeRange((1, 3, 32, 48), (8, 3, 32, 48), (64, 3, 32, 48))},
        "num_layers": 3,
        "int8_layers": (),
        "size_bytes": 64,
        "device_memory_bytes": None,
        "without_effect": (),
        "rest": Rest("fp32"),
        "num_classes": None,
        "preprocess": Preprocess(3, 32, 48, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), "crop"),
    }
    return EngineDetails(**{**values, **changes})


def write_fake_engine(
    path: Path,
    plan: bytes,
    details: EngineDetails | None = None,
    options: BuildOptions | None = None,
    parents: dict[str, str] | None = None,
) -> Path:
    """Write a plan with its sidecar; return its path."""
    write_engine(
        path,
        plan,
        parents=parents or {},
        options=options or BuildOptions(),
        details=details or engine_details(),
    )
    return path
