"""``classify``: the first output holds scores of classes, (N, C) or (N, C, 1, ...).

Measured are top-1 and top-5 where the images have labels, and the agreement with a reference: the
fraction of images with the same best class. ``top1_change`` is the difference to the reference's
top-1 and its 95 % interval, of the paired differences of images. Outputs of another shape have none
of these.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt

from reptrt.core.arrays import AnyArray, FloatArray, IntArray
from reptrt.core.errors import ConfigError, DataError, option
from reptrt.core.intervals import paired_interval
from reptrt.core.metrics import class_scores, top_k_hits
from reptrt.data.dataset import Dataset, Images
from reptrt.graph.detector_layouts import layout_of_outputs
from reptrt.judge.options import TaskOptions
from reptrt.judge.outputs import Outputs, first_of, refuse_labels_beyond
from reptrt.judge.tasks.protocol import Column, Measures, change_text, percent

_LOG = logging.getLogger(__name__)
_RANKS = {"top1": 1, "top5": 5}


@dataclass(frozen=True, slots=True)
class Classes:
    """Best classes and accuracy over all images."""

    measures: Measures  # top1 and top5; None without labels, and if not a classifier
    best: IntArray | None  # (N,): class of the largest score; None: not a classifier
    hits: npt.NDArray[np.bool_] | None = None  # (N,): it is the label's; None: as for top1
    rows: Mapping[str, Measures] = field(default_factory=dict)


class _Tally:
    """Best classes and hits, batch by batch."""

    def __init__(self, name: str, dataset: Dataset) -> None:
        self._name = name
        self._labels = dataset.labels
        self._folders = dataset.num_classes
        self._best: list[IntArray] | None = []
        self._hits: dict[str, list[npt.NDArray[np.bool_]]] = {key: [] for key in _RANKS}
        self._seen = 0  # images

    def add(self, outputs: Outputs, reference: Outputs | None = None) -> None:
        scores = class_scores(first_of(outputs))
        if scores is None or self._best is None:
            if self._best is not None:
                self._check_outputs(outputs)
            self._best = None
            return
        if self._labels is not None:
            self._count(scores, self._labels)
        self._best.append(scores.argmax(axis=1))
        self._seen += len(scores)

    def findings(self) -> Classes:
        best = None if self._best is None else np.concatenate(self._best)
        known = best is not None and self._labels is not None
        hits = {key: np.concatenate(parts) if known else None for key, parts in self._hits.items()}
        accuracy = {key: None if of is None else float(of.mean()) for key, of in hits.items()}
        return Classes(accuracy, best, hits["top1"])

    def kept(self) -> dict[str, AnyArray]:
        if self._best is None:
            return {}
        hits = {key: np.concatenate(parts) for key, parts in self._hits.items() if parts}
        return {"best": np.concatenate(self._best), **hits}

    def add_kept(self, kept: Mapping[str, AnyArray]) -> None:
        if "best" not in kept or self._best is None:
            self._best = None
            return
        self._best.append(kept["best"])
        self._seen += len(kept["best"])
        for key, parts in self._hits.items():
            parts += [kept[key]] if key in kept else []

    def _check_outputs(self, outputs: Outputs) -> None:
        """Say that these are the outputs of a detector, if they are."""
        shapes = [("N", *value.shape[1:]) for value in outputs.values()]
        layout = layout_of_outputs(shapes)
        if isinstance(layout, str):
            return
        if self._labels is not None:
            raise ConfigError(
                f"{self._name}: its outputs look like those of a detector, {layout}, the data has "
                f"labels of classes; judge it with {option('task', 'detect')} and a COCO json, or "
                f"compare outputs only with {option('task', 'any')}"
            )
        _LOG.warning(
            "%s: its outputs look like those of a detector, %s: task detect gives its mAP",
            *(self._name, layout),
        )

    def _count(self, scores: FloatArray, all_labels: IntArray) -> None:
        if self._seen == 0:
            _check_labels(self._name, all_labels, self._folders, scores.shape[1])
        labels = all_labels[self._seen : self._seen + len(scores)]
        for key, k in _RANKS.items():
            self._hits[key].append(top_k_hits(scores, labels, k))


class Classify:
    """Scores of classes; see `reptrt.judge.tasks.protocol`."""

    columns = (
        Column("top1", "top-1", percent),
        Column("top5", "top-5", percent),
        Column("agreement", "agreement", percent),
        Column("top1_change", "change of top-1 (95 %)", change_text),
    )
    ranked_by: tuple[str, ...] = ("top1", "agreement")

    def __init__(self, options: TaskOptions, images: Images) -> None:
        if options.annotations is not None:
            raise ConfigError(
                f"{option('annotations')}: got {options.annotations}, which task classify does not "
                f"read; judge a detector with {option('task', 'detect')}"
            )

    def tally(self, name: str, dataset: Dataset) -> _Tally:
        """Return an empty tally for a network."""
        return _Tally(name, dataset)

    def compare(self, reference: Classes | None, findings: Classes) -> Measures:
        """Return the fraction of images with the same best class, and the change of top-1."""
        if reference is None or reference.best is None or findings.best is None:
            return {"agreement": None, "top1_change": None}
        same = float((reference.best == findings.best).mean())
        if reference is findings or reference.hits is None or findings.hits is None:
            return {"agreement": same, "top1_change": None}
        change = paired_interval(reference.hits, findings.hits)
        return {"agreement": same, "top1_change": asdict(change)}


def _check_labels(name: str, labels: IntArray, folders: int | None, num_classes: int) -> None:
    """Refuse labels that cannot be those of the net's classes."""
    if folders is not None and folders != num_classes:
        raise DataError(
            f"{name}: the net has {num_classes} classes, the data {folders} class folders; a label "
            "is the position of its folder, so there has to be one for each class: add the missing "
            f"ones (they may be empty), give an .npz with labels y, or {option('task', 'any')}"
        )
    refuse_labels_beyond(name, labels, num_classes, f", or {option('task', 'any')}")
