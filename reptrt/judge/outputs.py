"""The outputs of networks over all images, and how far two networks' outputs are apart.

Several outputs are compared each in its own unit; the first one decides about classes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from reptrt.core.arrays import Float32Array
from reptrt.core.errors import ArtifactError, DataError
from reptrt.core.metrics import db_of_outputs, powers, sqnr_db
from reptrt.core.progress import track
from reptrt.data.dataset import Dataset
from reptrt.execute.runner import Runner, outputs_in_parts

Outputs = Mapping[str, Float32Array]  # each (images, ...), the first output first


def run_dataset(runners: Sequence[Runner], dataset: Dataset, batch_size: int) -> list[Outputs]:
    """Return the outputs of every runner over all images, each (length, ...).

    The images are decoded once for all runners. The first output is always kept, of the others
    those of real values whose first axis is the batch.

    Raises:
        DataError: the images cannot be read, or a network refuses them.
        ArtifactError: the first axis of a first output is not the batch.
    """
    parts: list[dict[str, list[Float32Array]]] = [{} for _ in runners]
    num_batches = -(-dataset.length // batch_size)
    for batch in track(dataset.batches(batch_size), num_batches, "eval"):
        for runner, lists in zip(runners, parts, strict=True):
            for outputs in outputs_in_parts(runner, batch):
                for name, output in outputs.items():
                    lists.setdefault(name, []).append(output)
    return [_joined(lists, dataset.length) for lists in parts]


def _joined(parts: Mapping[str, Sequence[Float32Array]], length: int) -> Outputs:
    first, *others = parts
    kept = {first: np.concatenate(parts[first])}
    if len(kept[first]) != length:
        raise ArtifactError(
            f"output {first}: {len(kept[first])} rows for {length} images; expected the batch as "
            "its first axis"
        )
    rows = [len(part) for part in parts[first]]
    for name in others:
        lists = parts[name]
        if not all(part.ndim and np.issubdtype(part.dtype, np.floating) for part in lists):
            continue
        if [len(part) for part in lists] == rows and len({part.shape[1:] for part in lists}) == 1:
            kept[name] = np.concatenate(lists)
    return kept


def first_of(outputs: Outputs) -> Float32Array:
    """Return the first output."""
    return next(iter(outputs.values()))


def num_not_finite(outputs: Outputs) -> int:
    """Return on how many images an output has NaN or infinite values."""
    length = len(first_of(outputs))
    bad = np.zeros(length, dtype=bool)
    for output in outputs.values():
        bad |= ~np.isfinite(output).reshape(length, -1).all(axis=1)
    return int(bad.sum())


def refuse_labels_beyond(
    name: str, labels: npt.NDArray[np.int64], num_classes: int, otherwise: str = ""
) -> None:
    """Refuse labels that are larger than the number of classes allows.

    Args:
        name: of the network or the data, for the message.
        labels: (N,).
        num_classes: of the network.
        otherwise: what else the user can do, for the message.

    Raises:
        DataError: there are such labels.
    """
    beyond = labels[labels >= num_classes]
    if len(beyond):
        raise DataError(
            f"{name}: label {labels.max()} in the data, but the net has {num_classes} classes "
            f"({len(beyond)} of {len(labels)} labels are beyond them); give labels 0 to "
            f"{num_classes - 1}{otherwise}"
        )


def paired(reference: Outputs, outputs: Outputs) -> dict[str, tuple[Float32Array, Float32Array]]:
    """Return the outputs that both networks have, under the reference's names.

    They are matched by name; the first outputs are a pair whatever their names.
    """
    names = iter(reference)
    pairs = {next(names): (first_of(reference), first_of(outputs))}
    first = next(iter(outputs))
    for name in names:
        if name in outputs and name != first:
            pairs[name] = (reference[name], outputs[name])
    return pairs


def sqnr_by_output(reference: Outputs, outputs: Outputs) -> dict[str, float]:
    """Return the SQNR of each output that both networks have, in dB."""
    return {name: sqnr_db(*pair) for name, pair in paired(reference, outputs).items()}


def total_sqnr_db(reference: Outputs, outputs: Outputs) -> float:
    """Return one SQNR over all outputs, each in its own unit; see `db_of_outputs`."""
    return db_of_outputs([powers(*pair) for pair in paired(reference, outputs).values()])
