"""Quantize and learn unit after unit.

An eighth of the calibration images is held out: nothing is learned from these images, and every
unit is judged on them. No labels are used.
"""

import functools
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from reptrt.core.errors import CalibrationError, DataError, option
from reptrt.core.grid import Grid
from reptrt.core.progress import track
from reptrt.data.dataset import Dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import Net
from reptrt.graph.plan import QuantPlan
from reptrt.graph.splits import read_splits
from reptrt.quantize.calib.measure import Measure
from reptrt.quantize.reconstruct.attempt import Attempt, Values, generator_of
from reptrt.quantize.reconstruct.cache import (
    Activations,
    Hooks,
    choose_storage,
    peak_bytes,
    read,
    working_bytes,
)
from reptrt.quantize.reconstruct.correct import find_layers
from reptrt.quantize.reconstruct.cost import passes_of, seconds_of_a_pass
from reptrt.quantize.reconstruct.learn import Task
from reptrt.quantize.reconstruct.loss import Loss, roots_of
from reptrt.quantize.reconstruct.options import (
    LearnOptions,
    ReconstructReport,
    UnitReport,
    progress_of,
)
from reptrt.quantize.reconstruct.resume import Finished
from reptrt.quantize.reconstruct.state import (
    dequantized_weights,
    find_sites,
    simulation,
    write,
)
from reptrt.quantize.reconstruct.units import find_units, stage_end
from reptrt.quantize.rounding.curvature import collect_curvature, layer_outputs

_LOG = logging.getLogger(__name__)

_HELD_OUT = 8  # one image in eight is held out
_FEWEST = 16  # images
_CURVED = 384  # images whose gradients say how errors count


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """A quantized net, with the float net and the plan that it was made from."""

    net: Net  # the Q/DQ graph, with affines if they are to be learned
    reference: Net  # the float graph it was made from
    plan: QuantPlan  # its codes and scales
    grid: Grid  # codes of weights


def reconstruct(
    quantized: Quantized,
    dataset: Dataset,
    options: LearnOptions,
    *,
    device: torch.device,
    finished: Finished,
) -> tuple[ReconstructReport, QuantPlan]:
    """Learn the constants of a Q/DQ graph and write them into it.

    Args:
        quantized: the graph; changed in place.
        dataset: calibration images; labels are not used.
        options: what is learned, and for how long.
        device: where to compute.
        finished: units that an earlier run finished; those of this run are added.

    Returns:
        The report of all units, and the plan with the learned codes and scales.

    Raises:
        DataError: there are too few images to hold some out.
        CalibrationError: the loss is not finite, or the device is out of memory.
    """
    if dataset.length < _FEWEST:
        raise DataError(
            f"{dataset.name}: {dataset.length} images, learned calibration needs {_FEWEST} (an "
            f"eighth is held out to judge it); give more images, or use {option('recipe', 'fast')}"
        )
    try:
        run = _Run(quantized, dataset, options, device, finished)
        report = run.learn_all()
    except torch.cuda.OutOfMemoryError as err:
        raise CalibrationError(
            "activations between units do not fit the memory of the device; lower "
            f"{option('memory_budget')}, or use {option('device', 'cpu')}"
        ) from err
    return report, write(quantized.net, quantized.plan, run.sites, run.state)


class _Run:
    """One reconstruction: both graphs, the activations at the current boundary, the state so far.

    Attributes:
        sites: what can be learned in the Q/DQ graph.
        state: its values, learned for the units that are done.
    """

    def __init__(
        self,
        quantized: Quantized,
        dataset: Dataset,
        options: LearnOptions,
        device: torch.device,
        finished: Finished,
    ) -> None:
        net, reference = quantized.net, quantized.reference
        self._options, self._finished, self._device = options, finished, device
        self._graph, self._float_graph = TorchGraph(net, device), TorchGraph(reference, device)
        self.sites, self.state = find_sites(net, reference, quantized.plan, quantized.grid, device)
        self._dataset, self._image = dataset, self._float_graph.input_names[0]
        self._measure = Measure(self._float_graph)
        sides = {split.side for split in read_splits(reference)}
        self._layout = find_units(
            self._float_graph,
            torch.from_numpy(next(iter(dataset.batches(2)))),
            self.sites.weights.keys() - sides,
            self.sites.pairs.keys(),
            self._measure.names,
        )
        between = {name for unit in self._layout.units for name in unit.outputs}
        curvature = self._curvature(reference, between) if options.weighted else {}
        roots = roots_of({name: curvature[name] for name in between & curvature.keys()}, device)
        self._loss = Loss(self._measure, options.loss, roots)
        self._correctable = find_layers(reference, self.sites, curvature) if options.correct else {}
        order = torch.randperm(dataset.length, generator=generator_of(options.seed, -1))
        num_held_out = dataset.length // _HELD_OUT
        self._held_out = order[:num_held_out].sort().values
        self._train = order[num_held_out:].sort().values
        peak = peak_bytes(self._layout, (self._image,), dataset.length)
        budget = options.memory_budget - working_bytes(self._layout, self._options.batch)
        self._storage = choose_storage(peak, budget)
        folder = finished.spill
        self._activations = Activations(dataset, self._layout, self._storage, device, folder)

    def _curvature(self, reference: Net, between: Collection[str]) -> dict[str, Tensor]:
        """Return how much errors of the tensors between units, and of layers, count."""
        layers = [node for node in reference.graph.nodes if node.name in self.sites.weights]
        axes = dict.fromkeys(between, 1) | layer_outputs(layers)
        return collect_curvature(
            reference,
            self._dataset,
            axes,
            images=_CURVED,
            seed=self._options.seed,
            device=self._device,
        )

    def learn_all(self) -> ReconstructReport:
        """Learn all units in order."""
        units = self._layout.units
        self._log_cost()
        self._activations.load_images(self._image)
        reports: list[UnitReport] = []
        frozen: frozenset[int] = frozenset()  # groups whose steps are learned
        for index in track(range(len(units)), len(units), lambda: progress_of(reports)):
            reports.append(self._unit(index, frozen))
            pairs = self.sites.pairs.values()
            frozen |= {pair.group for pair in pairs if pair.readers & units[index].nodes}
        return ReconstructReport(tuple(reports), self._storage, len(self._held_out))

    def _log_cost(self) -> None:
        """Log what is learned, and an estimate of the time."""
        options = self._options
        sample = torch.from_numpy(next(iter(self._dataset.batches(options.batch))))
        constants, hooks = self._simulation(self.sites.weights)
        inputs = {**constants, self._image: sample.to(self._device)}
        seconds = seconds_of_a_pass(
            lambda: self._graph.run(inputs, self._measure.names, replace=hooks), self._device
        )
        passes = passes_of(options, self._dataset.length)
        _LOG.info(
            "learning %d units, %d iterations of %d images each, on %d images (%d held out): about "
            "%.0f s; activations in %s",
            len(self._layout.units),
            options.iterations,
            options.batch,
            len(self._train),
            len(self._held_out),
            seconds * passes,
            self._storage,
        )

    def _unit(self, index: int, frozen: frozenset[int]) -> UnitReport:
        """Learn one unit, and move both nets' activations past it."""
        unit, activations = self._layout.units[index], self._activations
        activations.float |= activations.propagate(
            self._float_graph, unit.inputs, unit.outputs, activations.float, {}, {}
        )
        task = Task(
            name=unit.name,
            graph=self._graph,
            sites=self.sites,
            nodes=unit.nodes,
            frozen=frozen,
            outputs=unit.outputs,
            inputs=functools.partial(read, activations.quantized, unit.inputs),
            targets=functools.partial(read, activations.float, unit.outputs),
            loss=self._loss,
            stage=self._stage_term(index),
        )
        report = self._learned_or_loaded(index, task)
        constants, hooks = self._simulation(unit.nodes)
        activations.quantized |= activations.propagate(
            self._graph, unit.inputs, unit.outputs, activations.quantized, constants, hooks
        )
        activations.keep_only(self._layout.alive[index])
        return report

    def _learned_or_loaded(self, index: int, task: Task) -> UnitReport:
        """Learn a unit, or load what an earlier run learned; update the state."""
        unit = self._layout.units[index]
        result = self._finished.load(index, self._device)
        if result is None:
            values = Values(self._activations, self._train, self._held_out)
            attempt = Attempt(index, unit, task, self.state, values, self._options)
            result = attempt.best(self._correctable)
            self._finished.save(index, *result)
        state, report = result
        self.state = self.state.updated(state)
        _LOG.debug(
            "%d of %d  %s  error %.3f %% -> %.3f %%  %s  %.1f s",
            index + 1,
            len(self._layout.units),
            report.unit,
            100 * report.start,
            100 * report.learned,
            report.kept,
            report.seconds,
        )
        return report

    def _stage_term(self, index: int) -> Callable[[Mapping[str, Tensor], Tensor], Tensor] | None:
        """Return the error of the stage's output as a function of the unit's output, or None."""
        end = stage_end(self._layout.units, index)
        if not self._options.stage_weight or end == index:
            return None
        ends, boundary = self._layout.units[end].outputs, self._layout.alive[index]
        activations, float_graph, loss = self._activations, self._float_graph, self._loss
        targets = activations.propagate(float_graph, boundary, ends, activations.float, {}, {})

        def term(outputs: Mapping[str, Tensor], picked: Tensor) -> Tensor:
            others = [name for name in boundary if name not in outputs]
            inputs = {**read(activations.quantized, others, picked), **outputs}
            values = float_graph.run(inputs, ends)
            exact = {name: targets[name].read(picked) for name in ends}
            return torch.stack(loss.errors(values, exact)).mean()

        return term

    def _simulation(self, nodes: Collection[str]) -> tuple[dict[str, Tensor], Hooks]:
        """Return the constants and hooks with which torch runs nodes in the state so far."""
        weights = dequantized_weights(self.sites, self.state, nodes)
        return simulation(self.sites, weights, self.state)
