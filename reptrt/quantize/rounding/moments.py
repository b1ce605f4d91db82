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
from reptrt.quantize.rounding.windows import Window

_MOST_INPUTS = 2304  # of one covariance: 256 channels of 3 x 3 taps
_ROWS_PER_INPUT = 2
_LEAST_ROWS = 2048
_ROWS_AT_ONCE = 2048  # that are multiplied with each other
_COLUMNS = 256  # whose products are computed at once: those above the diagonal are left out
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

    @property
    def num_rows(self) -> int:
        """Rows from which a covariance is computed."""
        return max(_LEAST_ROWS, _ROWS_PER_INPUT * (self.size // self.blocks))

    @property
    def num_bytes(self) -> int:
        """Size of the moments."""
        width = self.size // self.blocks
        return self.num_blocks * width * (8 * width + 4 * _JUDGING_ROWS + 4 * _ROWS_AT_ONCE)


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
        sums = {key: _Sums(key.num_blocks) for key in some}
        observe_others({k: (k.num_rows, s.add) for k, s in sums.items()})
        taken: dict[Inputs, list[Tensor]] = {key: [] for key in some}
        observe_judges({k: (_JUDGING_ROWS, rows.append) for k, rows in taken.items()})
        for key, total in sums.items():
            mean, covariance = total.moments(centred=key.centred)
            rows = torch.cat(taken[key]).reshape(-1, *mean.shape)
            found[key] = Moments(covariance.cpu(), (rows - mean.float()).cpu())
    return found


class _Sums:
    """Sums of rows and of their products, in float64.

    Rows count from the mean of the first ones: a mean that is large against the variance would
    take its digits away.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks, self._count = num_blocks, 0
        self._waiting: list[Tensor] = []
        self._origin: Tensor | None = None  # (B, 1, d)
        self._first = self._second = torch.zeros((), dtype=torch.float64)  # (B, d), (B, d, d)

    def add(self, rows: Tensor) -> None:
        """Add rows (rows, groups, inputs)."""
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= _ROWS_AT_ONCE:
            self._multiply()

    def _multiply(self) -> None:
        """Add the waiting rows and their products; of the latter those up to the diagonal."""
        rows = torch.cat(self._waiting)
        self._waiting.clear()
        blocks = rows.reshape(len(rows), self._num_blocks, -1).transpose(0, 1)
        if self._origin is None:
            self._origin = blocks.mean(1, keepdim=True)
            size = blocks.shape[2]
            self._first = self._first.new_zeros(self._num_blocks, size).to(rows.device)
            self._second = self._first.new_zeros(self._num_blocks, size, size)
        blocks = blocks - self._origin
        self._first += blocks.sum(1, dtype=torch.float64)
        for start in range(0, blocks.shape[2], _COLUMNS):
            some, before = slice(start, start + _COLUMNS), slice(start + _COLUMNS)
            self._second[:, some, before] += blocks[:, :, some].mT @ blocks[:, :, before]
        self._count += len(rows)

    def moments(self, *, centred: bool) -> tuple[Tensor, Tensor]:
        """Return the mean row or 0, (B, d), and the mean product of rows less it, (B, d, d)."""
        if self._waiting:
            self._multiply()
        assert self._origin is not None
        off = self._first / self._count
        second = self._second.tril() + self._second.tril(-1).mT
        covariance = second / self._count - off[:, :, None] * off[:, None, :]
        mean = self._origin[:, 0].double() + off
        if centred:
            return mean, covariance
        return torch.zeros_like(mean), covariance + mean[:, :, None] * mean[:, None, :]


@dataclass(frozen=True, slots=True, eq=False)
class _Observer:
    """Shows some of the images, or what is known of them, to those who take rows of inputs."""

    graph: TorchGraph
    dataset: Dataset
    seed: int
    kept: Kept | None  # has all inputs
    batches: slice  # where these images lie in it

    def __call__(self, takers: Mapping[Inputs, tuple[int, Callable[[Tensor], object]]]) -> None:
        """Pass about as many rows of each input as its taker wants to it."""
        records: dict[str, list[Record]] = {}
        for i, (key, (wanted, take)) in enumerate(takers.items()):
            record = functools.partial(
                _take_rows,
                key.window,
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


def _take_rows(
    window: Window,
    per_image: float,
    rng: np.random.Generator,
    take: Callable[[Tensor], object],
    _: str,
    count: int,
    value: Tensor,
) -> None:
    images = value[: rows_that_count(count, value)]
    take(window.rows(images, math.ceil(per_image * count), rng))


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
