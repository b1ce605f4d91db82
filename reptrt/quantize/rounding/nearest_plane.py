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

import torch
from torch import Tensor

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
    weight = weight.gather(-1, order[:, None].expand_as(weight))
    error = torch.zeros_like(weight)
    size = weight.shape[-1]
    for last in range(size, 0, -_BLOCK):
        first = max(0, last - _BLOCK)
        pull = error[..., last:] @ factor[:, first:last, last:].mT
        for j in range(last - 1, first - 1, -1):
            target = weight[..., j] + pull[..., j - first]
            error[..., j] = weight[..., j] - target.round().clamp(grid.qmin, grid.qmax)
            column = factor[:, None, first:j, j]
            pull[..., : j - first] += error[..., j, None] * column
    codes = (weight - error).round()
    return torch.empty_like(codes).scatter_(-1, order[:, None].expand_as(codes), codes)


def _unit_factor(covariance: Tensor, order: Tensor) -> Tensor:
    """Return R with each row divided by its diagonal element, for the inputs in an order."""
    size = covariance.shape[-1]
    ordered = covariance.gather(1, order[:, :, None].expand_as(covariance))
    ordered = ordered.gather(2, order[:, None, :].expand_as(covariance))
    mean = ordered.diagonal(dim1=-2, dim2=-1).mean(-1)
    damping = torch.where(mean > 0, _DAMPING * mean, torch.ones_like(mean))
    ordered = ordered + damping[:, None, None] * torch.eye(size, dtype=ordered.dtype)
    factor: Tensor = torch.linalg.cholesky(ordered, upper=True)
    return factor / factor.diagonal(dim1=-2, dim2=-1)[..., None]
