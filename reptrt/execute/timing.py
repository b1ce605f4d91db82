"""Time small models side by side in onnxruntime, on one thread."""

import time
from collections.abc import Sequence

import numpy as np
import onnx

from reptrt.core.arrays import AnyArray
from reptrt.execute.runner import OrtRunner
from reptrt.graph.net import bytes_from_model

_WARM, _FEWEST, _MOST = 3, 15, 200  # runs of each model
_SECONDS = 0.05  # for each model, between the fewest and the most runs


def time_models(models: Sequence[onnx.ModelProto], inputs: Sequence[AnyArray]) -> list[float]:
    """Return the seconds of one run of each model.

    All of them run once in each round, in a new random order, so that what else the machine does
    slows all of them down. Other programs only add time, so the first quartile of the runs counts.

    Args:
        models: each with one input.
        inputs: what they read.
    """
    runners = [OrtRunner(bytes_from_model(model), threads=1) for model in models]
    taken: list[list[float]] = [[] for _ in runners]
    rng = np.random.default_rng(0)
    for runner, x in zip(runners, inputs, strict=True):
        for _ in range(_WARM):
            runner.run(x)
    started = time.perf_counter()
    for rounds in range(_MOST):
        if rounds >= _FEWEST and time.perf_counter() - started > _SECONDS * len(runners):
            break
        for index in rng.permutation(len(runners)):
            before = time.perf_counter()
            runners[index].run(inputs[index])
            taken[index].append(time.perf_counter() - before)
    return [float(np.quantile(times, 0.25)) for times in taken]
