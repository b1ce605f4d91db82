"""Sweep nets that do not exist, with trials of known duration: what the sweep itself costs.

    python tools/simulate_sweep.py --nets 25,50,100,200 --recipes 6 --seconds 0.05

Plans, worker processes, the store, records and the report are those of `reptrt sweep`; only the
work of a trial is replaced: it sleeps, and writes a file of some KiB. Each line is one sweep into
an empty folder:

    overhead   (wall-clock time - start - time that the trials sleep / workers) per trial, where
               start is the wall-clock time of a sweep of one trial, mostly imports of the workers
    memory     resident memory of the driver when the sweep ends, and the most of its workers
    again      time of the same sweep when all is finished, per trial
"""

import argparse
import hashlib
import json
import resource
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from reptrt.core.choices import TargetName
from reptrt.core.options_json import json_from_options
from reptrt.pipeline.options import CalibrateOptions, ExportOptions
from reptrt.runs.run import FLOAT_FILE, INT8_FILE
from reptrt.sources.source import Source
from reptrt.sweeping import planning
from reptrt.sweeping.options import SweepOptions
from reptrt.sweeping.sheet import JudgingOptions, NetPlan, Sheet, TrialPlan
from reptrt.sweeping.store import Made, Store
from reptrt.sweeping.sweeping import sweep

TARGET: TargetName = "tensorrt"
KIB = 16  # size of a file that stands for a net


def export_net(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Stand for an export."""
    return Store(payload["store"]).once(
        payload["key"], lambda folder: Made({}, (_file(folder / FLOAT_FILE, payload["key"]),))
    )


def make_trial(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Stand for a trial: sleep for the seconds that its options say, and write a file."""
    store, (calibrating, judging) = Store(payload["store"]), payload["steps"]

    def calibrate(folder: Path) -> Made:
        time.sleep(calibrating["options"]["memory_budget"])
        found = {"bytes": KIB << 10, "modelled": 0.5, "simulation": None, "lint": None}
        return Made(found, (_file(folder / INT8_FILE, calibrating["key"]),))

    def judge(folder: Path) -> Made:
        of = {"sqnr_db": 30.0 + calibrating["options"]["seed"], "images": 100}
        return Made({"float": of, "int8": of, "cells": [], "change": 0.0})

    calibrated = store.once(calibrating["key"], calibrate)
    return {"calibrated": calibrated, "judged": store.once(judging["key"], judge)}


def sheet_of(nets: int, recipes: int, seconds: float, folder: Path) -> Sheet:
    """Return a sheet of nets that do not exist.

    Args:
        nets: how many.
        recipes: trials of each.
        seconds: that a trial sleeps.
        folder: for the files that stand for the sources.
    """
    images = folder / "images.npz"
    np.savez(images, x=np.zeros((4, 1, 8, 8), np.uint8))
    plans = []
    for index in range(nets):
        source = _file(folder / f"net{index}.onnx", str(index))
        trials = tuple(
            TrialPlan(f"net{index}/{TARGET}/fast/{seed}", TARGET, "fast", str(seed), options)
            for seed in range(recipes)
            for options in [CalibrateOptions(seed=seed, memory_budget=seconds)]
        )
        plans.append(
            NetPlan(
                *(f"net{index}", Source(str(source)), ExportOptions(), images, images),
                *(JudgingOptions(), trials, None),
            )
        )
    return Sheet(tuple(plans))


def simulate(
    nets: int, recipes: int, seconds: float, workers: int, start: float = 0.0
) -> dict[str, float]:
    """Return the numbers of one line of the table; ``start`` is subtracted, in seconds."""
    planning.WORK = Path(__file__).stem  # where workers look for the work
    options = SweepOptions(workers=workers)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sheet = sheet_of(nets, recipes, seconds, folder)
        started = time.perf_counter()
        swept = sweep(sheet, folder / "out", options)
        wall = time.perf_counter() - started
        assert all(row.is_finished for row in swept.rows), json_from_options(swept.rows[0])
        again = sweep(sheet, folder / "out", options)
    assert again.kept == nets * recipes
    trials = nets * recipes
    return {
        "nets": nets,
        "trials": trials,
        "wall_s": wall,
        "overhead_ms": 1000 * (wall - start - trials * seconds / workers) / trials,
        "driver_mib": _resident_mib(),
        "worker_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
        "again_ms": 1000 * again.seconds / trials,
    }


def _file(path: Path, content: str) -> Path:
    """Write a file that depends on a text and on nothing else."""
    block = hashlib.sha256(content.encode()).digest()
    path.write_bytes(block * (KIB * 1024 // len(block)))
    return path


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nets", default="25,50,100,200", help="numbers of nets, one sweep each")
    parser.add_argument("--recipes", type=int, default=6, help="trials of each net")
    parser.add_argument("--seconds", type=float, default=0.05, help="that a trial takes")
    parser.add_argument("--workers", type=int, default=2, help="trials at a time")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    start = simulate(1, 1, 0.001, given.workers)["wall_s"]
    lines = [
        simulate(int(nets), given.recipes, given.seconds, given.workers, start)
        for nets in given.nets.split(",")
    ]
    if given.json:
        print(json.dumps({"start_s": start, "lines": lines}, indent=2))
        return
    print(f"start {start:.1f} s")
    print("  ".join(f"{title:>11}" for title in lines[0]))
    for line in lines:
        print("  ".join(f"{value:11.1f}" for value in line.values()))


if __name__ == "__main__":
    main()
