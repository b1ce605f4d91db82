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

Babai, On Lovasz' lattice reduction and the nearest lattice point problem, 1986; GPTQ: arXiv
2210.17323 (the two are equal: arXiv 2507.18553); order and damping as in GPTQ.
"""

import numpy as np
import torch
from torch import Tensor

from reptrt.core.arrays import Float64Array
from reptrt.core.grid import Grid

_DAMPING = 0.01  # of the mean variance
_BLOCK = 64  # columns whose pull on the columns before them is summed at once


def nearest_plane(weight: Tensor, covariance: Tensor, grid: Grid) -> Tensor:
    """Return codes, (B, O, d).

    Args:
        weight: in steps, (B, O, d), of B problems that do not depend on each other.
        covariance: H of the inputs of each problem, (B, d, d).
        grid: of the codes.
    """
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    order = variance.argsort(dim=-1)  # the last is rounded first
    factor = _unit_factor(covariance, order)
    places = order[:, :, None].expand(-1, -1, weight.shape[1])
    exact = weight.mT.gather(1, places)  # (B, d, O): the outputs of an input lie side by side
    error = torch.zeros_like(exact)
    for last in range(exact.shape[1], 0, -_BLOCK):
        some = slice(max(0, last - _BLOCK), last)
        target = torch.baddbmm(exact[:, some], factor[:, some, last:], error[:, last:])
        _round_block(
            exact[:, some].numpy(),
            target.numpy(),
            factor[:, some, some].numpy(),
            error[:, some].numpy(),
            grid,
        )
    codes = (exact - error).round()
    return torch.empty_like(codes).scatter_(1, places, codes).mT


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


def damping_of(covariance: Tensor) -> Tensor:
    """Return what is added to the diagonal of each covariance (B, d, d), (B, 1)."""
    mean = covariance.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    return torch.where(mean > 0, _DAMPING * mean, torch.ones_like(mean))


def _unit_factor(covariance: Tensor, order: Tensor) -> Tensor:
    """Return R with each row divided by its diagonal element, for the inputs in an order.

    The damping bounds the condition, so float32 is enough, at less than half of the time; should it
    fail, float64 follows.
    """
    problem = torch.arange(len(order), device=order.device)[:, None, None]
    ordered = covariance[problem, order[:, :, None], order[:, None, :]]
    ordered.diagonal(dim1=-2, dim2=-1).add_(damping_of(ordered))
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(ordered.float(), upper=True)
    if bool(failed.any()):
        factor = torch.linalg.cholesky(ordered, upper=True)
    return factor.double() / factor.diagonal(dim1=-2, dim2=-1)[..., None]
