"""Find the values of one unit that are best on held-out images.

Up to three are compared: the values it starts from, those that are corrected for the errors of the
units before (`correct`), and what is learned from the better of the two. The first that no other
one beats is kept.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reptrt.core.errors import CalibrationError, option
from reptrt.quantize.calib.collect import COMPUTE_BATCH
from reptrt.quantize.reconstruct.cache import Activations
from reptrt.quantize.reconstruct.correct import Layer, Seen, correct
from reptrt.quantize.reconstruct.learn import Task, held_out_error, learn
from reptrt.quantize.reconstruct.options import Kept, LearnOptions, UnitReport
from reptrt.quantize.reconstruct.state import State
from reptrt.quantize.reconstruct.units import Unit

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """Both nets' activations before a unit, and which images do what."""

    activations: Activations
    train: Tensor  # indices of the images that are learned from, (n,)
    held_out: Tensor  # of those that judge, (m,)

    def both(self, tensor: str, images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a tensor in the float and in the quantized net, batch by batch."""
        exact, given = self.activations.float[tensor], self.activations.quantized[tensor]
        for some in torch.split(images, COMPUTE_BATCH):
            yield exact.read(some), given.read(some)


@dataclass(frozen=True, slots=True, eq=False)
class Attempt:
    """One unit, and all that is needed to find its values."""

    index: int  # of the unit
    unit: Unit
    task: Task
    state: State  # of the net so far: the unit starts from it
    values: Values
    options: LearnOptions

    def best(self, correctable: Mapping[str, Layer]) -> tuple[State, UnitReport]:
        """Return the best values, an empty state if those of the start are, and the report.

        Args:
            correctable: node -> layer, of the net.

        Raises:
            CalibrationError: the loss is not finite, or a step does not fit the device.
        """
        started = time.perf_counter()
        kept: Kept = "start"
        task, best = self.task, State()
        start = least = self._error(task, best)
        if (corrected := self._corrected(correctable)) is not None:
            error = self._error(*corrected)
            if error < least:
                kept, least, (task, best) = "corrected", error, corrected
        learned = best.updated(self._learned(task, self.state.updated(best)))
        error = self._error(task, learned)
        if error < least:
            kept, best = "learned", learned
        changed = sum(
            int((codes != self.state.codes[node]).sum()) for node, codes in best.codes.items()
        )
        return best, UnitReport(
            unit=task.name,
            layers=self.unit.layers,
            start=start,
            learned=least if kept == "corrected" else error,
            kept=kept,
            changed_codes=changed,
            seconds=time.perf_counter() - started,
        )

    def _error(self, task: Task, changed: State) -> float:
        """Return the error on held-out images with some values changed."""
        state = self.state.updated(changed)
        return held_out_error(task, state, self.values.held_out)

    def _corrected(self, correctable: Mapping[str, Layer]) -> tuple[Task, State] | None:
        """Return corrected values of the layers that read inputs of the unit; None if none does.

        The task has their weights as those that learning rounds.
        """
        values, sites, found = self.values, dict(self.task.sites.weights), State()
        for node in self.unit.layers:
            layer = correctable.get(node)
            if layer is None or layer.inputs.tensor not in self.unit.inputs:
                continue
            rows = layer.inputs.num_rows / len(values.train)
            seen, judges = (
                Seen(values.both(layer.inputs.tensor, images), rows)
                for images in (values.train, values.held_out)
            )
            sites[node], state = correct(layer, seen, judges, self.state, self.task.sites.grid)
            found = found.updated(state)
        if not found.codes:
            return None
        return replace(self.task, sites=replace(self.task.sites, weights=sites)), found

    def _learned(self, task: Task, start: State) -> State:
        state = self._try(task, start)
        if state is None:  # outside `_try`, where nothing refers to the tensors of the failed try
            _LOG.warning(
                "the device is out of memory: activations between units move to CPU memory"
            )
            self.values.activations.to_host()
            torch.cuda.empty_cache()
            state = self._try(task, start)
        if state is None:
            raise CalibrationError(
                f"unit {task.name}: a learning step does not fit the memory of the device; use a "
                f"smaller batch or {option('device', 'cpu')}"
            )
        return state

    def _try(self, task: Task, start: State) -> State | None:
        """Return what was learned; None if the device ran out of memory."""
        generator = generator_of(self.options.seed, self.index)
        try:
            return learn(task, start, self.values.train, self.options, generator)
        except torch.cuda.OutOfMemoryError:
            return None


def generator_of(seed: int, index: int) -> torch.Generator:
    """Return the generator of one unit; it does not depend on what other units draw."""
    return torch.Generator().manual_seed(1_000_003 * seed + index + 1)
