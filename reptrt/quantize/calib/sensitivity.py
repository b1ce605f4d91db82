"""What each layer costs alone: the error of the outputs if only this layer is INT8.

The layer's weight and the activation that it reads are quantized as in the INT8 net, everything
else is float. The cost is the squared error of the outputs over their power (`calib.measure`), so
the costs of all layers together are about the error of the whole INT8 net as long as it is small:
errors of different layers are nearly independent.

A layer changes nothing before it. So the float net is run once, from layer to layer, and at each
layer only what lies behind it is run again, from the tensors that are alive there: on average half
a forward pass for each layer.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from reptrt.core.progress import track
from reptrt.data.dataset import Dataset
from reptrt.execute.torchgraph import Override, TorchGraph
from reptrt.graph.probes import Probe
from reptrt.quantize.calib.measure import Measure, Sums, added, relative

_LOG = logging.getLogger(__name__)

IMAGES = 16  # on which costs are measured, unless told otherwise
_BATCH = 8
_WORTH_SAYING = 1.0  # seconds
_NO_OVERRIDES: Mapping[str, Override] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class NetPair:
    """A float net and its INT8 form, with the same names of tensors."""

    exact: TorchGraph
    quantized: TorchGraph  # with Q/DQ pairs, not yet recentred


class _Cut(NamedTuple):
    """The tensors from which everything behind a layer can be computed, and its input's origin."""

    probe: Probe
    alive: tuple[str, ...]


class Alone(NamedTuple):
    """The outputs for one batch of images if only one layer is INT8."""

    layer: str
    images: Tensor
    exact: dict[str, Tensor]  # of the float net
    outputs: dict[str, Tensor]
    is_last: bool  # the last layer of this batch


def errors_alone(
    pair: NetPair,
    probes: Sequence[Probe],
    dataset: Dataset,
    overrides: Mapping[str, Override] = _NO_OVERRIDES,
) -> dict[str, float]:
    """Return layer -> error of the outputs over their power, mean over outputs.

    Args:
        pair: the net.
        probes: the layers, in any order.
        dataset: a few images.
        overrides: tensor name -> function of the tensor, applied in the quantized layer.
    """
    measure = Measure(pair.exact)
    errors: dict[str, Sums] = {probe.layer: {} for probe in probes}
    for alone in outputs_alone(pair, probes, dataset, measure.names, overrides):
        sums = measure.sums(alone.exact, alone.outputs)
        errors[alone.layer] = added(errors[alone.layer], sums)
    return {layer: _mean_error(sums) for layer, sums in errors.items()}


def outputs_alone(
    pair: NetPair,
    probes: Sequence[Probe],
    dataset: Dataset,
    names: Sequence[str],
    overrides: Mapping[str, Override] = _NO_OVERRIDES,
) -> Iterator[Alone]:
    """Yield the outputs with one layer in INT8: of each batch, for each layer in execution order.

    Args:
        pair: the net.
        probes: the layers, in any order.
        dataset: images.
        names: of the outputs, or of any other tensors.
        overrides: tensor name -> function of the tensor, applied in the quantized layer.
    """
    cuts, num_batches = _cuts(pair.exact, probes, names), math.ceil(dataset.length / _BATCH)

    def steps() -> Iterator[Alone]:
        for index, batch in enumerate(dataset.batches(_BATCH)):
            started = time.perf_counter()
            with torch.inference_mode():
                images = torch.from_numpy(batch)
                values = {pair.exact.input_names[0]: images}
                exact = pair.exact.run(values, names)
            if index == 0:
                _announce(len(cuts), dataset.length, num_batches, time.perf_counter() - started)
            for cut in cuts:
                with torch.inference_mode():
                    values = pair.exact.run(values, cut.alive)
                    inputs = {cut.probe.origin: values[cut.probe.origin]}
                    changed = pair.quantized.run(inputs, [cut.probe.output], overrides=overrides)
                    outputs = pair.exact.run({**values, **changed}, names)
                yield Alone(cut.probe.layer, images, exact, outputs, cut is cuts[-1])

    yield from track(steps(), len(cuts) * num_batches, "layers alone")


def _announce(layers: int, images: int, batches: int, seconds: float) -> None:
    """Log the cost before it is paid; ``seconds`` is the time of a forward pass of one batch."""
    seconds *= batches * layers / 2
    _LOG.log(
        logging.INFO if seconds >= _WORTH_SAYING else logging.DEBUG,
        "what %d layers cost alone, on %d images: about %.0f s, the time of %.0f forward passes",
        *(layers, images, seconds, layers * images / 2),
    )


def _cuts(graph: TorchGraph, probes: Sequence[Probe], names: Sequence[str]) -> list[_Cut]:
    """Return a cut behind every probe, in execution order, from which ``names`` can be computed."""
    made = {name: -1 for name in graph.input_names}
    last_read = dict.fromkeys(names, math.inf)
    for place, step in enumerate(graph.steps):
        made |= dict.fromkeys(step.outputs, place)
        for name in step.inputs:
            last_read[name] = max(last_read.get(name, -1), place)
    ordered = sorted(probes, key=lambda probe: made[probe.output])
    for probe in ordered:
        place = made[probe.output]
        last_read[probe.origin] = max(last_read.get(probe.origin, -1), place)
    return [_Cut(probe, _alive(probe, made, last_read)) for probe in ordered]


def _alive(
    probe: Probe, made: Mapping[str, int], last_read: Mapping[str, float]
) -> tuple[str, ...]:
    place = made[probe.output]
    behind = (n for n, at in made.items() if at <= place < last_read.get(n, -1))
    return tuple(dict.fromkeys((*behind, probe.origin, probe.output)))


def _mean_error(sums: Sums) -> float:
    """Return the mean over groups of their relative errors."""
    ratios = [float(relative(*pair)) for pair in sums.values()]
    return sum(ratios) / max(len(ratios), 1)
