"""Covariances of the inputs of layers over the calibration images."""

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reptrt.core.progress import track
from reptrt.data.dataset import Dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.quantize.calib.collect import COMPUTE_BATCH, Kept, Record, rows_that_count, watch
from reptrt.quantize.calib.outputs import parts
from reptrt.quantize.rounding.sums import ROWS_AT_ONCE, Sums
from reptrt.quantize.rounding.windows import Window

_MOST_INPUTS = 2304  # of one covariance: 256 channels of 3 x 3 taps
_ROWS_PER_INPUT = 8
_LEAST_ROWS = 8192
_JUDGING_ROWS = 1024  # of the held-out images


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of layers that read one tensor in the same way."""

    tensor: str
    window: Window
    channels: int  # of one group
    centred: bool  # the mean does not count: biases will be corrected for it

    @property
    def size(self) -> int:
        """Inputs of one output."""
        return self.channels * math.prod(self.window.kernel)

    @property
    def blocks(self) -> int:
        """Into how many blocks of channels a group is cut, to bound the size of a covariance."""
        least = math.ceil(self.size / _MOST_INPUTS)
        return next(n for n in range(least, self.channels + 1) if self.channels % n == 0)

    @property
    def num_blocks(self) -> int:
        """B, of all groups."""
        return self.window.groups * self.blocks

    def cut(self, matrix: Tensor) -> Tensor:
        """Return a weight (groups, O of a group, inputs of an output) in blocks, (B, O, d)."""
        groups, outputs = matrix.shape[:2]
        parts = matrix.reshape(groups, outputs, self.blocks, -1).transpose(1, 2)
        return parts.reshape(self.num_blocks, outputs, -1)

    def joined(self, blocks: Tensor) -> Tensor:
        """Return blocks of a weight as one: the inverse of `cut`."""
        groups, outputs = self.window.groups, blocks.shape[1]
        parts = blocks.reshape(groups, self.blocks, outputs, -1).transpose(1, 2)
        return parts.reshape(groups, outputs, -1)

    def repeated(self, by_group: Tensor) -> Tensor:
        """Return what is known of each group (groups, ...) for each of its blocks, (B, ...)."""
        return by_group.repeat_interleave(self.blocks, 0)

    @property
    def num_rows(self) -> int:
        """Rows from which a covariance is computed."""
        return max(_LEAST_ROWS, _ROWS_PER_INPUT * (self.size // self.blocks))

    @property
    def num_bytes(self) -> int:
        """Size of the moments."""
        width = self.size // self.blocks
        return self.num_blocks * width * (8 * width + 4 * _JUDGING_ROWS + 4 * ROWS_AT_ONCE)


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """What is known of inputs, on the CPU; B = groups * blocks, d = inputs / blocks."""

    covariance: Tensor  # about the mean, or about 0, (B, d, d), float64
    judges: Tensor  # rows of the held-out images, less the mean or 0, (rows, B, d), float32


def collect_moments(
    graph: TorchGraph,
    dataset: Dataset,
    inputs: Collection[Inputs],
    *,
    seed: int,
    memory: int,
    kept: Kept | None = None,
) -> dict[Inputs, Moments]:
    """Return the moments of inputs, from rows at random positions of all images.

    Args:
        graph: a float graph.
        dataset: calibration images; those that judge (`parts`) are held out.
        inputs: of layers.
        seed: draws the positions.
        memory: bytes for moments; if more are needed, the images are run several times.
        kept: values of the graph on all images, those that judge behind the others; where it has
            all inputs, the images are not run.
    """
    learned_from, judges = parts(dataset)
    others = math.ceil(learned_from.length / COMPUTE_BATCH)
    if kept is None or not kept.holds({key.tensor for key in inputs}):
        kept = None
    observe_others = _Observer(graph, learned_from, seed, kept, slice(others))
    observe_judges = _Observer(graph, judges, seed, kept, slice(others, None))
    found = {}
    for some in _within_memory(inputs, memory):
        sums = {key: Sums(key.window, key.num_blocks) for key in some}
        observe_others({k: (k.num_rows, s.add) for k, s in sums.items()})
        rows = {key: _Rows(key.window, []) for key in some}
        observe_judges({k: (_JUDGING_ROWS, r.add) for k, r in rows.items()})
        for key, total in sums.items():
            mean, covariance = total.moments(centred=key.centred)
            judging = torch.cat(rows[key].taken).reshape(-1, *mean.shape)
            found[key] = Moments(covariance.cpu(), (judging - mean.float()).cpu())
    return found


_Take = Callable[[Tensor, int, np.random.Generator], None]  # images, rows wanted of them, positions


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Takes rows and keeps them."""

    window: Window
    taken: list[Tensor]

    def add(self, images: Tensor, wanted: int, rng: np.random.Generator) -> None:
        self.taken.append(self.window.rows(images, wanted, rng))


@dataclass(frozen=True, slots=True, eq=False)
class _Observer:
    """Shows some of the images, or what is known of them, to those who take rows of inputs."""

    graph: TorchGraph
    dataset: Dataset
    seed: int
    kept: Kept | None  # has all inputs
    batches: slice  # where these images lie in it

    def __call__(self, takers: Mapping[Inputs, tuple[int, _Take]]) -> None:
        """Show the images to takers of about as many rows as they want of all of them."""
        records: dict[str, list[Record]] = {}
        for i, (key, (wanted, take)) in enumerate(takers.items()):
            record = functools.partial(
                _show,
                wanted / self.dataset.length,
                np.random.default_rng((self.seed, i)),
                take,
            )
            records.setdefault(key.tensor, []).append(record)
        if self.kept is None:
            watch(self.graph, self.dataset, records, "covariances")
            return
        for name, of_tensor in track(records.items(), len(records), "covariances"):
            for count, value in self.kept.batches(name, self.batches):
                for show in of_tensor:
                    show(name, count, value)


def _show(
    per_image: float, rng: np.random.Generator, take: _Take, _: str, count: int, value: Tensor
) -> None:
    take(value[: rows_that_count(count, value)], math.ceil(per_image * count), rng)


def _within_memory(inputs: Collection[Inputs], memory: int) -> Iterator[list[Inputs]]:
    """Yield the inputs in parts whose moments fit; an input that is too large comes alone."""
    some: list[Inputs] = []
    for key in inputs:
        if some and sum(other.num_bytes for other in (*some, key)) > memory:
            yield some
            some = []
        some.append(key)
    if some:
        yield some
