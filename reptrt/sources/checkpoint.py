"""Checkpoints: file -> state dict of float32 tensors -> module. Nothing in a file is ever run.

Files written by ``torch.save`` are read with ``weights_only=True``, safetensors files by their own
reader. A file that needs more than tensors and plain containers (a whole pickled model, say) is
refused with the reason. Training scripts store the weights beside other things; the part that a
script would evaluate is taken, averaged weights (EMA) first.
"""

import logging
import mmap
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from reptrt.core.errors import CheckpointError

logger = logging.getLogger(__name__)

# Where training scripts keep the weights, the one to evaluate first.
_WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "params",
)
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel and averaged models, torch.compile
_NOT_WEIGHTS = ("n_averaged",)  # the step count of torch's AveragedModel
_COUNTER = "num_batches_tracked"  # BatchNorm's step count: without effect in eval mode
_SAVE = "save the weights alone with torch.save(model.state_dict(), 'weights.pt')"


def load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint; return parameter name -> tensor on the CPU, float32 where floating.

    Wrappers (``state_dict``, ``model``, ``ema``, ...) and ``module.`` prefixes are removed.

    Raises:
        CheckpointError: the file is missing, damaged, holds more than tensors, or a weight is NaN
            or infinite.
    """
    content = _read(path)
    found = _find_states(content)
    if not found:
        raise CheckpointError(f"{path}: {_why_no_state(content)}; {_SAVE}")
    if len(found) > 1:
        others = ", ".join(list(found)[1:])
        logger.warning("%s: taking the weights in %s, not %s", path, next(iter(found)), others)
    state = _strip(next(iter(found.values())))
    tensors = {name: _as_float32(path, name, value) for name, value in state.items()}
    _refuse_not_finite(path, tensors)
    return tensors


def load_weights(module: nn.Module, state: Mapping[str, torch.Tensor], where: str) -> None:
    """Copy a state dict into a module: every parameter, nothing else; BatchNorm counters may lack.

    The module is unchanged when this raises.

    Args:
        module: changed in place.
        state: what `load_state_dict` returns.
        where: the file's name, for messages.

    Raises:
        CheckpointError: names are missing or left over, or shapes differ.
    """
    expected = {
        name: value
        for name, value in module.state_dict().items()
        if isinstance(value, torch.Tensor) and not name.endswith(_COUNTER)
    }
    given = {name: value for name, value in state.items() if not name.endswith(_COUNTER)}
    problems = _problems(expected, given)
    if problems:
        raise CheckpointError(
            f"{where}: does not fit the architecture: {', '.join(problems)}; "
            + _hint(set(expected), set(given))
        )
    module.load_state_dict(given, strict=False)


def _problems(expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> list[str]:
    """Return what keeps ``given`` from being loaded, one phrase per kind of problem."""
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    wrong = [
        f"{name}: got {_describe(given[name])}, expected {_describe(expected[name])}"
        for name in expected
        if name in given and _describe(given[name]) != _describe(expected[name])
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape or kind", wrong))
    return [f"{len(items)} {kind} ({_first(items)})" for kind, items in kinds if items]


def _read(path: Path) -> Any:
    """Return what the file holds, without running anything in it."""
    try:
        with open(path, "rb") as stream:
            head, num_bytes = stream.read(9), path.stat().st_size
    except FileNotFoundError as err:
        raise CheckpointError(f"{path}: does not exist; check the path") from err
    except OSError as err:
        raise CheckpointError(f"{path}: cannot be read ({err.strerror or err})") from err
    if not num_bytes:
        raise CheckpointError(f"{path}: the file is empty; copy it again")
    try:
        if _is_safetensors(path, head, num_bytes):
            return load_file(path, device="cpu")
        return _torch_load(path)
    except pickle.UnpicklingError as err:
        raise CheckpointError(f"{path}: {_why_refused(path, str(err))}") from err
    except Exception as err:  # damaged bytes can make the readers raise anything
        raise CheckpointError(f"{path}: {_why_unreadable(err)}") from err


def _torch_load(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch itself does not look at the checksums
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} does not agree")
    # An open file, because given a path some versions of torch go by its suffix.
    with open(path, "rb") as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own internals and old formats
        return torch.load(stream, map_location="cpu", weights_only=True)


def _is_safetensors(path: Path, head: bytes, num_bytes: int) -> bool:
    """Return whether a file starts as safetensors do: the header's length in 8 bytes, then JSON."""
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= num_bytes - 8:
        return True
    return path.suffix == ".safetensors" and not head.startswith(b"PK")


def _why_refused(path: Path, message: str) -> str:
    """Say why the weights-only unpickler stopped."""
    found = re.search(r"(?:GLOBAL|[Cc]lass) ([\w.]+\w)", message)
    if found is None:
        return _why_unreadable(message.split("WeightsUnpickler error:")[-1])
    if _pickles_a_module(path):
        return f"holds a whole pickled model ({found[1]}), which only its code can load; {_SAVE}"
    return f"holds more than tensors: {found[1]}, not loaded because that would run code; {_SAVE}"


def _pickles_a_module(path: Path) -> bool:
    """Return whether a file names the attribute that every pickled nn.Module has."""
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return view.find(b"_non_persistent_buffers_set") >= 0


def _why_unreadable(reason: Exception | str) -> str:
    text = str(reason).strip()
    if "TorchScript" in text:
        return f"a TorchScript archive, not a state dict; open it with torch.jit.load and {_SAVE}"
    line = text.splitlines()[0].split(". ")[0][:120] if text else "no details"
    kind = "" if isinstance(reason, str) else f"{type(reason).__name__}: "
    return f"not a checkpoint, or a damaged one ({kind}{line}); copy it again, or {_SAVE}"


def _find_states(content: Any, depth: int = 3) -> dict[str, Mapping[str, torch.Tensor]]:
    """Return every state dict inside a checkpoint by its path of wrapper keys, the best first."""
    if not isinstance(content, Mapping) or not content or depth == 0:
        return {}
    if all(isinstance(name, str) and torch.is_tensor(value) for name, value in content.items()):
        return {"": content}
    return {
        f"{key}.{inner}".rstrip("."): state
        for key in _WRAPPERS
        for inner, state in _find_states(content.get(key), depth - 1).items()
    }


def _why_no_state(content: Any) -> str:
    """Say what is found where a state dict was expected."""
    if not isinstance(content, Mapping):
        return f"holds a {type(content).__name__}, expected a state dict (name -> tensor)"
    if not content:
        return "the state dict is empty, expected name -> tensor"
    others = [
        f"{name!r}: {type(value).__name__}"
        for name, value in content.items()
        if not (isinstance(name, str) and torch.is_tensor(value))
    ]
    counts = f"{len(others)} of {len(content)} entries"
    return f"expected only tensors, but {counts} are something else ({_first(others)})"


def _strip(state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Remove the prefixes that wrappers of a module put before every name."""
    state = {name: value for name, value in state.items() if name not in _NOT_WEIGHTS} or state
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            return _strip({name.removeprefix(prefix): value for name, value in state.items()})
    return state


def _as_float32(path: Path, name: str, value: torch.Tensor) -> torch.Tensor:
    value = value.detach()
    if value.layout != torch.strided or value.is_quantized or value.is_complex() or value.is_meta:
        raise CheckpointError(
            f"{path}: {name} is a tensor of kind {value.layout}, {value.dtype} on {value.device}, "
            "expected a dense float tensor with its values; export the float net instead"
        )
    return value.float() if value.is_floating_point() else value


def _refuse_not_finite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    bad = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if bad:
        raise CheckpointError(
            f"{path}: {len(bad)} of {len(tensors)} tensors hold NaN or Inf in float32 "
            f"({_first(bad)}); take a checkpoint from before training diverged"
        )


def _describe(value: torch.Tensor) -> str:
    """Return what has to agree between a stored and an expected tensor."""
    kind = "" if value.is_floating_point() else f" {value.dtype}"
    return f"{tuple(value.shape)}{kind}"


def _first(items: list[str]) -> str:
    """Return the first five items, and that there are more."""
    return ", ".join(items[:5]) + (", ..." if len(items) > 5 else "")


def _hint(expected: set[str], given: set[str]) -> str:
    """Return the likely reason why names do not agree."""
    has_statistics, wants_statistics = (
        any(name.endswith("running_mean") for name in names) for names in (given, expected)
    )
    prefixes = {name.split(".")[0] + "." for name in given}
    if wants_statistics and not has_statistics:
        return "it has no BatchNorm: it looks like a deploy-form (fused) checkpoint"
    if has_statistics and not wants_statistics:
        return "it has BatchNorm, the net has none: it looks like a train-form checkpoint"
    if len(prefixes) == 1 and {name.split(".", 1)[-1] for name in given} & expected:
        return f"every name starts with {prefixes.pop()!r}: save the state dict of that part alone"
    if not expected & given:
        return "no name agrees: another architecture, or another naming of its parameters"
    return "check the architecture and its options (--widths, --blocks, --branches, --num-classes)"
