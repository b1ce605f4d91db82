"""Sums of the inputs of outputs (rows) and of their products, in float64.

`RowSums` takes rows. `MapSums` takes maps, where many of their outputs are wanted: channel c at tap
t and channel e at tap u of one output are values of the map that lie u - t apart, so

    sum over outputs of x[c, t] x[e, u] = sum over positions i of x_c(i) x_e(i + u - t)

where i goes over the places of tap t at which tap u lies inside the map too. Pairs of taps that lie
equally far apart share most of these positions. The positions are cut into pieces where one of the
pairs begins or ends, and each piece is multiplied once: 13 displacements in place of 45 pairs of a
3 x 3 kernel, and nothing for the padding. In a map of 4 x 4 that is a seventh of the work (ours).
"""

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from reptrt.quantize.rounding.windows import Window

ROWS_AT_ONCE = 2048  # that are multiplied with each other
_COLUMNS = 256  # whose products are computed at once: those above the diagonal are left out


class Sums:
    """Sums of the inputs of a layer's outputs, at random positions or at all, as costs less.

    Args:
        window: how the layer reads its input.
        num_blocks: B, into which the inputs of an output are cut.
    """

    def __init__(self, window: Window, num_blocks: int) -> None:
        self._window, self._num_blocks = window, num_blocks
        self._sums: RowSums | MapSums | None = None

    def add(self, images: Tensor, wanted: int, rng: np.random.Generator) -> None:
        """Add inputs of a layer.

        Args:
            images: (N, C, ...), or (..., C) of a matrix product.
            wanted: rows.
            rng: draws their positions.
        """
        window = self._window
        if self._sums is None:
            self._sums = (
                MapSums(window, self._num_blocks)
                if _whole_maps_cost_less(window, images, wanted)
                else RowSums(self._num_blocks)
            )
        if isinstance(self._sums, MapSums):
            self._sums.add(images)
        else:
            self._sums.add(window.rows(images, wanted, rng))

    def moments(self, *, centred: bool) -> tuple[Tensor, Tensor]:
        """Return the mean row or 0, (B, d), and the mean product of rows less it, (B, d, d)."""
        assert self._sums is not None
        mean, products = self._sums.means()
        if centred:
            return mean, products
        return torch.zeros_like(mean), products + mean[:, :, None] * mean[:, None, :]


class RowSums:
    """Sums of rows that are given.

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
        if sum(map(len, self._waiting)) >= ROWS_AT_ONCE:
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

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the mean row, (B, d), and the mean product of rows less it, (B, d, d)."""
        if self._waiting:
            self._multiply()
        assert self._origin is not None
        off = self._first / self._count
        second = self._second.tril() + self._second.tril(-1).mT
        covariance = second / self._count - off[:, :, None] * off[:, None, :]
        return self._origin[:, 0].double() + off, covariance


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Sums over positions at which one tap of each pair lies; the other one lies further on."""

    pairs: Sequence[tuple[int, int]]  # of taps, all equally far apart
    count: int  # positions
    here: Tensor  # sums of the values at the positions, (B, c), float64
    there: Tensor  # of those of the other tap
    products: Tensor  # of both, (B, c, c)

    def plus(self, other: "_Piece") -> "_Piece":
        """Return the sums over the positions of both, in the tensors of this one."""
        for mine, added in ((self.here, other.here), (self.there, other.there)):
            mine += added
        self.products.add_(other.products)
        return replace(self, count=self.count + other.count)


class MapSums:
    """Sums over all outputs of whole maps, of a layer with stride 1.

    Values count from the mean of their channel in the first images, for the same reason.
    """

    def __init__(self, window: Window, num_blocks: int) -> None:
        self._window, self._num_blocks, self._count = window, num_blocks, 0
        self._origin: Tensor | None = None  # (B, c)
        self._pieces: dict[Hashable, _Piece] = {}

    def add(self, images: Tensor) -> None:
        """Add the inputs of a layer, (N, C, ...)."""
        window, sizes = self._window, images.shape[2:]
        values = images.movedim(1, -1)
        if self._origin is None:
            self._origin = values.reshape(-1, self._num_blocks, self._width(values)).mean(0)
        values = (values - self._origin.flatten()).contiguous()
        for displacement in window.displacements:
            by_axis = [_cut(window.spans(sizes, axis, by)) for axis, by in enumerate(displacement)]
            for axes in itertools.product(*by_axis):
                spans, taps = zip(*axes, strict=True)
                key = (sizes, displacement, spans)
                piece = self._piece(values, displacement, spans, taps)
                known = self._pieces.get(key)
                self._pieces[key] = piece if known is None else known.plus(piece)
        self._count += len(images) * window.positions(sizes)

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the mean row, (B, d), and the mean product of rows less it, (B, d, d)."""
        assert self._origin is not None
        origin, taps = self._origin.double(), self._window.taps
        blocks, width = origin.shape
        first = origin.new_zeros(blocks, taps, width)
        second = origin.new_zeros(blocks, taps, taps, width, width)
        for piece in self._pieces.values():
            here = piece.here + piece.count * origin
            products = (
                piece.products
                + here[:, :, None] * origin[:, None]
                + origin[:, :, None] * piece.there[:, None]
            )
            for tap, other in piece.pairs:
                second[:, tap, other] += products
                if tap == other:
                    first[:, tap] += here
                else:
                    second[:, other, tap] += products.mT
        mean = first.mT.reshape(blocks, -1) / self._count
        covariance = second.permute(0, 3, 1, 4, 2).reshape(blocks, mean.shape[1], -1) / self._count
        return mean, covariance - mean[:, :, None] * mean[:, None, :]

    def _width(self, values: Tensor) -> int:
        return values.shape[-1] // self._num_blocks

    def _piece(
        self,
        values: Tensor,
        displacement: Sequence[int],
        spans: Sequence[range],
        taps: Sequence[Sequence[int]],
    ) -> _Piece:
        """Return the sums over positions (along each axis) at which taps (of each axis) lie."""
        moves = [by * step for by, step in zip(displacement, self._window.dilations, strict=True)]
        here = self._at(values, spans, [0] * len(spans))
        there = self._at(values, spans, moves)
        pairs = [self._window.pair(tap, displacement) for tap in itertools.product(*taps)]
        sums = here.sum(1).double(), there.sum(1).double()
        return _Piece(pairs, here.shape[1], *sums, (here.mT @ there).double())

    def _at(self, maps: Tensor, spans: Sequence[range], moves: Sequence[int]) -> Tensor:
        """Return the values at positions that are moved, (B, images and positions, c)."""
        moved = (slice(s.start + by, s.stop + by) for s, by in zip(spans, moves, strict=True))
        where = (slice(None), *moved)
        values = maps[where]
        return values.reshape(-1, self._num_blocks, self._width(maps)).transpose(0, 1)


def _whole_maps_cost_less(window: Window, images: Tensor, wanted: int) -> bool:
    """Return whether all outputs cost fewer products by displacement than some by pairs of taps."""
    if not window.overlaps:
        return False
    outputs = len(images) * window.positions(images.shape[2:])
    pairs = window.taps * (window.taps + 1) // 2
    return outputs * len(window.displacements) <= min(wanted, outputs) * pairs


def _cut(spans: Sequence[range | None]) -> list[tuple[range, list[int]]]:
    """Cut spans where one of them begins or ends; return each piece and the indices that have it.

    Args:
        spans: of indices 0, 1, ...; None: of no interest.
    """
    ends = sorted({end for span in spans if span for end in (span.start, span.stop)})
    found = []
    for start, stop in itertools.pairwise(ends):
        inside = [i for i, span in enumerate(spans) if span and start in span and stop - 1 in span]
        if inside:
            found.append((range(start, stop), inside))
    return found
