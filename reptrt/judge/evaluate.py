"""Compare files on the same images: accuracy on labelled images, and distance to a reference.

The JSON form of a report:

    {"results": [{"file": "m.int8.onnx", "images": 10000, "top1": 0.86, "top5": 0.99,
                  "agreement": 0.98, "sqnr_db": 31.2, "identical": false}]}

Fractions are 0..1. ``top1`` and ``top5`` are null without labels. ``agreement``, ``sqnr_db`` and
``identical`` compare the outputs over all images with those of the reference; without a reference
they are null. JSON has no infinity: if all outputs equal the reference's (as those of the reference
itself do), ``sqnr_db`` is null and ``identical`` is true.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from reptrt.core.errors import ArtifactError, ConfigError, DataError, option
from reptrt.core.metrics import agreement, sqnr_db, top_k_accuracy
from reptrt.core.progress import track
from reptrt.core.result import Result
from reptrt.data.dataset import Dataset, Images, open_dataset
from reptrt.execute.runner import Runner, open_runner, outputs_in_parts
from reptrt.graph.model import Network, is_engine, proto_of, unique_labels
from reptrt.graph.net import net_from_model
from reptrt.graph.preprocess import Preprocess, read_preprocess
from reptrt.judge.options import EvaluateOptions
from reptrt.trt.details import read_engine_record

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class FileResult:
    """The result of one file; the module says which values are None without labels or reference."""

    file: str
    images: int
    top1: float | None  # fraction 0..1
    top5: float | None  # fraction 0..1
    agreement: float | None  # fraction of images with the reference's arg max
    sqnr_db: float | None  # outputs against the reference's; may be +inf
    identical: bool | None  # whether every output equals the reference's

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; an infinite SQNR becomes null."""
        finite = self.sqnr_db is not None and math.isfinite(self.sqnr_db)
        return {
            "file": self.file,
            "images": self.images,
            "top1": self.top1,
            "top5": self.top5,
            "agreement": self.agreement,
            "sqnr_db": self.sqnr_db if finite else None,
            "identical": self.identical,
        }


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
    outputs: dict[Network, Float32Array] = {}
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


def run_dataset(runners: Sequence[Runner], dataset: Dataset, batch_size: int) -> list[Float32Array]:
    """Return the first output of every runner over all images, each (length, ...).

    The images are decoded once for all runners.

    Raises:
        DataError: the images cannot be read, or a network refuses them.
        ArtifactError: the first axis of an output is not the batch.
    """
    parts: list[list[Float32Array]] = [[] for _ in runners]
    num_batches = -(-dataset.length // batch_size)
    for batch in track(dataset.batches(batch_size), num_batches, "eval"):
        for runner, part in zip(runners, parts, strict=True):
            first = runner.output_names[0]
            part += [outputs[first] for outputs in outputs_in_parts(runner, batch)]
    outputs = [np.concatenate(part) for part in parts]
    for runner, output in zip(runners, outputs, strict=True):
        if len(output) != dataset.length:
            raise ArtifactError(
                f"output {runner.output_names[0]}: {len(output)} rows for {dataset.length} images; "
                "expected the batch as its first axis"
            )
    return outputs


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
    outputs: Float32Array,
    labels: npt.NDArray[np.int64] | None,
    folders: int | None,
    reference: Float32Array | None,
    is_any: bool,
) -> FileResult:
    """Compare outputs (N, ...) with labels (N,) and reference outputs (N, ...).

    Args:
        name: name of the network.
        outputs: outputs of the network.
        labels: class indices; None: the images have no labels.
        folders: number of class folders that the labels come from; None: they have another source.
        reference: outputs of the reference; None: there is no reference.
        is_any: outputs are not scores of classes, whatever their shape.
    """
    bad = int((~np.isfinite(outputs).reshape(len(outputs), -1).all(axis=1)).sum())
    if bad:
        raise ArtifactError(
            f"{name}: NaN or infinite outputs on {bad} of {len(outputs)} images; the net is broken "
            "or expects inputs on another scale"
        )
    if reference is not None and reference.shape != outputs.shape:
        raise ConfigError(
            f"{name}: outputs have shape {outputs.shape}, the reference's {reference.shape}; "
            "they cannot be compared"
        )
    logits = outputs.reshape(len(outputs), -1)
    is_classifier = not is_any and outputs.ndim > 1 and logits.shape[1] == outputs.shape[1]
    top1 = top5 = same_class = None
    if labels is not None and is_classifier:
        _check_labels(name, labels, folders, logits.shape[1])
        top1, top5 = (top_k_accuracy(logits, labels, k) for k in (1, 5))
    if reference is not None and is_classifier:
        same_class = agreement(reference.reshape(logits.shape), logits)
    return FileResult(
        file=name,
        images=len(outputs),
        top1=top1,
        top5=top5,
        agreement=same_class,
        sqnr_db=None if reference is None else sqnr_db(reference, outputs),
        identical=None if reference is None else np.array_equal(reference, outputs),
    )


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
    beyond = labels[labels >= num_classes]
    if len(beyond):
        raise DataError(
            f"{name}: label {labels.max()} in the data, but the net has {num_classes} classes "
            f"({len(beyond)} of {len(labels)} labels are beyond them); give labels 0 to "
            f"{num_classes - 1}, or {option('task', 'any')}"
        )
