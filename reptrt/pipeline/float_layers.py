"""`--float auto:N`: find the layers that cost most, and keep those in float where that pays.

The net is planned as without the option. Its plan shows what each layer costs alone, and what the
error of the whole net becomes with a layer in float (`quantize.choose.in_float`). The net is then
planned again as if the layers that pay had been given to ``--exclude`` by name, so the result is
that of a calibration with those names. If that net does not pay after all, none is kept.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from reptrt.core.clock import Clock
from reptrt.core.grid import Grid, scale_from_amax
from reptrt.data.dataset import Dataset
from reptrt.execute.torchgraph import Override, TorchGraph
from reptrt.graph.net import Net
from reptrt.graph.placement import exactly
from reptrt.graph.probes import Probe, probes_of
from reptrt.graph.qdq import inserted_pairs
from reptrt.pipeline.activation_scales import limits_of
from reptrt.pipeline.options import CalibrateOptions
from reptrt.pipeline.planning import Planned, plan_net
from reptrt.pipeline.preparing import torch_device
from reptrt.quantize.calib.outputs import Outputs, parts
from reptrt.quantize.calib.sensitivity import IMAGES, NetPair, errors_alone
from reptrt.quantize.choose.in_float import FloatChoice, keep_in_float, least_fall, prices_of
from reptrt.quantize.reconstruct.fake_quantize import fake_quantize


def plan_with_float_layers(
    net: Net, dataset: Dataset, options: CalibrateOptions, clock: Clock
) -> tuple[Planned, FloatChoice | None]:
    """Plan the INT8 form of a float net; keep layers in float if the options ask for it.

    Args:
        net: changed, or a copy of it is.
        dataset: calibration images.
        options: of calibration.
        clock: laps are added.

    Returns:
        The plan, and the choice if there was one to make.
    """
    most = options.most_float_layers
    if most is None:
        return plan_net(net, dataset, options, clock), None
    source = net.copy()
    planned = plan_net(net, dataset, options, clock)
    with torch.inference_mode():
        trial = _Trial(planned, dataset, options)
        choice, before = trial.choose(most, source), trial.errors(())
    clock.lap("float layers")
    if not choice.kept:
        return planned, choice
    again = plan_net(source, dataset, with_float_layers(options, choice.kept), clock)
    with torch.inference_mode():
        after = _Trial(again, dataset, options).errors(())
    clock.lap("judge float layers")
    choice = replace(choice, error_after=sum(after), gain=least_fall(before, after))
    return (again, choice) if choice.pays else (planned, choice.without_any())


def with_float_layers(options: CalibrateOptions, layers: Sequence[str]) -> CalibrateOptions:
    """Return options that name the layers which ``auto:N`` chose."""
    exclude = (*options.exclude, *exactly(layers))
    return replace(options, exclude=exclude, float_nodes=options.float_patterns)


class _Trial:
    """An INT8 net of which any layers can be run in float, judged on held-out images."""

    def __init__(self, planned: Planned, dataset: Dataset, options: CalibrateOptions) -> None:
        device, net = torch_device(options.device), planned.quantized()
        self._pair = NetPair(TorchGraph(planned.reference, device), TorchGraph(net, device))
        self._probes = {p.layer: p for p in probes_of(planned.reference, planned.layers)}
        _, self._judges = parts(dataset)
        halves = self._judges.parted(2) if self._judges.length > 1 else (self._judges,)
        self._outputs = [Outputs(self._pair.exact, half) for half in halves]
        self._overrides = limits_of(planned.prepared, planned.quantities.activations)
        self._halved = _half_ranges(planned, net, options.grids[0])

    def choose(self, most: int, source: Net) -> FloatChoice:
        """Return which layers pay in float.

        Args:
            most: how many may.
            source: the net before splits.
        """
        few = self._judges.spread(min(IMAGES, self._judges.length))
        alone = errors_alone(self._pair, list(self._probes.values()), few, self._overrides)
        return keep_in_float(alone, prices_of(source), most, self.errors, self._judges.length)

    def errors(self, layers: Sequence[str]) -> list[float]:
        """Return the error of the outputs with some layers in float, in each half of the images."""
        seen: dict[str, Tensor] = {}
        chains: dict[str, list[Override]] = {}

        def keep(name: str, value: Tensor) -> Tensor:
            seen[name] = value
            return value

        def exact(probe: Probe, _: Tensor) -> Tensor:
            inputs = {probe.origin: seen[probe.origin]}
            return self._pair.exact.run(inputs, [probe.output])[probe.output]

        def halved(origin: str, _: Tensor) -> Tensor:
            limits = [self._overrides[origin]] if origin in self._overrides else []
            return _in_turn([*limits, self._halved[origin][1]], seen[origin])

        probes = [self._probes[layer] for layer in layers]
        for probe in probes:
            chains.setdefault(probe.output, []).append(functools.partial(exact, probe))
        for origin in {probe.origin: None for probe in probes}:
            chains.setdefault(origin, []).append(functools.partial(keep, origin))
            if origin in self._halved:
                result = self._halved[origin][0]
                chains.setdefault(result, []).append(functools.partial(halved, origin))
        for name, limit in self._overrides.items():
            chains.setdefault(name, []).append(limit)
        overrides = {name: functools.partial(_in_turn, chain) for name, chain in chains.items()}
        return [of.error(self._pair.quantized, overrides=overrides) for of in self._outputs]


def _in_turn(functions: Sequence[Override], value: Tensor) -> Tensor:
    for function in functions:
        value = function(value)
    return value


def _half_ranges(planned: Planned, net: Net, grid: Grid) -> dict[str, tuple[str, Override]]:
    """Return what becomes of tensors with full range that are read in float too: half of it.

    Returns:
        Tensor -> the result of its pair in the Q/DQ net, and the rounding in place of the pair.
    """
    pairs = inserted_pairs(net, planned.plan)
    amax = {tensor.tensor: tensor.amax for tensor in planned.quantities.activations.tensors}
    halved: dict[str, tuple[str, Override]] = {}
    for name in planned.plan.full_range:
        scale = torch.tensor(float(scale_from_amax(amax[name], grid)))
        rounding = functools.partial(fake_quantize, step=scale, grid=grid)
        halved[name] = (pairs[name].dequantizes[0].outputs[0].name, rounding)
    return halved
