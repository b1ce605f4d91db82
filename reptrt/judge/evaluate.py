"""Compare files on the same images: accuracy on labelled images, and distance to a reference.

The JSON form of a report:

    {"results": [{"file": "m.int8.onnx", "images": 10000, "top1": 0.86, "top5": 0.99,
                  "agreement": 0.98,
                  "top1_change": {"value": -0.001, "low": -0.003, "high": 0.001},
                  "sqnr_db": 31.2, "outputs": {"logits": 31.2}, "identical": false}],
     "ill_conditioned": null}

Fractions are 0..1. ``top1`` and ``top5`` are null without labels; they and ``agreement`` are of the
first output. ``agreement``, ``sqnr_db``, ``outputs`` and ``identical`` compare the outputs over all
images with the reference's and are null without one. ``top1_change`` is the difference to the
reference's top-1 and its 95 % interval, from the differences of the same images; null without a
reference or labels. ``outputs`` holds the SQNR of each output;
``sqnr_db`` is that of the only one, or the one of the mean relative error, in which each output
counts in its own unit. JSON has no infinity: where every output equals the reference's (the
reference itself, always) ``sqnr_db`` is null and ``identical`` is true. ``ill_conditioned`` is a
sentence where the reference amplifies noise so much that SQNR says nothing
(`reptrt.judge.conditioning`).

With ``--task detect``, average precision takes the place of ``top1``, ``top5`` and ``agreement``:

    "map": 0.394, "map50": 0.700, "map75": 0.424, "map_small": 0.015, "map_medium": 0.243,
    "map_large": 0.360, "classes": {"RBC": 0.355, "WBC": 0.614},
    "map_change": {"value": -0.001, "low": -0.007, "high": 0.004}

It is null where there is no object of that class or size. ``map_change`` is the difference to the
reference with its 95 % interval (`reptrt.judge.detect.bootstrap`), null without a reference.

With ``--task segment``:

    "miou": 0.716, "pixel_accuracy": 0.942, "class_iou": [0.981, null, 0.612],
    "pixel_agreement": 0.997

``miou`` is the mean of ``class_iou`` over the classes that are in a mask or were found somewhere,
others are null; all are null without masks (`reptrt.judge.tasks.segment`).

With ``--task any``, ``top1``, ``top5`` and ``agreement`` are null, and of each output

    "cosine": {"image": 0.9998}, "psnr_db": {"image": 41.2}

are what they are with the reference; ``psnr_db`` of pictures only, null if they are equal
(`reptrt.judge.tasks.anything`).
"""

import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from reptrt.core.arrays import AnyArray
from reptrt.core.errors import ArtifactError, ConfigError, option
from reptrt.core.progress import track
from reptrt.core.result import Result
from reptrt.data.dataset import Dataset, Images, open_dataset
from reptrt.execute.runner import Runner, open_runner
from reptrt.graph.model import Network, is_engine, proto_of, unique_labels
from reptrt.graph.net import net_from_model
from reptrt.graph.preprocess import Preprocess, read_preprocess
from reptrt.judge.conditioning import Conditioning, conditioning_line
from reptrt.judge.options import EvaluateOptions
from reptrt.judge.outputs import Distance, Outputs, first_of, num_not_finite, paired, run_batch
from reptrt.judge.tasks import open_task
from reptrt.judge.tasks.protocol import Column, Measures, Tally, Task, score
from reptrt.trt.details import read_engine_record


@dataclass(frozen=True, slots=True)
class FileResult:
    """The result of one file; the module says which values are None without labels or reference."""

    file: str
    images: int
    measures: Measures  # the task's: name in JSON -> value
    sqnr_db: float | None  # outputs against the reference's, each in its own unit; may be +inf
    outputs: Mapping[str, float] | None  # output -> its SQNR in dB; may be +inf
    identical: bool | None  # whether every output equals the reference's
    score: float | None = None  # the measure that ranks networks, larger is better
    rows: Mapping[str, Measures] = field(default_factory=dict)  # more rows of the table
    findings: Any = field(default=None, repr=False, compare=False)  # all that the task found out

    @property
    def top1(self) -> float | None:
        """Fraction 0..1 of images whose best class is the label; of a classifier."""
        return self.measures.get("top1")

    @property
    def top5(self) -> float | None:
        """Fraction 0..1 of images whose label is among the five best classes; of a classifier."""
        return self.measures.get("top5")

    @property
    def agreement(self) -> float | None:
        """Fraction 0..1 of images with the reference's best class; of a classifier."""
        return self.measures.get("agreement")

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; an infinite SQNR becomes null."""
        outputs = self.outputs
        return {
            "file": self.file,
            "images": self.images,
            **self.measures,
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
    columns: tuple[Column, ...] = ()  # of the task, for the table
    noise_db: float | None = None  # SQNR of the reference under the noise of its images' rounding

    @property
    def ill_conditioned(self) -> str | None:
        """A sentence where the reference is so ill-conditioned that SQNR says nothing."""
        return conditioning_line(self.noise_db)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        results = [result.to_dict() for result in self.results]
        return {"results": results, "ill_conditioned": self.ill_conditioned}

    def to_lines(self) -> list[str]:
        """Return the sentence on the reference, if there is one."""
        return [] if self.ill_conditioned is None else [self.ill_conditioned]

    def to_table(self) -> Table:
        """Return the report as a table for people."""
        table = Table(box=None, pad_edge=False)
        table.add_column("file", overflow="fold")
        for title in ("images", *(column.title for column in self.columns), "SQNR dB"):
            table.add_column(title, justify="right", no_wrap=True)
        for result in self.results:
            sqnr = "-" if result.sqnr_db is None else f"{result.sqnr_db:.2f}"
            table.add_row(result.file, str(result.images), *self._cells(result.measures), sqnr)
            outputs = result.outputs or {}
            several = outputs if len(outputs) > 1 else {}
            for name in dict.fromkeys((*result.rows, *several)):
                sqnr = f"{several[name]:.2f}" if name in several else ""
                table.add_row(f"  {name}", "", *self._cells(result.rows.get(name, {})), sqnr)
        return table

    def _cells(self, measures: Measures) -> list[str]:
        return [column.cell(measures) for column in self.columns]


def evaluate(
    networks: Sequence[Network],
    images: Images,
    options: EvaluateOptions = EvaluateOptions(),
    *,
    reference: Network | None = None,
    taken: Sequence[int] | None = None,
) -> EvalReport:
    """Run every network on the same images and compare.

    The images of each network are prepared as its own metadata says. Networks that need the same
    preparation run side by side, so that images are decoded once.

    Args:
        networks: .onnx and .engine files and models in memory, in the order of the report.
        images: the images to run; top-1 and top-5 need labels.
        options: how networks are run, how many images are used, and the reference.
        reference: the network to compare outputs with; it overrides ``options.reference``.
        taken: the indices of the images to use, in place of a sample.

    Raises:
        ReptrtError: a file or image cannot be used, or outputs cannot be compared.
    """
    evaluation = Evaluation(networks, images, options, reference=reference, taken=taken)
    evaluation.run()
    return evaluation.report()


class Evaluation:
    """What `evaluate` does, in steps: other processes may run a part of the images each.

    Args:
        networks: as for `evaluate`, and so are the others.
        images: the images.
        options: of the evaluation.
        reference: the network to compare with.
        taken: the indices of the images to use.
    """

    def __init__(
        self,
        networks: Sequence[Network],
        images: Images,
        options: EvaluateOptions,
        *,
        reference: Network | None = None,
        taken: Sequence[int] | None = None,
    ) -> None:
        reference = reference or options.reference
        different = list(dict.fromkeys([*networks, *([] if reference is None else [reference])]))
        labels_of = dict(zip(different, unique_labels(different), strict=True))
        self._networks, self._options, self._reference = networks, options, reference
        self._task = open_task(options, images)
        limit, seed = options.limit, options.seed
        self._groups = [
            (open_dataset(images, preprocess, limit=limit, seed=seed, taken=taken), group)
            for preprocess, group in _by_preprocess(different, reference).items()
        ]
        self._judged = {
            network: Judged(
                labels_of[network],
                self._task.tally(labels_of[network], dataset),
                None if reference is None else Distance(),
            )
            for dataset, group in self._groups
            for network in group
        }
        self._noise: float | None = None

    def run(self, *, with_noise: bool = True) -> None:
        """Run all networks on all images.

        Args:
            with_noise: measure on the first images what noise does to the reference.
        """
        with contextlib.ExitStack() as stack:
            runners = {
                network: stack.enter_context(_open(network, self._options))
                for network in self._judged
            }
            self._noise = _run_all(
                self._judged,
                runners,
                self._groups,
                self._reference,
                self._options.batch_size,
                with_noise=with_noise,
            )

    def kept(self) -> dict[str, AnyArray]:
        """Return all that was collected, as arrays that a file can hold."""
        found = {"noise": np.array(np.nan if self._noise is None else self._noise)}
        for index, of in enumerate(self._judged.values()):
            found |= {f"{index}.{name}": value for name, value in of.kept().items()}
        return found

    def add_kept(self, kept: Mapping[str, AnyArray]) -> None:
        """Add what another evaluation of the same networks collected of the next images."""
        if self._noise is None and not np.isnan(kept["noise"]):
            self._noise = float(kept["noise"])
        for index, of in enumerate(self._judged.values()):
            of.add_kept(_below(f"{index}.", kept))

    def report(self) -> EvalReport:
        """Return the results of all images that were run or added.

        Raises:
            ArtifactError: there are outputs that are NaN or infinite.
        """
        findings = {network: of.findings() for network, of in self._judged.items()}
        compared_with = None if self._reference is None else findings[self._reference]
        results = (
            _result(self._task, self._judged[network], findings[network], compared_with)
            for network in self._networks
        )
        return EvalReport(tuple(results), self._task.columns, self._noise)


def _below(prefix: str, kept: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
    """Return the arrays whose names begin with a prefix, without it."""
    return {name[len(prefix) :]: of for name, of in kept.items() if name.startswith(prefix)}


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


@dataclass(slots=True)
class Judged:
    """One network while it is judged."""

    name: str
    tally: Tally[Any]
    distance: Distance | None  # to the reference; None: there is none
    images: int = 0
    bad: int = 0  # images with NaN or infinite outputs

    def add(self, outputs: Outputs, reference: Outputs | None) -> None:
        """Add the outputs of the next images."""
        rows = len(first_of(outputs))
        bad = num_not_finite(outputs)
        self.images += rows
        self.bad += bad
        if self.bad:
            return
        if self.distance is not None and reference is not None:
            _check_shapes(self.name, reference, outputs)
            self.distance.add(reference, outputs)
        self.tally.add(outputs, reference)

    def kept(self) -> dict[str, AnyArray]:
        """Return all that was added, as arrays that a file can hold."""
        counts: dict[str, AnyArray] = {"seen": np.array([self.images, self.bad])}
        distance = {} if self.distance is None else self.distance.kept()
        tally = {} if self.bad else self.tally.kept()
        for prefix, found in (("distance", distance), ("tally", tally)):
            counts |= {f"{prefix}.{name}": value for name, value in found.items()}
        return counts

    def add_kept(self, kept: Mapping[str, AnyArray]) -> None:
        """Add what was kept of the next images."""
        images, bad = kept["seen"].tolist()
        self.images += images
        self.bad += bad
        if self.bad:
            return
        if self.distance is not None:
            self.distance.add_kept(_below("distance.", kept))
        self.tally.add_kept(_below("tally.", kept))

    def findings(self) -> Any:
        """Return what the task found out.

        Raises:
            ArtifactError: there are outputs that are NaN or infinite.
        """
        if self.bad:
            raise ArtifactError(
                f"{self.name}: NaN or infinite outputs on {self.bad} of {self.images} images; the "
                "net is broken or expects inputs on another scale"
            )
        return self.tally.findings()


def _run_all(
    judged: Mapping[Network, Judged],
    runners: Mapping[Network, Runner],
    groups: Sequence[tuple[Dataset, Sequence[Network]]],
    reference: Network | None,
    batch_size: int,
    *,
    with_noise: bool,
) -> float | None:
    """Run all networks batch by batch, so that the outputs of one batch are in memory at a time.

    Returns:
        The SQNR of the reference under noise, see `Conditioning`; None without a reference.
    """
    conditioning: Conditioning | None = None
    batches = zip(*(dataset.batches(batch_size) for dataset, _ in groups), strict=True)
    num_batches = -(-groups[0][0].length // batch_size)
    for batch_of_each in track(batches, num_batches, "eval"):
        outputs = {
            network: run_batch(runners[network], batch)
            for batch, (_, group) in zip(batch_of_each, groups, strict=True)
            for network in group
        }
        expected = None if reference is None else outputs[reference]
        for network, of in judged.items():
            of.add(outputs[network], expected)
        for batch, (dataset, group) in zip(batch_of_each, groups, strict=True):
            if with_noise and reference is not None and reference in group:
                conditioning = conditioning or Conditioning(dataset.preprocess)
                run = functools.partial(run_batch, runners[reference])
                conditioning.add(batch, outputs[reference], run)
    return None if conditioning is None else conditioning.sqnr_db


def _result(task: Task[Any], of: Judged, findings: Any, reference: Any) -> FileResult:
    measures = {**findings.measures, **task.compare(reference, findings)}
    distance = of.distance
    return FileResult(
        file=of.name,
        images=of.images,
        measures=measures,
        sqnr_db=None if distance is None else distance.sqnr_db,
        outputs=None if distance is None else distance.by_output,
        identical=None if distance is None else distance.identical,
        score=score(task, measures),
        rows=findings.rows,
        findings=findings,
    )


def _check_shapes(name: str, reference: Outputs, outputs: Outputs) -> None:
    for output, (expected, got) in paired(reference, outputs).items():
        if got.shape != expected.shape:
            raise ConfigError(
                f"{name}: output {output} has shape {got.shape}, the reference's {expected.shape}; "
                "they cannot be compared"
            )
