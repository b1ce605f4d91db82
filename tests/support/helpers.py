"""Helpers of many tests: paths of trained nets, loading of tools, onnxruntime as the oracle."""

import importlib.util
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest

from reptrt.execute.runner import optimized_nodes
from reptrt.graph.model import Model
from reptrt.trt.machine import may_saturate

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SHARED = Path(__file__).resolve().parents[3] / "shared"
needs_shared = pytest.mark.skipif(
    not (SHARED / "zoo").is_dir(), reason="the trained nets and CIFAR-10 images are not here"
)


def load_tool(name: str) -> ModuleType:
    """Return a file of tools/ as a module, as ``python tools/NAME.py`` would load it."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, str(TOOLS))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(TOOLS))
    return module


def ort_run(
    model: onnx.ModelProto, inputs: Mapping[str, np.ndarray], optimize: bool = True
) -> dict[str, np.ndarray]:
    """Run a model in onnxruntime on the CPU; return every output by name."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if may_saturate():  # on a CPU without VNNI, products are exact with UINT8 weights only
        options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def optimized_op_counts(model: bytes | Path | Model) -> Counter[str]:
    """Count the operators that onnxruntime runs on the CPU, after its graph optimization.

    A convolution that runs in INT8 appears as ``QLinearConv``, a float convolution as ``Conv``.
    """
    return Counter(op for _, op in optimized_nodes(model))
