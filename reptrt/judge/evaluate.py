"""Compare files on the same images: accuracy on labelled images, and distance to a reference.

The JSON form of a report:

    {"results": [{"file": "m.int8.onnx", "images": 10000, "top1": 0.86, "top5": 0.99,
                  "agreement": 0.98, "sqnr_db": 31.2, "outputs": {"logits": 31.2},
                  "identical": false}]}

Fractions are 0..1. ``top1`` and ``top5`` are null without labels; they and ``agreement`` are of the
first output. ``agreement``, ``sqnr_db``, ``outputs`` and ``identical`` compare the outputs over all
images with the reference's and are null without one. ``outputs`` holds the SQNR of each output;
``sqnr_db`` is that of the only one, or the one of the mean relative error, in which each output
counts in its own unit. JSON has no infinity: where every output equals the reference's (the
reference itself, always) ``sqnr_db`` is null and ``identical`` is true.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from reptrt.core.errors import ArtifactError, ConfigError, DataError, option
from reptrt.core.metrics import agreement, class_scores, top_k_accuracy
from reptrt.core.result import Result
from reptrt.data.dataset import Images, open_dataset
from reptrt.execute.runner import Runner, open_runner
from reptrt.graph.model import Network, is_engine, proto_of, unique_labels
from reptrt.graph.net import net_from_model
from reptrt.graph.preprocess import Preprocess, read_preprocess
from reptrt.judge.options import EvaluateOptions
from reptrt.judge.outputs import (
    Outputs,
    first_of,
    num_not_finite,
    paired,
    refuse_labels_beyond,
    run_dataset,
    sqnr_by_output,
    total_sqnr_db,
)
from reptrt.trt.details import read_engine_record


@dataclass(frozen=True, slots=True)
class FileResult:
    """The result of one file; the module says which values are None without labels or reference."""

    file: str
    images: int
    top1: float | None  # fraction 0..1
    top5: float | None  # fraction 0..1
    agreement: float | None  # fraction of images with the reference's arg max
    sqnr_db: float | None  # outputs against the reference's, each in its own unit; may be +inf
    outputs: Mapping[str, float] | None  # output -> its SQNR in dB; may be +inf
    identical: bool | None  # whether every output equals the reference's

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; an infinite SQNR becomes null."""
        outputs = self.outputs
        return {
            "file": self.file,
            "images": self.images,
            "top1": self.top1,
            "top5": self.top5,
            "agreement": self.agreement,
            "sqnr_db": _finite(self.sqnr_db),
            "outputs": None if outputs is None else {n: _finite(db) for n, db in outputs.items()},
            "identical": self.identical,
        }


def _finite(ratio: float | None) -> float | None:
    return ratio if ratio is not None and math.isfinite(ratio) else None


@dataclass(frozen=True, slots=True, repr=False)
class EvalReport(Result):
    """One result for each file, in the order of the files."""

    results: tuple[FileResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {"results": [result.to_dict() for result in self.results]}

    def to_table(self) -> Table:
        """Return the report as a table for people."""
        table = Table(box=None, pad_edge=False)
        table.add_column("file", overflow="fold")
        for title in ("images", "top-1", "top-5", "agreement", "SQNR dB"):
            table.add_column(title, justify="right", no_wrap=True)
        for result in self.results:
            fractions = (result.top1, result.top5, result.agreement)
            table.add_row(
                result.file,
                str(result.images),
                *("-" if value is None else f"{100 * value:.2f} %" for value in fractions),
                "-" if result.sqnr_db is None else f"{result.sqnr_db:.2f}",
            )
            several = result.outputs is not None and len(result.outputs) > 1
            for name, ratio in (result.outputs or {}).items() if several else ():
                table.add_row(f"  {name}", *("",) * 4, f"{ratio:.2f}")
        return table


def evaluate(
    networks: Sequence[Network],
    images: Images,
    options: EvaluateOptions = EvaluateOptions(),
    *,
    reference: Network | None = None,
) -> EvalReport:
    """Run every network on the same images and compare.

    The images of each network are prepared as its own metadata says. Networks that need the same
    preparation run side by side, so that images are decoded once.

    Args:
        networks: .onnx and .engine files and models in memory, in the order of the report.
        images: the images to run; top-1 and top-5 need labels.
        options: how networks are run, how many images are used, and the reference.
        reference: the network to compare outputs with; it overrides ``options.reference``.

    Raises:
        ReptrtError: a file or image cannot be used, or outputs cannot be compared.
    """
    reference = reference or options.reference
    different = list(dict.fromkeys([*networks, *([] if reference is None else [reference])]))
    labels_of = dict(zip(different, unique_labels(different), strict=True))
    outputs: dict[Network, Outputs] = {}
    labels: npt.NDArray[np.int64] | None = None
    folders: int | None = None
    for preprocess, group in _by_preprocess(different, reference).items():
        dataset = open_dataset(images, preprocess, limit=options.limit, seed=options.seed)
        labels, folders = dataset.labels, dataset.num_classes
        with contextlib.ExitStack() as stack:
            runners = [stack.enter_context(_open(network, options)) for network in group]
            group_outputs = run_dataset(runners, dataset, options.batch_size)
        outputs.update(zip(group, group_outputs, strict=True))
    expected = outputs[reference] if reference is not None else None
    is_any = options.task == "any"
    return EvalReport(
        tuple(
            _judge(labels_of[network], outputs[network], labels, folders, expected, is_any)
            for network in networks
        )
    )


def preprocess_of(network: Network, reference: Network | None = None) -> Preprocess:
    """Return the preprocessing of a network's images.

    It is read from the metadata of an ONNX model. An engine has no metadata, so it is read from its
    sidecar, or else from the metadata of the reference.

    Raises:
        ConfigError: neither a sidecar nor a reference describes the preprocessing of an engine.
    """
    if not (isinstance(network, Path) and is_engine(network)):
        return read_preprocess(net_from_model(proto_of(network)))
    record = read_engine_record(network)
    if record is not None and record.details.preprocess is not None:
        return record.details.preprocess
    if reference is not None and not is_engine(reference):
        return preprocess_of(reference)
    raise ConfigError(
        f"{network}: the preprocessing of its images is unknown; expected {network.name}.json "
        f"beside it, or give {option('reference')}: the .onnx file that it was built from"
    )


def _open(network: Network, options: EvaluateOptions) -> Runner:
    return open_runner(
        network, runner=options.runner, threads=options.threads, device=options.device
    )


def _by_preprocess(
    networks: Sequence[Network], reference: Network | None
) -> dict[Preprocess, list[Network]]:
    groups: dict[Preprocess, list[Network]] = {}
    for network in networks:
        groups.setdefault(preprocess_of(network, reference), []).append(network)
    return groups


def _judge(
    name: str,
    outputs: Outputs,
    labels: npt.NDArray[np.int64] | None,
    folders: int | None,
    reference: Outputs | None,
    is_any: bool,
) -> FileResult:
    """Compare the first output (N, ...) with labels (N,), and all outputs with the reference's.

    Args:
        name: name of the network.
        outputs: outputs of the network.
        labels: class indices; None: the images have no labels.
        folders: number of class folders that the labels come from; None: they have another source.
        reference: outputs of the reference; None: there is no reference.
        is_any: outputs are not scores of classes, whatever their shape.
    """
    first = first_of(outputs)
    bad = num_not_finite(outputs)
    if bad:
        raise ArtifactError(
            f"{name}: NaN or infinite outputs on {bad} of {len(first)} images; the net is broken "
            "or expects inputs on another scale"
        )
    if reference is not None:
        _check_shapes(name, reference, outputs)
    logits = None if is_any else class_scores(first)
    top1 = top5 = same_class = None
    if labels is not None and logits is not None:
        _check_labels(name, labels, folders, logits.shape[1])
        top1, top5 = (top_k_accuracy(logits, labels, k) for k in (1, 5))
    if reference is not None and logits is not None:
        same_class = agreement(first_of(reference).reshape(logits.shape), logits)
    return FileResult(
        file=name,
        images=len(first),
        top1=top1,
        top5=top5,
        agreement=same_class,
        sqnr_db=None if reference is None else total_sqnr_db(reference, outputs),
        outputs=None if reference is None else sqnr_by_output(reference, outputs),
        identical=None if reference is None else _are_equal(reference, outputs),
    )


def _check_shapes(name: str, reference: Outputs, outputs: Outputs) -> None:
    for output, (expected, got) in paired(reference, outputs).items():
        if got.shape != expected.shape:
            raise ConfigError(
                f"{name}: output {output} has shape {got.shape}, the reference's {expected.shape}; "
                "they cannot be compared"
            )


def _are_equal(reference: Outputs, outputs: Outputs) -> bool:
    pairs = paired(reference, outputs).values()
    return all(np.array_equal(expected, got) for expected, got in pairs)


def _check_labels(
    name: str, labels: npt.NDArray[np.int64], folders: int | None, num_classes: int
) -> None:
    """Refuse labels that cannot be those of the net's classes."""
    if folders is not None and folders != num_classes:
        raise DataError(
            f"{name}: the net has {num_classes} classes, the data {folders} class folders; a label "
            "is the position of its folder, so there has to be one for each class: add the missing "
            f"ones (they may be empty), give an .npz with labels y, or {option('task', 'any')}"
        )
    refuse_labels_beyond(name, labels, num_classes, f", or {option('task', 'any')}")
