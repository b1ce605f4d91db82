"""Torch modules as inference runs them: without wrappers, float32, on the CPU, in eval mode."""

import copy
import hashlib
import logging

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from reptrt.core.errors import ConfigError

logger = logging.getLogger(__name__)


def deployable(module: nn.Module, name: str) -> nn.Module:
    """Bring a module into the form that is exported; it may be changed.

    - ``DataParallel``, ``DistributedDataParallel``, ``AveragedModel`` and the result of
      ``torch.compile`` are replaced by the module inside, wherever they occur, and
      ``module.compile()`` is undone.
    - Weights of another float type become float32, and a warning says so.

    Args:
        module: the net.
        name: what messages call it.

    Raises:
        ConfigError: it has no weights yet, complex weights, or works only in training.
    """
    module = _unwrapped(module)
    _refuse_unusable(module, name)
    tensors = (*module.parameters(), *module.buffers())
    others = {tensor.dtype for tensor in tensors if tensor.is_floating_point()} - {torch.float32}
    if others:
        kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others))
        logger.warning("%s: weights of type %s are converted to float32", name, kinds)
    return module.cpu().float().eval()


def deployable_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module in the form that is exported; the module stays as it is.

    Raises:
        ConfigError: it cannot be copied; or as `deployable`.
    """
    module = _outermost(module)
    kind = type(module).__name__
    _refuse_unusable(module, kind)
    try:
        copied = copy.deepcopy(module)
    except (RuntimeError, TypeError) as err:  # tensors with a graph; locks and open files
        raise ConfigError(
            f"{kind}: cannot be copied ({' '.join(str(err).split())}); give a factory that makes "
            "it, FILE.py:FACTORY"
        ) from err
    for parameter in copied.parameters():
        parameter.grad = None
    return deployable(copied, kind).requires_grad_(False)


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
    """Return a module with every wrapper in it replaced by the module inside."""
    module = _outermost(module)
    if getattr(module, "_compiled_call_impl", None) is not None:
        module._compiled_call_impl = None  # what module.compile() sets
    for name, child in module.named_children():
        unwrapped = _unwrapped(child)
        if unwrapped is not child:
            setattr(module, name, unwrapped)
    return module


def _outermost(module: nn.Module) -> nn.Module:
    """Return the first module that is no wrapper, from the outside in."""
    while (inner := _inner(module)) is not None:
        module = inner
    return module


def _inner(module: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper; None if a module is no wrapper."""
    from torch.optim.swa_utils import AveragedModel

    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
        inner: nn.Module = module.module
        return inner
    # The class of compiled modules is told by its name: to import it takes seconds.
    compiled = type(module).__name__ == "OptimizedModule"
    return getattr(module, "_orig_mod", None) if compiled else None


def _refuse_unusable(module: nn.Module, name: str) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise ConfigError(
            f"{name}: is a TorchScript module; give the torch.nn.Module that it was made from"
        )
    if isinstance(module, nn.Sequential) and len(module) == 0:
        raise ConfigError(f"{name}: is empty, expected a network with layers")
    tensors = (*module.parameters(), *module.buffers())
    if any(is_lazy(value) for value in tensors):
        raise ConfigError(
            f"{name}: lazy layers have no weights yet; run one batch through it first"
        )
    if any(value.is_meta for value in tensors):
        raise ConfigError(f"{name}: is on the meta device, without weights; load them first")
    if any(value.is_complex() for value in module.parameters()):
        raise ConfigError(f"{name}: has complex weights, expected real numbers")
    for path, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is None:
            raise ConfigError(
                f"{name}: {path or type(layer).__name__} normalizes by the statistics of each "
                "batch, in eval mode too (track_running_stats=False); train it with running "
                "statistics"
            )
