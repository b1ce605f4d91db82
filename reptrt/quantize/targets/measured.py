"""Costs in TensorRT from the file that tools/gpu_check.py writes on a machine with a GPU.

The check times INT8 engines with and without splits, whose elementwise passes are a share o of the
net's multiply-accumulates, each value counted with the assumed p of `tensorrt.TENSORRT`:

    t_split / t_whole = (1 + p' o_split / p) / (1 + p' o_whole / p)

p' is what a pass over one value really costs there, for batch 1 and without copies to the GPU.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from reptrt.core.errors import ArtifactError
from reptrt.quantize.targets.target import Costs

_SPLIT, _WHOLE = "int8-fp16", "int8-nosplit-fp16"


def costs_from_check(path: Path, assumed: Costs) -> Costs:
    """Return the costs of passes that gpu_check measured.

    Args:
        path: gpu_check.json.
        assumed: the costs that the calibrations of the check counted with.

    Raises:
        ArtifactError: the file cannot be read, or lacks a step that is needed.
    """
    try:
        report = json.loads(path.read_text())
        done = {s["name"]: s["result"] for s in report["steps"] if s["state"] == "done"}
        times = _times(done)
        shares = (
            _overhead(done, "calibrate fast cpu"),
            _overhead(done, "calibrate without splits"),
        )
        ratio = times[_SPLIT] / times[_WHOLE]
        factor = (ratio - 1) / (shares[0] - ratio * shares[1])
    except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError) as err:
        raise ArtifactError(
            f"{path}: no costs in it ({type(err).__name__}: {err}); expected gpu_check.json of "
            "tools/gpu_check.py, with both INT8 engines built and timed"
        ) from err
    factor = max(factor, 0.0)  # within the spread of the timings, splits may look free
    where = done.get("environment", {}).get("gpu") or "a GPU"
    return replace(
        assumed,
        pass_macs=assumed.pass_macs * factor,
        border_macs=assumed.border_macs * factor,
        source=f"measured: {path.name}, {where}",
    )


def _times(done: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return net -> median ms on the GPU at batch 1, of the first backend that has both nets."""
    for backend in ("tensorrt", "tensorrt-rtx"):
        rows = done.get(f"{backend} bench, no host copies", {}).get("results", ())
        times = {
            Path(row["file"]).name.removesuffix(f".{backend}.engine"): float(row["median_ms"])
            for row in rows
            if row["batch"] == 1
        }
        if times.keys() >= {_SPLIT, _WHOLE}:
            return times
    raise LookupError(f"no timings of {_SPLIT} and {_WHOLE} at batch 1")


def _overhead(done: Mapping[str, Mapping[str, Any]], step: str) -> float:
    if step not in done:
        raise LookupError(f"step {step!r} was not done")
    return float(done[step]["overhead"])
