"""Codes whose errors compensate each other: Babai's nearest plane algorithm, which is GPTQ.

Rounding row w (in steps) of a weight to codes q changes the output by (w - q) x. Its mean square
over the rows x of the input, with covariance H, is

    (w - q) H (w - q)^T = |R (w - q)|^2                   H = R^T R, R upper triangular

Rounding to nearest ignores that the inputs are correlated (neighbouring taps of one channel most of
all). The last code is rounded first; each further one is rounded after the errors made so far, as
far as its input can take them over, were added to its weight:

    q_j = round(w_j + sum over k > j of R_jk / R_jj (w_k - q_k))

Inputs of large variance are rounded first, since they leave most to the others. The mean square of
the error then is at most sum R_jj^2 / 4 (in steps), about a third of that on average, where
nearest rounding has sum H_jj. A hundredth of the mean variance is added to the diagonal, because
H comes from a few thousand rows.

Outputs are rounded together where it is known how their errors e count at the outputs of the net:
e^T G e (`curvature`), so all errors W - Q of a weight count

    trace (W - Q)^T G (W - Q) H = |S (W - Q) R^T|^2         G = S^T S, S upper triangular

This is the nearest plane of a larger lattice: what the outputs that were rounded before have lost
is added to the weight of the next one, as far as it can make up for it,

    w_o + sum over p > o of S_op / S_oo (w_p - q_p)

and the sum is rounded as above. Outputs of large G come first, an eighth b of all at once: what is
added to them is S_bb^-1 S_bp (w_p - q_p), and they do not see each other's errors.

Babai, On Lovasz' lattice reduction and the nearest lattice point problem, 1986; GPTQ: arXiv
2210.17323 (the two are equal: arXiv 2507.18553); order and damping as in GPTQ. G beside H: YAQA
(arXiv 2505.22988).
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from reptrt.core.arrays import Float64Array
from reptrt.core.grid import Grid

_DAMPING = 0.01  # of the mean variance
_BLOCK = 64  # inputs whose pull on the inputs before them is summed at once
_PARTS = 8  # into which the outputs are cut


def nearest_plane(
    weight: Tensor, covariance: Tensor, grid: Grid, curvature: Tensor | None = None
) -> Tensor:
    """Return codes, (B, O, d).

    Args:
        weight: in steps, (B, O, d), of B problems that do not depend on each other.
        covariance: H of the inputs of each problem, (B, d, d).
        grid: of the codes.
        curvature: G of the outputs of each problem, for errors in steps, (B, O, O); None: errors of
            different outputs have nothing to do with each other.
    """
    order, factor = _ordered(covariance)
    if curvature is None:
        by_input = _taken(weight.mT, order)  # the outputs of an input lie side by side
        return _put_back(by_input - _error(by_input, factor, grid), order).mT
    rows, row_factor = _ordered(curvature)
    exact = _taken(_taken(weight, rows).mT, order)  # (B, d, O)
    error = torch.zeros_like(exact)
    outputs = exact.shape[2]
    for some, behind in _from_the_last(outputs, math.ceil(outputs / _PARTS)):
        seen = torch.linalg.solve_triangular(
            row_factor[:, some, some], row_factor[:, some, behind], upper=True, unitriangular=True
        )
        pull = error[:, :, behind] @ seen.mT
        wanted = exact[:, :, some] + pull
        error[:, :, some] = _error(wanted, factor, grid) - pull
    return _put_back(_put_back(exact - error, order).mT, rows)


def _error(exact: Tensor, factor: Tensor, grid: Grid) -> Tensor:
    """Return what rounding changes, (B, d, O).

    Args:
        exact: weights in steps, (B, d, O); the last input is rounded first.
        factor: R with a diagonal of ones, (B, d, d).
        grid: of the codes.
    """
    exact, error = exact.contiguous(), torch.zeros_like(exact)
    for some, behind in _from_the_last(exact.shape[1], _BLOCK):
        target = torch.baddbmm(exact[:, some], factor[:, some, behind], error[:, behind])
        _round_block(
            exact[:, some].numpy(),
            target.numpy(),
            factor[:, some, some].numpy(),
            error[:, some].numpy(),
            grid,
        )
    return error


def _from_the_last(count: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Yield the indices in blocks, the last one first, each with all indices behind it."""
    for last in range(count, 0, -size):
        yield slice(max(0, last - size), last), slice(last, count)


def _taken(x: Tensor, order: Tensor) -> Tensor:
    """Return (B, n, m) with its second axis in an order, (B, n)."""
    return x.gather(1, order[:, :, None].expand(-1, -1, x.shape[2]))


def _put_back(codes: Tensor, order: Tensor) -> Tensor:
    """Return codes (B, n, m), whose second axis was put into an order, as they were."""
    places = order[:, :, None].expand(-1, -1, codes.shape[2])
    return torch.empty_like(codes).scatter_(1, places, codes.round())


def _round_block(
    exact: Float64Array, target: Float64Array, factor: Float64Array, error: Float64Array, grid: Grid
) -> None:
    """Round the inputs of one block, the last first, and write their errors.

    numpy, because the operations are tiny: its calls take a fifth of the time of torch's.

    Args:
        exact: weights in steps, (B, n, O).
        target: weights and the pull of all blocks behind this one, (B, n, O).
        factor: of the inputs of the block, (B, n, n).
        error: filled, (B, n, O).
        grid: of the codes.
    """
    for j in range(exact.shape[1] - 1, -1, -1):
        pulled = target[:, j] + np.matmul(factor[:, j, None, j + 1 :], error[:, j + 1 :])[:, 0]
        np.rint(pulled, out=pulled)
        np.clip(pulled, grid.qmin, grid.qmax, out=pulled)
        np.subtract(exact[:, j], pulled, out=error[:, j])


def damped(moments: Tensor, damping: float = _DAMPING) -> Tensor:
    """Return moments (..., d, d) with a part of their mean diagonal, or 1, on the diagonal."""
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1)
    added = torch.where(mean > 0, damping * mean, torch.ones_like(mean))
    return moments + added[..., None, None] * torch.eye(moments.shape[-1]).to(moments)


def _ordered(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order of the diagonal, (B, d), and R in that order with a diagonal of ones.

    Args:
        moments: R^T R, (B, d, d); damped before it is factored.
    """
    order = moments.diagonal(dim1=-2, dim2=-1).argsort(dim=-1)  # the last is rounded first
    problem = torch.arange(len(order), device=order.device)[:, None, None]
    ordered = damped(moments[problem, order[:, :, None], order[:, None, :]])
    # The damping bounds the condition, so float32 is enough, at less than half of the time.
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(ordered.float(), upper=True)
    if bool(failed.any()):
        factor = torch.linalg.cholesky(ordered, upper=True)
    return order, factor.double() / factor.diagonal(dim1=-2, dim2=-1)[..., None]
