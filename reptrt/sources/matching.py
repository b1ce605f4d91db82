"""Which tensors of a checkpoint are a net's weights, decided by the net's own names and shapes.

Trainers and wrappers put prefixes before names (``module.``, ``model.``, ``backbone.net.``,
``_orig_mod.``), and files keep several state dicts. Here every tensor has one full name: the keys
that lead to its state dict and its name in it, joined by dots (``ema.shadow.module.conv.weight``).
A prefix of full names fits if, once it is removed, names and shapes are exactly those of the net.

Where several prefixes fit, averaged weights (EMA) come first, as tools evaluate them, then the keys
that training scripts use for the model. Prefixes that differ in neither are refused.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from reptrt.sources.states import StateDict

_COUNTER = "num_batches_tracked"  # BatchNorm's step count, which eval mode never reads
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|shadow|averaged)(?:[._]|$)", re.IGNORECASE)
_MODEL_KEYS = (  # under which training scripts store the model; the first is taken first
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


@dataclass(frozen=True, slots=True)
class Candidate:
    """The tensors of a checkpoint below one prefix, under the names that the net may have."""

    prefix: str  # of full names in the file: "" or keys, each with a dot behind it
    state: StateDict  # name without the prefix -> tensor; no BatchNorm counters
    added: str = ""  # a prefix that all names of the net have and those of the file lack

    @property
    def location(self) -> str:
        """The prefix without its last dot."""
        return self.prefix.rstrip(".")


class AmbiguousWeightsError(Exception):
    """Several parts of a checkpoint fit the net equally well; the message lists them."""


def without_counters(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a state dict, without BatchNorm's step counts."""
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and not name.endswith(_COUNTER)
    }


def shape_of(tensor: torch.Tensor) -> str:
    """Return what has to agree between a stored and an expected tensor."""
    kind = "" if tensor.is_floating_point() else f" {tensor.dtype}"
    return f"{tuple(tensor.shape)}{kind}"


def is_averaged(location: str) -> bool:
    """Return whether keys in a checkpoint name averaged weights.

    >>> [is_averaged(key) for key in ("ema.shadow", "model_ema", "schema", "model")]
    [True, True, False, False]
    """
    return _AVERAGED.search(location) is not None


def rank(location: str) -> tuple[bool, tuple[int, ...]]:
    """Return the sorting key of a location in a checkpoint; the smallest is taken."""
    order = {key: index for index, key in enumerate(_MODEL_KEYS)}
    keys = location.split(".") if location else []
    return not is_averaged(location), tuple(order.get(key, len(order)) for key in keys)


def fitting(expected: StateDict, states: Mapping[str, StateDict]) -> list[Candidate]:
    """Return the parts of a checkpoint that have exactly the net's tensors, the best first.

    Args:
        expected: the net's state dict without counters.
        states: the state dicts of the checkpoint, by location.

    Raises:
        AmbiguousWeightsError: the best two differ in nothing that says which is meant.
    """
    candidates = [
        candidate
        for candidate in _candidates(expected, states)
        if len(candidate.state) == len(expected) and _is_part(candidate, expected)
    ]
    candidates.sort(key=lambda candidate: rank(candidate.location))
    ranks = [rank(candidate.location) for candidate in candidates]
    num_best = ranks.count(ranks[0]) if ranks else 0
    if num_best > 1:
        raise AmbiguousWeightsError(", ".join(c.location for c in candidates[:num_best]))
    return candidates


def averaged_part(expected: StateDict, states: Mapping[str, StateDict]) -> Candidate | None:
    """Return averaged weights that lack some of the net's tensors, if there is just one such part.

    Many scripts average the parameters alone, so that BatchNorm's statistics are elsewhere.
    """
    parts = [
        candidate
        for candidate in _candidates(expected, states)
        if is_averaged(candidate.location) and _is_part(candidate, expected)
    ]
    return parts[0] if len(parts) == 1 else None


def nearest(expected: StateDict, states: Mapping[str, StateDict]) -> Candidate:
    """Return the part of a checkpoint that has most of the net's names, whatever the shapes."""
    candidates = _candidates(expected, states)
    if candidates:
        return max(candidates, key=lambda c: len(c.state.keys() & expected.keys()))
    location, state = min(states.items(), key=lambda item: rank(item[0]))
    return Candidate(f"{location}." if location else "", without_counters(state))


def _is_part(candidate: Candidate, expected: StateDict) -> bool:
    """Return whether every tensor of a candidate is one of the net, in its shape."""
    return all(
        name in expected and shape_of(value) == shape_of(expected[name])
        for name, value in candidate.state.items()
    )


def _candidates(expected: StateDict, states: Mapping[str, StateDict]) -> list[Candidate]:
    """Return a candidate for each prefix below which the file has a name of the net.

    If no name of the net is in the file, the prefix that all names of the net share is left out.
    """
    full = {
        f"{location}.{name}" if location else name: value
        for location, state in states.items()
        for name, value in without_counters(state).items()
    }
    for added in _common_prefixes(list(expected)):
        short = {name.removeprefix(added) for name in expected}
        prefixes = _prefixes(short, full)
        if max(prefixes.values(), default=0) == len(expected) or (prefixes and not added):
            return [_candidate(full, prefix, added) for prefix in sorted(prefixes, key=len)]
    return []


def _candidate(full: StateDict, prefix: str, added: str) -> Candidate:
    state = {
        f"{added}{name.removeprefix(prefix)}": value
        for name, value in full.items()
        if name.startswith(prefix)
    }
    return Candidate(prefix, state, added)


def _prefixes(names: set[str], full: StateDict) -> Counter[str]:
    """Return how many of the net's names the file has below each prefix.

    ``model.conv.weight`` counts for ``model.`` if the net has ``conv.weight``.
    """
    counts: Counter[str] = Counter()
    for name in full:
        start = 0
        while start >= 0:
            if name[start:] in names:
                counts[name[:start]] += 1
            start = name.find(".", start) + 1 or -1
    return counts


def _common_prefixes(names: Sequence[str]) -> list[str]:
    """Return the dotted prefixes that all names have, from "" to the longest.

    >>> _common_prefixes(["net.conv.weight", "net.fc.bias"])
    ['', 'net.']
    """
    common = [""]
    for keys in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(keys)) > 1:
            break
        common.append(f"{common[-1]}{keys[0]}.")
    return common
