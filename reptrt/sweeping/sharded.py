"""Evaluate files on a large set of images in parts, by worker processes or Ray.

Each part is a range of whole batches. What its worker collected (the best class of each image,
detections, sums of each batch) is kept in a store under the hash of files, images, options, range
and versions. The parts are put together in the order of the images, and sums are added up batch by
batch as without parts, so all numbers are the same to the last digit.
"""

import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from reptrt.core.artifacts import sha256_of
from reptrt.core.errors import ReptrtError
from reptrt.core.options_json import json_from_options
from reptrt.data.dataset import sampled
from reptrt.judge.conditioning import IMAGES
from reptrt.judge.evaluate import EvalReport, Evaluation
from reptrt.judge.options import EvaluateOptions
from reptrt.quantize.targets.timings import cache_folder
from reptrt.runs import manifest
from reptrt.runs.inputs import annotations_of, record_data
from reptrt.search.trials import key_of
from reptrt.sweeping.options import ShardOptions, SweepOptions
from reptrt.sweeping.planning import WORK
from reptrt.sweeping.schedule import Queue, run
from reptrt.sweeping.store import Store
from reptrt.sweeping.sweeping import check_store, executor_of
from reptrt.sweeping.tasks import Task
from reptrt.sweeping.work import KEPT_FILE

_LOG = logging.getLogger(__name__)


class ShardError(ReptrtError):
    """A part of the images that could not be judged."""


def evaluate_in_shards(
    files: Sequence[Path], data: Path, options: EvaluateOptions, shards: ShardOptions
) -> EvalReport:
    """Return what `reptrt.judge.evaluate` does, with the images divided among workers.

    Args:
        files: .onnx and .engine files.
        data: images to judge on.
        options: of the evaluation.
        shards: number of parts and where they run.

    Raises:
        ReptrtError: an input cannot be used, or a part cannot be judged.
    """
    started = time.perf_counter()
    options = replace(options, threads=options.threads or 1)
    whole = Evaluation(files, data, options)  # refuses what cannot be used before any work
    store = Store(shards.store or str(cache_folder() / "eval"))
    where = SweepOptions(
        store=store.where,
        ray=shards.ray,
        workers=shards.workers,
        threads=options.threads or 1,
        retries=shards.retries,
    )
    check_store(store, where)
    store.prepare()
    total = len(sampled(data, options.limit, options.seed))
    parts = ranges(total, shards.shards or 1, options.batch_size)
    tasks = _tasks(store, files, data, options, parts)
    known = {task.name: store.finished(task.payload["key"]) for task in tasks}
    records: dict[str, Mapping[str, Any]] = {n: of for n, of in known.items() if of is not None}
    left = [task for task in tasks if task.name not in records]
    _LOG.info(
        "eval: %d images in %d parts, %d of them finished before",
        *(total, len(tasks), len(tasks) - len(left)),
    )
    records |= _work(left, where)
    with tempfile.TemporaryDirectory(prefix="reptrt-") as folder:
        for index, task in enumerate(tasks):
            path = store.fetch(records[task.name], KEPT_FILE, Path(folder) / str(index))
            with np.load(path) as kept:
                whole.add_kept(dict(kept))
    _LOG.info("eval: finished in %.1f s", time.perf_counter() - started)
    return whole.report()


def ranges(total: int, shards: int, batch_size: int) -> list[tuple[int, int]]:
    """Return the ranges of the parts: whole batches, and in the first enough images for noise.

    >>> ranges(100, 3, 16)
    [(0, 48), (48, 96), (96, 100)]
    >>> ranges(100, 2, 16)
    [(0, 64), (64, 100)]
    """
    num_batches = -(-total // batch_size)
    batches = max(-(-num_batches // shards), -(-IMAGES // batch_size))
    size = batches * batch_size
    return [(start, min(start + size, total)) for start in range(0, total, size)]


def _tasks(
    store: Store,
    files: Sequence[Path],
    data: Path,
    options: EvaluateOptions,
    parts: Sequence[tuple[int, int]],
) -> list[Task]:
    annotations = annotations_of(options, data)
    decides = {
        "files": [sha256_of(path) for path in files],
        "reference": None if options.reference is None else sha256_of(options.reference),
        "data": record_data(data).sha256,
        "annotations": None if annotations is None else record_data(annotations).sha256,
        "versions": manifest.versions(),
    }
    given = json_from_options(_absolute(options))
    tasks = []
    for start, stop in parts:
        asked = {**given, "reference": None, "annotations": None}
        key = key_of(what="eval shard", options=asked, range=[start, stop], **decides)
        payload: dict[str, Any] = {"key": key, "options": given, "range": [start, stop]}
        payload |= {"files": [str(path.resolve()) for path in files], "data": str(data.resolve())}
        payload["store"] = store.where
        tasks.append(Task(f"images {start} to {stop}", f"{WORK}:judge_shard", payload))
    return tasks


def _work(tasks: Sequence[Task], where: SweepOptions) -> dict[str, Mapping[str, Any]]:
    """Run tasks; return their records."""
    if not tasks:
        return {}
    executor, queue = executor_of(where), Queue()
    records: dict[str, Mapping[str, Any]] = {}
    try:
        for task in tasks:
            queue.add(task)
        for outcome in run(executor, queue, where.retries):
            if outcome.failure is not None:
                raise ShardError(f"{outcome.task.name}: {outcome.failure}")
            records[outcome.task.name] = outcome.result
    finally:
        executor.close()
    return records


def _absolute(options: EvaluateOptions) -> EvaluateOptions:
    """Return options with paths that every process understands."""
    paths = {
        name: path.resolve()
        for name in ("reference", "annotations")
        if (path := getattr(options, name)) is not None
    }
    return replace(options, **paths)
