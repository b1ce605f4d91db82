"""Checkpoints: file -> state dicts -> the weights of a module. Nothing in a file is ever run.

Files are data: see `reptrt.sources.unpickle` for how a pickle is read without its code. A state
dict may lie inside other things that training scripts store, or inside a whole pickled model.
`load_weights` takes the one that fits the net and says so when it had a choice.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reptrt.core.errors import CheckpointError, option
from reptrt.sources.matching import (
    AmbiguousWeightsError,
    Candidate,
    averaged_part,
    fitting,
    is_averaged,
    nearest,
    rank,
    shape_of,
    without_counters,
)
from reptrt.sources.rebuild import StandIn, UnsafePickleError
from reptrt.sources.states import StateDict, entries_of, find_states, kind_of, tensor_of
from reptrt.sources.torch_file import UnsupportedFileError, read_content

logger = logging.getLogger(__name__)

_SAVE = "save the weights alone with torch.save(model.state_dict(), 'weights.pt')"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state dicts of a file, by location: the keys that lead there, joined by dots."""

    path: Path
    states: Mapping[str, StateDict]  # as stored, in any float type; not empty
    averaged: tuple[str, ...] = ()  # keys that name averaged weights, usable or not

    @property
    def preferred(self) -> StateDict:
        """The state dict that is taken if several fit."""
        return self.states[min(self.states, key=rank)]

    def without(self, parts: tuple[str, ...]) -> "Checkpoint":
        """Return the checkpoint without the tensors whose names hold one of ``parts``; warn."""
        names = {name for state in self.states.values() for name in state}
        left_out = [name for name in names if _has_part(name, parts)]
        if not left_out:
            return self
        found = [part for part in parts if any(_has_part(name, (part,)) for name in left_out)]
        logger.warning(
            "%s: %d tensors that only training uses are left out (%s)",
            *(self.path, len(left_out), ", ".join(f"{part}*" for part in found)),
        )
        states = {
            key: {name: value for name, value in state.items() if not _has_part(name, parts)}
            for key, state in self.states.items()
        }
        return replace(self, states={key: state for key, state in states.items() if state})


def _has_part(name: str, parts: tuple[str, ...]) -> bool:
    return any(f".{part}" in f".{name}" for part in parts)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the state dicts in a file written by torch.save or safetensors.

    Raises:
        CheckpointError: the file is missing or damaged, asks for a call that reaches the system,
            or holds no state dict.
    """
    content = _read(path)
    try:
        states = find_states(content)
    except Exception as err:  # damaged bytes can yield values of any kind
        raise CheckpointError(f"{path}: {_why_unreadable(err)}") from err
    if not states:
        raise CheckpointError(f"{path}: {_why_no_state(content)}; {_SAVE}")
    return Checkpoint(path, states, _averaged_keys(content))


def load_weights(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy the state dict of a checkpoint that fits a module into it, as float32.

    It fits if, without a prefix, it has every parameter and buffer of the module in its shape, and
    nothing else; BatchNorm's counters may be missing. The module is unchanged when this raises.

    Raises:
        CheckpointError: none fits or several do, or a weight is NaN or infinite.
    """
    path = checkpoint.path
    expected = without_counters(module.state_dict())
    try:
        candidates = fitting(expected, checkpoint.states)
    except AmbiguousWeightsError as err:
        raise CheckpointError(
            f"{path}: fits the net in more than one place ({err}); save the state dict that is "
            "meant alone"
        ) from err
    if not candidates:
        raise CheckpointError(_why_no_fit(checkpoint, expected))
    state = _averaged_over(checkpoint, candidates, expected)
    tensors = {
        name: value.detach().float() if value.is_floating_point() else value.detach()
        for name, value in state.items()
    }
    _refuse_not_finite(path, tensors)
    module.load_state_dict(tensors, strict=False)


def _averaged_over(
    checkpoint: Checkpoint, candidates: list[Candidate], expected: StateDict
) -> StateDict:
    """Return the best candidate's state dict, with averaged weights in it; log what was chosen."""
    path, best = checkpoint.path, candidates[0]
    outside = _beside(checkpoint, best)
    if outside:
        logger.warning(
            "%s: %d tensors outside %s are not in the net and are left out (%s)",
            *(path, len(outside), best.location, _first(outside)),
        )
    if is_averaged(best.location) or not checkpoint.averaged:
        if len(candidates) > 1:
            others = ", ".join(candidate.location for candidate in candidates[1:])
            logger.warning("%s: taking the weights in %s, not %s", path, best.location, others)
        return best.state
    part = averaged_part(expected, checkpoint.states)
    if part is None:
        logger.warning(
            "%s: the averaged weights in %s do not fit the net; taking the weights in %s",
            *(path, ", ".join(checkpoint.averaged), best.location or "the file itself"),
        )
        return best.state
    logger.warning(
        "%s: taking %d averaged tensors from %s, the other %d from %s",
        *(path, len(part.state), part.location),
        *(len(expected) - len(part.state), best.location or "the file itself"),
    )
    return {**best.state, **part.state}


def _beside(checkpoint: Checkpoint, candidate: Candidate) -> list[str]:
    """Return the names in a candidate's state dict that do not start with its prefix."""
    owner = _owner(checkpoint, candidate)
    if owner is None:
        return []
    prefix = candidate.prefix.removeprefix(f"{owner}." if owner else "")
    state = checkpoint.states[owner]
    return [name for name, value in state.items() if not name.startswith(prefix) and value.ndim]


def _owner(checkpoint: Checkpoint, candidate: Candidate) -> str | None:
    """Return the location of the state dict that a candidate is a part of."""
    owners = [key for key in checkpoint.states if not key or candidate.prefix.startswith(f"{key}.")]
    return max(owners, key=len, default=None)


def _why_no_fit(checkpoint: Checkpoint, expected: StateDict) -> str:
    """Say what is missing, left over, or of another shape in the part that is nearest to a fit."""
    candidate = nearest(expected, checkpoint.states)
    given, outside = candidate.state, _beside(checkpoint, candidate)
    wrong = [
        f"{name}: got {shape_of(given[name])}, expected {shape_of(expected[name])}"
        for name in expected
        if name in given and shape_of(given[name]) != shape_of(expected[name])
    ]
    kinds = (
        ("missing", [name for name in expected if name not in given]),
        ("unexpected", [name for name in given if name not in expected]),
        ("of another shape or kind", wrong),
        (f"outside {candidate.location}", outside),
    )
    problems = [f"{len(items)} {kind} ({_first(items)})" for kind, items in kinds if items]
    where = f"{candidate.location} in {checkpoint.path}"
    return (
        f"{where if candidate.location else checkpoint.path}: does not fit the architecture: "
        f"{', '.join(problems)}; {_hint(set(expected), set(given))}"
    )


def _hint(expected: set[str], given: set[str]) -> str:
    """Return the likely reason why names do not agree."""
    has_statistics, wants_statistics = (
        any(name.endswith("running_mean") for name in names) for names in (given, expected)
    )
    if wants_statistics and not has_statistics:
        return "it has no BatchNorm: it looks like a deploy-form (fused) checkpoint"
    if has_statistics and not wants_statistics:
        return "it has BatchNorm, the net has none: it looks like a train-form checkpoint"
    if not expected & given:
        return "no name agrees: another architecture, or another naming of its parameters"
    options = ", ".join(map(option, ("widths", "blocks", "branches", "num_classes")))
    return f"check the architecture and its options ({options})"


def _read(path: Path) -> Any:
    """Return what the file holds, without running anything in it."""
    try:
        return read_content(path)
    except FileNotFoundError as err:
        raise CheckpointError(f"{path}: does not exist; check the path") from err
    except UnsafePickleError as err:
        raise CheckpointError(
            f"{path}: asks for a call of {err}, which no checkpoint needs; it was not called; do "
            f"not trust this file, or {_SAVE}"
        ) from err
    except UnsupportedFileError as err:
        raise CheckpointError(f"{path}: {err}; {_SAVE}") from err
    except OSError as err:
        raise CheckpointError(f"{path}: cannot be read ({err.strerror or err})") from err
    except Exception as err:  # damaged bytes can make the readers raise anything
        raise CheckpointError(f"{path}: {_why_unreadable(err)}") from err


def _why_unreadable(err: Exception) -> str:
    line = next(iter(str(err).splitlines()), "no details")[:120]
    return (
        f"not a checkpoint, or a damaged one ({type(err).__name__}: {line}); copy it again, or "
        f"{_SAVE}"
    )


def _why_no_state(content: Any) -> str:
    """Say what the file holds where a state dict was expected."""
    entries = entries_of(content)
    if not isinstance(content, dict) and not entries:
        return f"holds a {kind_of(content)}, expected a state dict (name -> tensor)"
    if not entries:
        return "the state dict is empty, expected name -> tensor"
    others = [
        f"{name!r}: {kind_of(value)}"
        for name, value in entries.items()
        if not (isinstance(name, str) and tensor_of(value) is not None)
    ]
    counts = f"{len(others)} of {len(entries)} entries"
    return f"expected only tensors, but {counts} are something else ({_first(others)})"


def _averaged_keys(content: Any, depth: int = 2) -> tuple[str, ...]:
    """Return the keys of a checkpoint that name averaged weights and hold anything with entries."""
    keys: list[str] = []
    for key, value in entries_of(content).items() if depth else ():
        if not isinstance(key, str) or not isinstance(value, dict | list | StandIn):
            continue
        inner = _averaged_keys(value, depth - 1)
        keys += [key] if is_averaged(key) else [f"{key}.{name}" for name in inner]
    return tuple(keys)


def _refuse_not_finite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    bad = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if bad:
        raise CheckpointError(
            f"{path}: {len(bad)} of {len(tensors)} tensors hold NaN or Inf in float32 "
            f"({_first(bad)}); take a checkpoint from before training diverged"
        )


def _first(items: list[str]) -> str:
    """Return the first five items, and that there are more."""
    return ", ".join(items[:5]) + (", ..." if len(items) > 5 else "")
