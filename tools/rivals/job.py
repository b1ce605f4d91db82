"""The command line that the runners of `tools/compare_rivals.py` share.

    python ort.py MODEL IMAGES OUTPUT [OPTIONS]

It runs in the environment of each rival. MODEL is the float ONNX file, IMAGES an .npy with its
preprocessed inputs (N, C, H, W), OUTPUT the INT8 ONNX file to write, OPTIONS a JSON object. The
last line on stdout is a JSON object:

    {"seconds": 12.3, "peak_rss_mib": 456.7}

``seconds`` is from the call until the file is written, without starting Python and without imports.
``peak_rss_mib`` is the largest resident memory of the whole process, imports and images included.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 32  # batch size for every tool that does not prescribe one


@dataclass(frozen=True)
class Job:
    """One quantization."""

    model: Path
    images: Path
    output: Path
    options: Mapping[str, Any]

    def array(self) -> "np.ndarray[Any, Any]":
        """Return all images, float32 (N, C, H, W), mapped from disk and read when they are used."""
        return np.load(self.images, mmap_mode="r")

    def batches(self, size: int = BATCH) -> Iterator["np.ndarray[Any, Any]"]:
        """Yield the images in order in batches of ``size``; the last batch may be smaller."""
        images = self.array()
        for start in range(0, len(images), size):
            yield np.ascontiguousarray(images[start : start + size])


def peak_rss_mib() -> float:
    """Return the largest resident memory of this process in MiB.

    On Linux, `ru_maxrss` includes the memory of the parent process before exec, hence VmHWM.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def run(quantize: Callable[[Job], Mapping[str, Any] | None]) -> None:
    """Run the job that the command line describes; print its time, memory and what it returns."""
    model, images, output, *options = sys.argv[1:]
    job = Job(Path(model), Path(images), Path(output), json.loads(options[0]) if options else {})
    started = time.perf_counter()
    further = quantize(job) or {}
    seconds = time.perf_counter() - started
    print()  # tools may leave a line open
    print(json.dumps({"seconds": seconds, "peak_rss_mib": peak_rss_mib(), **further}))
