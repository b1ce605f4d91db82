"""A torch module in memory as a source: a copy that can be exported, and what identifies it."""

import copy
import hashlib

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from reptrt.core.errors import ConfigError

_WRAPPERS = ("module", "_orig_mod")  # of DataParallel and DistributedDataParallel; of torch.compile


def deployable_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module in eval mode, on the CPU and in float32; the module stays as it is.

    Raises:
        ConfigError: it cannot be copied, has no weights yet, or works only in training.
    """
    module = _unwrapped(module)
    kind = type(module).__name__
    _refuse_unusable(kind, module)
    try:
        copied = copy.deepcopy(module)
    except (RuntimeError, TypeError) as err:  # tensors with a graph; locks and open files
        raise ConfigError(
            f"{kind}: cannot be copied ({' '.join(str(err).split())}); give a factory that makes "
            "it, FILE.py:FACTORY"
        ) from err
    for parameter in copied.parameters():
        parameter.grad = None
    return copied.eval().requires_grad_(False).cpu().float()


def state_sha256(module: nn.Module) -> str:
    """Return the sha256 of all parameters and buffers, names, types and shapes included, in hex."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        if isinstance(value, torch.Tensor):
            array = value.detach().cpu().contiguous()
            digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
            digest.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _unwrapped(module: nn.Module) -> nn.Module:
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(module, parallel) or type(module).__name__ == "OptimizedModule":
        module = next(getattr(module, name) for name in _WRAPPERS if hasattr(module, name))
    return module


def _refuse_unusable(kind: str, module: nn.Module) -> None:
    if any(is_lazy(value) for value in (*module.parameters(), *module.buffers())):
        raise ConfigError(
            f"{kind}: lazy layers have no weights yet; run one batch through it first"
        )
    if any(value.is_meta for value in (*module.parameters(), *module.buffers())):
        raise ConfigError(f"{kind}: is on the meta device, without weights; load them first")
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is None:
            raise ConfigError(
                f"{kind}: {name or type(layer).__name__} normalizes by the statistics of each "
                "batch, in eval mode too (track_running_stats=False); train it with running "
                "statistics"
            )
