"""What a worker does: export a net, make and judge a trial, build an engine.

Each function takes JSON values and returns the record of the store, which it writes itself: what is
finished stays finished, whoever asked for it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from reptrt.core.artifacts import package_versions, sidecar_path
from reptrt.core.errors import DataError
from reptrt.core.options_json import options_from_json
from reptrt.data.dataset import sampled
from reptrt.judge.evaluate import Evaluation, evaluate
from reptrt.judge.options import EvaluateOptions
from reptrt.linter import lint
from reptrt.pipeline import CalibrateOptions, ExportOptions, Source, export
from reptrt.runs.manifest import CALIBRATE_FILE
from reptrt.runs.run import FLOAT_FILE, INT8_FILE
from reptrt.search.candidates import Candidate
from reptrt.search.latency import model_time
from reptrt.search.trials import Trials
from reptrt.sweeping.sheet import JudgingOptions
from reptrt.sweeping.store import Made, Store
from reptrt.trt.build import build_engine
from reptrt.trt.options import BuildOptions

ENGINE_FILE = "model.engine"
KEPT_FILE = "kept.npz"
_WHERE = "the task"


def version(payload: Any) -> str | None:
    """Return the version of the package that a worker has."""
    return package_versions().get("reptrt")


def export_net(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Export a net."""

    def make(folder: Path) -> Made:
        source = options_from_json(Source, payload["source"], _WHERE)
        options = options_from_json(ExportOptions, payload["options"], _WHERE)
        path = folder / FLOAT_FILE
        report = export(source, path, options)
        found = {"num_parameters": report.num_parameters, "notes": list(report.notes)}
        return Made(found, (path, sidecar_path(path)))

    return Store(payload["store"]).once(payload["key"], make)


def make_trial(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Calibrate a net, and judge the file that comes of it; return both records."""
    store, (calibrating, judging) = Store(payload["store"]), payload["steps"]

    def calibrate(folder: Path) -> Made:
        of_float = store.fetch(payload["float"], FLOAT_FILE, folder / "float")
        options = options_from_json(CalibrateOptions, calibrating["options"], _WHERE)
        candidate = Candidate("trial", "trial", None, options)
        data = _here(calibrating["data"])
        made = Trials(folder, of_float, data, calibrating["inputs"]).make(candidate)
        times = [model_time(path, options.target, 1) for path in (made.path, of_float)]
        found = {
            "bytes": made.path.stat().st_size,
            "modelled": times[0] / times[1] if times[1] else None,
            "simulation": options.simulation,
            "lint": _lint(made.path) if options.target == "tensorrt" else None,
        }
        files = (made.path, sidecar_path(made.path))
        return Made(found, files, {CALIBRATE_FILE: made.path.with_name(CALIBRATE_FILE)})

    calibrated = store.once(calibrating["key"], calibrate)

    def judge(folder: Path) -> Made:
        of_float = store.fetch(payload["float"], FLOAT_FILE, folder / "float")
        int8 = store.fetch(calibrated, INT8_FILE, folder / "int8")
        return Made(_judged(of_float, int8, judging))

    return {"calibrated": calibrated, "judged": store.once(judging["key"], judge)}


def make_engine(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Build an engine from the file of a trial, on this machine."""
    store = Store(payload["store"])

    def make(folder: Path) -> Made:
        int8 = store.fetch(payload["calibrated"], INT8_FILE, folder / "int8")
        path = folder / ENGINE_FILE
        options = options_from_json(BuildOptions, payload["options"], _WHERE)
        summary = build_engine(int8, path, options)
        return Made({"bytes": path.stat().st_size}, (summary.path, sidecar_path(path)))

    return store.once(payload["key"], make)


def judge_shard(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Run networks on some of the images; keep all that their evaluation needs of these."""

    def make(folder: Path) -> Made:
        options = options_from_json(EvaluateOptions, payload["options"], _WHERE)
        data, (start, stop) = _here(payload["data"]), payload["range"]
        taken = sampled(data, options.limit, options.seed)[start:stop]
        files = [_here(file) for file in payload["files"]]
        part = Evaluation(files, data, options, taken=taken)
        part.run(with_noise=start == 0)
        path = folder / KEPT_FILE
        arrays: dict[str, Any] = part.kept()
        np.savez(path, **arrays)
        return Made({"images": len(taken)}, (path,))

    return Store(payload["store"]).once(payload["key"], make)


def _judged(of_float: Path, int8: Path, judging: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file and the float net measure on the same images."""
    options = options_from_json(JudgingOptions, judging["options"], _WHERE)
    judge = EvaluateOptions(
        **vars(options.of_task),
        reference=of_float,
        limit=options.limit,
        threads=judging["threads"],
    )
    report = evaluate([of_float, int8], _here(judging["data"]), judge)
    before, after = report.results
    results = [{**result.to_dict(), "file": None} for result in report.results]
    scored = before.score is not None and after.score is not None
    return {
        "float": results[0],
        "int8": results[1],
        "cells": [
            [column.title, *(column.cell(result.measures) for result in report.results)]
            for column in report.columns
        ],
        "change": after.score - before.score if scored else None,  # type: ignore[operator]
        "ill_conditioned": report.ill_conditioned,
    }


def _lint(path: Path) -> dict[str, int]:
    report = lint(path)
    return {severity: report.count(severity) for severity in ("error", "warning")}


def _here(path: str) -> Path:
    """Return a path of images, which a worker on another machine may not see."""
    if not Path(path).exists():
        import socket

        raise DataError(
            f"{path}: does not exist on {socket.gethostname()}; every machine that works needs "
            "the images under the same path"
        )
    return Path(path)
