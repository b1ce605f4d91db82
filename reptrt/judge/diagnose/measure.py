"""Measure the noise of quantized weights alone and of quantized activations alone.

Both are measured in graphs that `reptrt.graph.qdq` writes, so placement and arithmetic are those of
the deployed file. Only sums of squares are kept, so the memory is one batch of activations.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from reptrt.core.arrays import Float32Array, Float64Array
from reptrt.core.grid import Grid
from reptrt.core.metrics import agreement, class_scores, db_from_powers, db_of_outputs
from reptrt.core.progress import track
from reptrt.data.dataset import Dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import Net
from reptrt.graph.placement import Placement
from reptrt.graph.plan import plan_from_placement
from reptrt.graph.probes import Probe
from reptrt.graph.qdq import insert_qdq, quantize_weights
from reptrt.judge.conditioning import Conditioning
from reptrt.judge.outputs import Outputs
from reptrt.quantize.calib.collect import COMPUTE_BATCH
from reptrt.quantize.calib.measure import Measure, Sums, added, relative


@dataclass(frozen=True, slots=True)
class Halves:
    """A float net, and the same net with only one side of it quantized."""

    exact: TorchGraph
    weights: TorchGraph  # weights quantized to nearest, activations float
    activations: TorchGraph  # activations quantized, weights float


@dataclass(frozen=True, slots=True, eq=False)
class Powers:
    """Sums of squares over images and positions at one layer's output, per channel (O,)."""

    signal: Float64Array
    weights: Float64Array  # of the noise from quantized weights, float input
    activations: Float64Array  # of the noise from a quantized input, float weights

    def in_units_of(self, signal: Float64Array) -> "Powers":
        """Return the powers scaled so that each channel has the given signal power.

        Equalization multiplies an output channel by r, and the layers that read it divide by r.
        Dividing the noise by r^2 makes the two nets comparable.
        """
        factors = np.divide(signal, self.signal, out=np.ones_like(signal), where=self.signal > 0)
        return Powers(self.signal * factors, self.weights * factors, self.activations * factors)

    def plus(self, other: "Powers") -> "Powers":
        """Return the powers over the images of both."""
        return Powers(
            self.signal + other.signal,
            self.weights + other.weights,
            self.activations + other.activations,
        )

    @property
    def sqnr_db(self) -> tuple[float, float]:
        """SQNR with quantized weights and with a quantized input, in dB."""
        signal = float(self.signal.sum())
        noises = (float(self.weights.sum()), float(self.activations.sum()))
        return db_from_powers(signal, noises[0]), db_from_powers(signal, noises[1])


@dataclass(slots=True)
class Closeness:
    """How close a net's outputs, or raw heads, are to the float net's, batch by batch."""

    measure: Measure
    images: int = 0
    sums: Sums = field(default_factory=dict)
    same_class: float | None = 0.0  # images; None: the output is not one row of scores an image

    def add(self, references: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Add a batch of outputs (N, ...) by name; the first one decides about classes."""
        exact, other = (
            {name: values[name].double() for name in references} for values in (references, outputs)
        )
        self.sums = added(self.sums, self.measure.sums(exact, other))
        first = next((name for name, value in references.items() if value.dim()), None)
        if first is None:  # numbers of the whole batch
            self.same_class = None
            return
        reference, output = references[first], outputs[first]
        self.images += len(reference)
        if self.measure.is_detector:
            self.same_class = None
            return
        expected, rows = (class_scores(tensor.cpu().numpy()) for tensor in (reference, output))
        if expected is None or rows is None:
            self.same_class = None
        elif self.same_class is not None:
            self.same_class += agreement(expected, rows) * len(reference)

    @property
    def sqnr_db(self) -> float:
        """SQNR over all images, each output in its own unit; see `db_of_outputs`."""
        powers = []
        for signal, error in self.sums.values():
            if signal.dim() > 0:  # the scores of several classes
                signal, error = torch.ones(()), relative(signal, error)
            powers.append((float(signal), float(error)))
        return db_of_outputs(powers)

    @property
    def agreement(self) -> float | None:
        """Fraction of images with the same arg max as in the float net."""
        return None if self.same_class is None else self.same_class / self.images


def halves_of(
    net: Net,
    placement: Placement,
    scales: Mapping[str, float],
    grids: tuple[Grid, Grid],
    device: torch.device,
    codes: Mapping[str, Grid] = MappingProxyType({}),
) -> Halves:
    """Return a float net with only its weights and with only its activations quantized.

    Args:
        net: the float net; it is not changed.
        placement: where Q/DQ pairs are inserted.
        scales: tensor name -> scale, for every activation of the placement.
        grids: the codes of activations and of weights.
        device: where to compute.
        codes: tensor -> codes, of activations that have others than those of ``grids``.
    """
    weights, activations = net.copy(), net.copy()
    rounded = quantize_weights(net, placement, grids[1])
    plan = plan_from_placement(placement, scales, rounded, grids[0], grids=codes)
    insert_qdq(weights, replace(plan, activations={}))
    insert_qdq(activations, replace(plan, weights={}))
    return Halves(*(TorchGraph(graph, device) for graph in (net, weights, activations)))


def layer_powers(
    halves: Halves, probes: Sequence[Probe], dataset: Dataset, label: str
) -> dict[str, Powers]:
    """Return signal and noise powers at the output of each probed layer."""
    sums: dict[str, Powers] = {}
    noisy = (halves.weights, halves.activations)

    def record(probes: Sequence[Probe], value: Tensor) -> None:
        for probe in probes:
            inputs, output = {probe.origin: value}, probe.output
            exact = halves.exact.run(inputs, [output])[output]
            noises = (_power(graph.run(inputs, [output])[output].sub_(exact)) for graph in noisy)
            powers = Powers(_power(exact), *noises)
            earlier = sums.get(probe.layer)
            sums[probe.layer] = powers if earlier is None else earlier.plus(powers)

    observers = {
        origin: functools.partial(record, [probe for probe in probes if probe.origin == origin])
        for origin in {probe.origin: None for probe in probes}
    }
    for batch in _batches(dataset, label):
        halves.exact.run({halves.exact.input_names[0]: batch}, [], observe=observers)
    return sums


def closeness(
    exact: TorchGraph, others: Sequence[TorchGraph], dataset: Dataset
) -> tuple[Closeness, ...]:
    """Compare the outputs of several graphs with the float one's over all images."""
    measure = Measure(exact)
    results, names = tuple(Closeness(measure) for _ in others), measure.names
    for batch in _batches(dataset, "corners"):
        reference = exact.run({exact.input_names[0]: batch}, names)
        for graph, close in zip(others, results, strict=True):
            close.add(reference, graph.run({graph.input_names[0]: batch}, names))
    return results


def noise_db(exact: TorchGraph, dataset: Dataset) -> float | None:
    """Return the SQNR of a float net under the noise of rounding; see `Conditioning`."""

    def run(images: Float32Array) -> Outputs:
        inputs = {exact.input_names[0]: torch.from_numpy(images)}
        values = exact.run(inputs, exact.comparable_names)
        return {name: value.float().cpu().numpy() for name, value in values.items()}

    conditioning = Conditioning(dataset.preprocess)
    images = next(dataset.batches(COMPUTE_BATCH))
    conditioning.add(images, run(images), run)
    return conditioning.sqnr_db


def _power(values: Tensor) -> Float64Array:
    """Return the sum of squares per index of axis 1, the channels of every equalized tensor."""
    norms = torch.linalg.vector_norm(values.reshape(*values.shape[:2], -1), dim=2)
    return np.asarray(norms.double().square().sum(0).cpu().numpy())


def _batches(dataset: Dataset, label: str) -> "map[Tensor]":
    num_batches = math.ceil(dataset.length / COMPUTE_BATCH)
    return map(torch.from_numpy, track(dataset.batches(COMPUTE_BATCH), num_batches, label))
