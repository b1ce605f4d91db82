"""The outputs of networks over all images, and how far two networks' outputs are apart.

Several outputs are compared each in its own unit; the first one decides about classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from reptrt.core.arrays import AnyArray, Float32Array
from reptrt.core.errors import ArtifactError, DataError
from reptrt.core.metrics import db_from_powers, db_of_outputs, powers
from reptrt.core.progress import track
from reptrt.data.dataset import Dataset
from reptrt.execute.runner import Runner, outputs_in_parts

Outputs = Mapping[str, Float32Array]  # each (images, ...), the first output first


def run_dataset(runners: Sequence[Runner], dataset: Dataset, batch_size: int) -> list[Outputs]:
    """Return the outputs of every runner over all images, each (length, ...).

    The images are decoded once for all runners. Outputs whose first axis is not the batch are left
    out.

    Raises:
        DataError: the images cannot be read, or a network refuses them.
        ArtifactError: the first axis of no output is the batch.
    """
    parts: list[list[Outputs]] = [[] for _ in runners]
    num_batches = -(-dataset.length // batch_size)
    for batch in track(dataset.batches(batch_size), num_batches, "eval"):
        for runner, lists in zip(runners, parts, strict=True):
            lists.append(run_batch(runner, batch))
    return [_joined(lists) for lists in parts]


def run_batch(runner: Runner, batch: Float32Array) -> Outputs:
    """Return the outputs of a runner for a batch of images, each (n, ...).

    Outputs whose first axis is not the batch are left out.

    Raises:
        DataError: the network refuses the images.
        ArtifactError: the first axis of no output is the batch.
    """
    parts: list[Outputs] = []
    left = len(batch)
    for outputs in outputs_in_parts(runner, batch):
        images = min(left, runner.input_shape[0] or left)
        left -= images
        kept = {k: v for k, v in outputs.items() if v.ndim and len(v) == images}
        if not kept:
            name, value = next(iter(outputs.items()))
            raise ArtifactError(
                f"output {name}: shape {value.shape} for {images} images; expected the batch as "
                "its first axis"
            )
        parts.append(kept)
    return _joined(parts)


def _joined(parts: Sequence[Outputs]) -> Outputs:
    """Return outputs of consecutive images as one; those that all parts have in one shape."""
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Float32Array] = {}
    for index, name in enumerate(parts[0]):
        lists = [part[name] for part in parts if name in part]
        same_shape = len({part.shape[1:] for part in lists}) == 1
        if index == 0 or (len(lists) == len(parts) and same_shape):
            joined[name] = np.concatenate(lists)
    return joined


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

    They are matched by name; two first outputs without a namesake are a pair too. Classes and other
    integers are left out beside real values: how far two of them are apart says nothing.
    """
    pairs = {name: (reference[name], outputs[name]) for name in reference if name in outputs}
    first, other = next(iter(reference)), next(iter(outputs))
    if first not in outputs and other not in reference:
        pairs = {first: (reference[first], outputs[other]), **pairs}
    real = {
        name: pair
        for name, pair in pairs.items()
        if all(np.issubdtype(value.dtype, np.floating) for value in pair)
    }
    return real or pairs


def total_sqnr_db(reference: Outputs, outputs: Outputs) -> float:
    """Return one SQNR over all outputs, each in its own unit; see `db_of_outputs`."""
    return db_of_outputs([powers(*pair) for pair in paired(reference, outputs).values()])


@dataclass(slots=True)
class Distance:
    """How far outputs are from a reference's, batch by batch.

    What batches give is added up in their order, so that the result is the same to the last digit
    whoever ran them.
    """

    batches: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # signal, noise
    identical: bool = True

    def add(self, reference: Outputs, outputs: Outputs) -> None:
        """Add the outputs of the same images; those that a batch does not have are left out."""
        pairs = paired(reference, outputs)
        self._extend({name: [powers(*pair)] for name, pair in pairs.items()})
        self.identical &= all(np.array_equal(*pairs[name]) for name in self.batches)

    def _extend(self, found: Mapping[str, list[tuple[float, float]]]) -> None:
        """Add batches; outputs that these or those before do not have are left out."""
        known = self.batches or {name: [] for name in found}
        self.batches = {name: known[name] + found[name] for name in known if name in found}

    def kept(self) -> dict[str, AnyArray]:
        """Return all that was added, as arrays that a file can hold."""
        found = {f"of.{name}": np.array(of, np.float64) for name, of in self.batches.items()}
        return {**found, "identical": np.array(self.identical)}

    def add_kept(self, kept: Mapping[str, AnyArray]) -> None:
        """Add what another distance was given of the next images."""
        found = {name.partition(".")[2]: of for name, of in kept.items() if name != "identical"}
        self._extend({name: [(float(s), float(n)) for s, n in of] for name, of in found.items()})
        self.identical &= bool(kept["identical"])

    @property
    def powers(self) -> dict[str, tuple[float, float]]:
        """The power of the signal and of the noise of each output, summed over all images."""
        return {
            name: (sum((s for s, _ in of), 0.0), sum((n for _, n in of), 0.0))
            for name, of in self.batches.items()
        }

    @property
    def by_output(self) -> dict[str, float]:
        """The SQNR of each output that both networks have, in dB."""
        return {name: db_from_powers(*sums) for name, sums in self.powers.items()}

    @property
    def sqnr_db(self) -> float:
        """One SQNR over all outputs, each in its own unit; see `db_of_outputs`."""
        return db_of_outputs(list(self.powers.values()))
