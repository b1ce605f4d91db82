"""One net through all stages; what fails is a result with its reason."""

import copy
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from sweep.rows import Row
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

import reptrt
from reptrt.core.errors import ReptrtError
from reptrt.core.metrics import sqnr_db

_SETTLING, _CALIBRATING, _JUDGING = 16, 32, 16  # images
_CALIBRATING_SEED, _JUDGING_SEED = 1, 2
_EQUAL_DB = 200.0  # shown for equal outputs

Ratios = dict[str, float]

T = TypeVar("T")


@dataclass(slots=True)
class Result:
    """What is known of a net; None where the step before failed."""

    name: str
    family: str
    size: tuple[int, int, int]
    convs_theirs: int | None = None  # convolutions that the authors' fusion leaves
    norms_theirs: int | None = None  # batch norms that it leaves
    convs: int | None = None
    norms: int | None = None
    blocks: int | None = None  # convolutions that were fused from more than one node
    left: dict[str, int] = field(default_factory=dict)  # reason -> nodes that were left alone
    layers: int | None = None
    int8_layers: int | None = None
    sqnr_db: Ratios = field(default_factory=dict)  # by output
    input_sqnr_db: Ratios = field(default_factory=dict)  # of the float net, input rounded to INT8
    errors: int | None = None  # of lint
    warnings: dict[str, int] = field(default_factory=dict)  # rule -> findings
    engine: bool | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # by step
    failed: dict[str, str] = field(default_factory=dict)  # step -> reason


def measure(row: Row, folder: Path, *, engine: bool) -> Result:
    """Take a net through export, calibrate, lint and build-engine.

    Args:
        row: the net.
        folder: for the engine, which is deleted.
        engine: whether an engine is built.
    """
    result = Result(row.name, row.family, row.size)
    module = _step(result, "build", lambda: _settled(row))
    if module is None:
        return result
    theirs = _step(result, "authors' fuse", lambda: row.fuse(copy.deepcopy(module)))
    if theirs is not None:
        parts = list(theirs.modules())
        result.convs_theirs = sum(isinstance(part, _ConvNd) for part in parts)
        result.norms_theirs = sum(isinstance(part, _BatchNorm) for part in parts)
    exported = _step(result, "export", lambda: reptrt.export(module, input_size=row.size))
    if exported is None:
        return result
    operators = Counter(node.op_type for node in exported.proto.graph.node)
    result.convs = operators["Conv"] + operators["ConvTranspose"]
    result.norms = operators["BatchNormalization"]
    result.blocks = len(exported.report.proof.blocks)
    result.left = dict(Counter(skip.reason for skip in exported.report.skipped))
    images = _images(row, _CALIBRATING, _CALIBRATING_SEED)
    int8 = _step(result, "calibrate", lambda: reptrt.calibrate(exported, images))
    if int8 is None:
        return result
    judging = _images(row, _JUDGING, _JUDGING_SEED)
    inputs = (int8, judging), (exported, _rounded(judging))
    ratios = _step(result, "run", lambda: [_ratios(exported, *pair, row) for pair in inputs])
    result.sqnr_db, result.input_sqnr_db = ratios or ({}, {})
    report = _step(result, "lint", lambda: reptrt.lint(int8))
    if report is not None:
        result.layers, result.int8_layers = report.layers, report.int8_layers
        result.errors = report.count("error")
        rules = (found.rule for found in report.findings if found.severity != "info")
        result.warnings = dict(Counter(rules))
    if engine:
        path = folder / f"{row.name}.engine"
        _step(result, "build-engine", lambda: reptrt.build_engine(int8, path))
        result.engine = "build-engine" not in result.failed
    return result


def _step(result: Result, name: str, work: Callable[[], T]) -> T | None:
    """Return what a step makes; None and a reason in the result if it fails."""
    started = time.perf_counter()
    try:
        return work()
    except Exception as err:  # whatever a net or an exporter raises is a row of the table
        text = " ".join(str(err).split()) or repr(err)
        kind = "" if isinstance(err, ReptrtError) else f"{type(err).__name__}: "
        result.failed[name] = kind + text
        return None
    finally:
        result.seconds[name] = round(time.perf_counter() - started, 1)


def _settled(row: Row) -> nn.Module:
    """Return a net with random weights and batch norms that are not neutral.

    Gains and shifts are random; means and variances are those of noise images, so that activations
    neither grow nor fade with depth.
    """
    torch.manual_seed(0)
    module = row.build()
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.momentum = None  # the mean over all batches
            if part.affine:
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias, std=0.1)
    with torch.no_grad():
        module.train()(torch.from_numpy(_images(row, _SETTLING, 0)))
    return module.eval()


def _images(row: Row, count: int, seed: int) -> npt.NDArray[np.float32]:
    """Return noise with as much contrast at every scale, as photographs have; (count, C, H, W)."""
    generator = np.random.default_rng(seed)
    channels, height, width = row.size
    images = np.zeros((count, *row.size))
    scale = 1
    while scale <= max(height, width):
        shape = (count, channels, -(-height // scale), -(-width // scale))
        patches = generator.standard_normal(shape).repeat(scale, axis=2).repeat(scale, axis=3)
        images += patches[:, :, :height, :width]
        scale *= 2
    return np.asarray(images / images.std(), dtype=np.float32)


def _ratios(exported: Any, other: Any, images: npt.NDArray[np.float32], row: Row) -> Ratios:
    """Return the SQNR of each output in dB: a net and its images against the exported net."""
    names = [value.name for value in exported.proto.graph.output]
    outputs = (exported(_images(row, _JUDGING, _JUDGING_SEED)), other(images))
    expected, compared = (out if isinstance(out, tuple) else (out,) for out in outputs)
    return {
        name: round(min(sqnr_db(before, after), _EQUAL_DB), 1)
        for name, before, after in zip(names, expected, compared, strict=True)
    }


def _rounded(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return images rounded to the 255 symmetric codes of INT8."""
    scale = np.abs(images).max() / 127
    return np.asarray(np.rint(images / scale) * scale, dtype=np.float32)
