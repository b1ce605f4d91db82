"""Unit after unit: make its targets, learn it, keep the better of learned and nearest.

Held-out calibration images, an eighth of all, judge every unit: they are never learned from. After
the units the gains, shifts and steps of the whole net are polished together on its outputs, and
kept if the held-out images agree. No labels are used.
"""

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reptrt.core.errors import CalibrationError, DataError
from reptrt.core.grid import Grid
from reptrt.core.progress import track
from reptrt.data.dataset import Dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import Net
from reptrt.graph.placement import Placement
from reptrt.graph.splits import read_splits
from reptrt.quantize.calib.collect import COMPUTE_BATCH
from reptrt.quantize.reconstruct.cache import (
    Storage,
    Store,
    batches,
    choose_storage,
    peak_bytes,
    working_bytes,
)
from reptrt.quantize.reconstruct.learn import Task, learn, relative_error
from reptrt.quantize.reconstruct.options import LearnOptions, ReconstructReport, UnitReport
from reptrt.quantize.reconstruct.resume import Finished
from reptrt.quantize.reconstruct.state import (
    State,
    deployed_weights,
    find_sites,
    simulation,
    write,
)
from reptrt.quantize.reconstruct.units import find_units, stage_end

_LOG = logging.getLogger(__name__)

_HELD_OUT = 8  # one image in so many
_FEWEST = 16  # images
_POLISH_RATE = 0.1  # of the units' rates: the outputs of few images are soon learned by heart
_STEP_COST = 4.0  # of a learning step, in forward passes of the quantized unit


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """A net quantized to nearest, and what it was made from."""

    net: Net  # the Q/DQ graph, with affines where they are to be learned
    reference: Net  # the float graph it was made from
    placement: Placement  # the plan it was made by
    grid: Grid  # codes of weights


def reconstruct(
    quantized: Quantized,
    dataset: Dataset,
    options: LearnOptions,
    *,
    device: torch.device,
    finished: Finished,
) -> ReconstructReport:
    """Learn what a Q/DQ graph computes with; change its constants in place.

    Args:
        quantized: the graph.
        dataset: calibration images; labels are not used.
        options: what is learned, and for how long.
        device: where to compute.
        finished: units that an earlier run finished, and where to put those of this one.

    Raises:
        DataError: too few images to hold some out.
        CalibrationError: the loss is not finite, or the device's memory is used up.
    """
    if dataset.length < _FEWEST:
        raise DataError(
            f"{dataset.name}: {dataset.length} images, learned calibration needs {_FEWEST} (an "
            "eighth is held out to judge it); give more images, or use --recipe fast"
        )
    try:
        work = _Work(quantized, dataset, options, device, finished)
        report = work.run()
    except torch.cuda.OutOfMemoryError as err:
        raise CalibrationError(
            "the memory of the device is used up by activations between units; lower "
            "--memory-budget, or use --device cpu"
        ) from err
    write(quantized.net, work.sites, work.state)
    return report


class _Work:
    """One reconstruction: two graphs, the activations at the current boundary, the state so far."""

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
        self._graph, self._float = TorchGraph(net, device), TorchGraph(reference, device)
        self.sites, self.state = find_sites(
            net, reference, quantized.placement, quantized.grid, device
        )
        self._dataset, self._count = dataset, dataset.length
        sides = {split.side for split in read_splits(reference)}
        sample = torch.from_numpy(next(iter(dataset.batches(2))))
        self._layout = find_units(
            self._float,
            sample,
            self.sites.weights.keys() - sides,
            self.sites.pairs.keys(),
            layers_per_unit=options.layers_per_unit,
        )
        order = torch.randperm(self._count, generator=_generator(options.seed, -1))
        held = self._count // _HELD_OUT
        self._held, self._train = order[:held].sort().values, order[held:].sort().values
        peak = peak_bytes(self._layout, self._float.input_names, self._count)
        left = options.memory_budget - working_bytes(self._layout, options.batch)
        self._storage: Storage = choose_storage(peak, left)
        self._ours: dict[str, Store] = {}  # activations of the quantized net
        self._theirs: dict[str, Store] = {}  # of the float net

    def run(self) -> ReconstructReport:
        """Learn all units and polish."""
        units = self._layout.units
        self._announce()
        image = self._float.input_names[0]
        self._theirs[image] = self._images = self._load_images(image)
        self._ours[image] = self._images
        done: list[UnitReport] = []
        frozen: frozenset[int] = frozenset()
        for index in track(range(len(units)), len(units), lambda: _progress(done)):
            done.append(self._unit(index, frozen))
            frozen |= {p.group for p in self.sites.pairs.values() if p.readers & units[index].nodes}
        if self._options.polish and len(units) > 1:
            done.append(self._polish(len(units)))
        return ReconstructReport(tuple(done), self._storage, len(self._held))

    def _announce(self) -> None:
        """Say what it will cost: a learning step is taken to be four forward passes."""
        options, units = self._options, self._layout.units
        sample = torch.from_numpy(next(iter(self._dataset.batches(options.batch))))
        inputs, hooks = self._hooks(self.sites.weights)
        inputs[self._float.input_names[0]] = sample.to(self._device)
        seconds = []
        with torch.no_grad():
            for _ in range(2):  # the first one is slower
                started = time.perf_counter()
                self._graph.run(inputs, self._graph.output_names, replace=hooks)
                if self._device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
        steps = _STEP_COST * (options.iterations + options.polish)
        passes = 3 * self._count / len(sample)
        _LOG.info(
            "learning %d units, %d steps each, from %d images (%d held out): about %.0f s; "
            "activations in %s",
            len(units),
            options.iterations,
            len(self._train),
            len(self._held),
            min(seconds) * (steps + passes),
            self._storage,
        )

    def _unit(self, index: int, frozen: frozenset[int]) -> UnitReport:
        started = time.perf_counter()
        unit, after = self._layout.units[index], self._layout.alive[index]
        before = dict(self._theirs)
        for name in unit.outputs:
            self._theirs[name] = self._store(name)
        self._forward(self._float, unit.inputs, unit.outputs, before, self._theirs, {}, {})
        task = Task(
            unit.name,
            self._graph,
            self.sites,
            unit.nodes,
            frozen,
            unit.outputs,
            functools.partial(_read, self._ours, unit.inputs),
            functools.partial(_read, self._theirs, unit.outputs),
            self._stage_term(index),
        )
        report = self._learn(index, task, self._options, started)
        inputs, hooks = self._hooks(unit.nodes)
        for name in unit.outputs:
            self._ours[name] = self._store(name)
        self._forward(self._graph, unit.inputs, unit.outputs, self._ours, self._ours, inputs, hooks)
        for stores in (self._ours, self._theirs):
            for name in stores.keys() - set(after):
                del stores[name]
        return report

    def _polish(self, index: int) -> UnitReport:
        """Learn gains, shifts and steps of the whole net on its outputs."""
        started = time.perf_counter()
        outputs, image = self._float.output_names, self._float.input_names
        nodes = frozenset(name for unit in self._layout.units for name in unit.nodes)
        task = Task(
            "whole net",
            self._graph,
            self.sites,
            nodes,
            frozenset(),
            outputs,
            functools.partial(_read, {image[0]: self._images}, image),
            functools.partial(_read, self._theirs, outputs),
        )
        options = replace(
            self._options,
            iterations=self._options.polish,
            rounding=False,
            affine_rate=_POLISH_RATE * self._options.affine_rate,
            step_rate=_POLISH_RATE * self._options.step_rate,
        )
        return self._learn(index, task, options, started)

    def _learn(self, index: int, task: Task, options: LearnOptions, started: float) -> UnitReport:
        """Learn a task, or take up what an earlier run learned; keep it if it is better."""
        known = self._finished.load(index, self._device)
        if known is not None:
            found, report = known
        else:
            found, report = self._better(index, task, options, started)
            self._finished.save(index, found, report)
        self.state = self.state.updated(found)
        _LOG.debug(
            "%d of %d  %s  error %.3f %% -> %.3f %%  %s  %.1f s",
            index + 1,
            len(self._layout.units) + bool(self._options.polish),
            report.unit,
            100 * report.nearest,
            100 * report.learned,
            report.kept,
            report.seconds,
        )
        return report

    def _better(
        self, index: int, task: Task, options: LearnOptions, started: float
    ) -> tuple[State, UnitReport]:
        nearest = self._error(task, self.state)
        found = self._tried(index, task, options)
        if found is None:  # beyond the try: there, what it held of the device would still be held
            self._make_room()
            found = self._tried(index, task, options)
        if found is None:
            raise CalibrationError(
                f"unit {task.name}: a step does not fit the memory of the device; use a smaller "
                "batch or --device cpu"
            )
        learned = self._error(task, self.state.updated(found))
        better = learned < nearest
        changed = sum(
            int((codes != self.state.codes[node]).sum()) for node, codes in found.codes.items()
        )
        return (
            found if better else State(),
            UnitReport(
                task.name,
                self._layout.units[index].layers if index < len(self._layout.units) else (),
                nearest,
                learned,
                "learned" if better else "nearest",
                changed if better else 0,
                time.perf_counter() - started,
            ),
        )

    def _tried(self, index: int, task: Task, options: LearnOptions) -> State | None:
        """Return what was learned; None if the memory of the device was used up."""
        generator = _generator(options.seed, index)
        try:
            return learn(task, self.state, self._train, options, generator)
        except torch.cuda.OutOfMemoryError:
            return None

    def _make_room(self) -> None:
        """Move all activations between units off the device."""
        _LOG.warning("the device's memory is used up: activations between units move to the CPU's")
        for store in (*self._ours.values(), *self._theirs.values(), self._images):
            store.to_host()
        torch.cuda.empty_cache()

    def _error(self, task: Task, state: State) -> float:
        """Return the relative error of a task's outputs on the held-out images."""
        weights = deployed_weights(self.sites, state, task.nodes & self.sites.weights.keys())
        constants, hooks = simulation(self.sites, weights, state)
        errors, total = 0.0, 0
        with torch.no_grad():
            for part in torch.split(self._held, COMPUTE_BATCH):
                got = task.graph.run(
                    {**task.inputs(part), **constants}, task.outputs, replace=hooks
                )
                wanted = task.targets(part)
                kind = self._options.loss
                found = [float(relative_error(got[n], wanted[n], kind)) for n in task.outputs]
                errors += sum(found) / len(found) * len(part)
                total += len(part)
        return errors / total

    def _stage_term(self, index: int) -> Callable[[Mapping[str, Tensor], Tensor], Tensor] | None:
        """Return the error of the stage's output as a function of the unit's, or None."""
        end = stage_end(self._layout.units, index)
        if not self._options.stage_weight or end == index:
            return None
        ends = self._layout.units[end].outputs
        given = self._layout.alive[index]
        wanted = {name: self._store(name) for name in ends}
        self._forward(self._float, given, ends, self._theirs, wanted, {}, {})

        def term(outputs: Mapping[str, Tensor], picked: Tensor) -> Tensor:
            others = [name for name in given if name not in outputs]
            inputs = {**_read(self._ours, others, picked), **outputs}
            got = self._float.run(inputs, ends)
            parts = [
                relative_error(got[name], wanted[name].read(picked), self._options.loss)
                for name in ends
            ]
            return torch.stack(parts).mean()

        return term

    def _hooks(
        self, nodes: Mapping[str, object] | frozenset[str]
    ) -> tuple[dict[str, Tensor], dict[str, Callable[..., Tensor]]]:
        weights = deployed_weights(self.sites, self.state, set(nodes) & self.sites.weights.keys())
        return simulation(self.sites, weights, self.state)

    def _forward(
        self,
        graph: TorchGraph,
        inputs: Sequence[str],
        outputs: Sequence[str],
        source: Mapping[str, Store],
        target: Mapping[str, Store],
        constants: Mapping[str, Tensor],
        hooks: Mapping[str, Callable[..., Tensor]],
    ) -> None:
        """Run all images from one boundary to the next."""
        with torch.no_grad():
            for part in batches(self._count, COMPUTE_BATCH):
                given = {name: source[name].read(part) for name in inputs}
                found = graph.run({**given, **constants}, outputs, replace=hooks)
                for name in outputs:
                    target[name].write(part.start, found[name])

    def _load_images(self, name: str) -> Store:
        store = self._store(name)
        start = 0
        for batch in self._dataset.batches(COMPUTE_BATCH):
            store.write(start, torch.from_numpy(batch))
            start += len(batch)
        return store

    def _store(self, name: str) -> Store:
        folder = self._finished.root.parent
        return Store(self._count, self._layout.shapes[name], self._storage, self._device, folder)


def _progress(done: Sequence[UnitReport]) -> str:
    """Return the label of the progress bar: the last unit, its error before and after."""
    if not done:
        return "learn"
    last = done[-1]
    return f"learn, {last.unit}: {last.nearest:.2%} -> {last.learned:.2%}, {last.kept} kept"


def _read(stores: Mapping[str, Store], names: Sequence[str], index: Tensor) -> dict[str, Tensor]:
    return {name: stores[name].read(index) for name in names}


def _generator(seed: int, index: int) -> torch.Generator:
    """Return the generator of one unit: what a unit draws does not depend on those before it."""
    return torch.Generator().manual_seed(1_000_003 * seed + index + 1)
