"""Adam (arXiv 1412.6980) for groups of tensors with rates of their own.

It calls the function behind `torch.optim.Adam`. The class itself imports torch's compiler when the
first one is made: 800 modules, 1.6 s of a processor, of which learning needs none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam

_BETAS = 0.9, 0.999
_EPSILON = 1e-8


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Tensors that are learned at one rate."""

    tensors: Sequence[Tensor]
    rate: float
    falls: bool  # whether the rate falls while learning goes on


class Adam:
    """The optimizer of groups of tensors.

    Args:
        groups: of tensors that require gradients.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups
        tensors = [tensor for group in groups for tensor in group.tensors]
        self._mean, self._square, self._count = (
            {id(tensor): torch.zeros_like(tensor) for tensor in tensors},
            {id(tensor): torch.zeros_like(tensor) for tensor in tensors},
            {id(tensor): torch.zeros((), device=tensor.device) for tensor in tensors},
        )

    @torch.no_grad()
    def step(self, share: float) -> None:
        """Move all tensors against their gradients, and forget these.

        Args:
            share: of the rate that is left, for groups whose rate falls.
        """
        for group in self._groups:
            moved = [tensor for tensor in group.tensors if tensor.grad is not None]
            keys = [id(tensor) for tensor in moved]
            adam(
                moved,
                [tensor.grad for tensor in moved if tensor.grad is not None],
                [self._mean[key] for key in keys],
                [self._square[key] for key in keys],
                [],
                [self._count[key] for key in keys],
                fused=True,
                amsgrad=False,
                beta1=_BETAS[0],
                beta2=_BETAS[1],
                lr=group.rate * (share if group.falls else 1.0),
                weight_decay=0.0,
                eps=_EPSILON,
                maximize=False,
            )
            for tensor in moved:
                tensor.grad = None
