"""Learn one unit (rounding, gains and shifts, steps) by gradient descent on its output error.

    loss = |B(x^) - Y| / |Y|  +  stage_weight |R(B(x^)) - Y_S| / |Y_S|  +  regularizer

B is the quantized unit, x^ its input, computed by the quantized units before it, and Y the unit's
output in the float net. R is the float rest of the stage and Y_S the stage's output in the float
net. |.| is the mean absolute value (MAE, after RepAPQ arXiv 2402.16121: outliers dominate MSE) or
the mean square, averaged over the unit's outputs, each in the unit that `loss` says.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reptrt.core.errors import CalibrationError, option
from reptrt.execute.torchgraph import TorchGraph, exact_math
from reptrt.quantize.calib.collect import COMPUTE_BATCH
from reptrt.quantize.reconstruct.adam import Adam, Group
from reptrt.quantize.reconstruct.loss import Loss
from reptrt.quantize.reconstruct.options import LearnOptions
from reptrt.quantize.reconstruct.rounding import SoftCodes, beta_at
from reptrt.quantize.reconstruct.state import Sites, State, dequantized_weights, simulation

Batch = Callable[[Tensor], Mapping[str, Tensor]]  # image indices -> tensors by name

_CHECK_EVERY = 25  # iterations between checks that the loss is finite


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One unit to learn, with its inputs and targets."""

    name: str
    graph: TorchGraph  # the Q/DQ graph
    sites: Sites
    nodes: frozenset[str]  # the unit's nodes
    frozen: frozenset[int]  # groups whose steps an earlier unit learned
    outputs: tuple[str, ...]
    inputs: Batch  # from the quantized net
    targets: Batch  # from the float net
    loss: Loss
    # error of the stage's output as a function of the unit's outputs and of the image indices
    stage: Callable[[Mapping[str, Tensor], Tensor], Tensor] | None = None


def held_out_error(task: Task, state: State, images: Tensor) -> float:
    """Return the relative error of a task's outputs, computed as deployed.

    Args:
        task: the unit.
        state: codes, gains, shifts and steps.
        images: indices of the held-out images, (n,).
    """
    weights = dequantized_weights(task.sites, state, task.nodes)
    constants, hooks = simulation(task.sites, weights, state)
    total = 0.0
    with torch.no_grad():
        for part in torch.split(images, COMPUTE_BATCH):
            inputs = {**task.inputs(part), **constants}
            outputs = task.graph.run(inputs, task.outputs, replace=hooks)
            errors = task.loss.errors(outputs, task.targets(part))
            total += sum(float(error) for error in errors) / len(errors) * len(part)
    return total / len(images)


def learn(
    task: Task, start: State, images: Tensor, options: LearnOptions, generator: torch.Generator
) -> State:
    """Return the values of a task that were learned, with hardened codes.

    Args:
        task: the unit to learn.
        start: the values to start from.
        images: indices of the images to learn from, (n,).
        options: what is learned, and for how long.
        generator: draws the batches, on the CPU.

    Raises:
        CalibrationError: the loss became NaN or infinite.
    """
    trial = _Trial(task, start, options)
    if not trial.groups:
        return State()
    optimizer = Adam(trial.groups)
    for step in range(options.iterations):
        picked = images[torch.randint(len(images), (options.batch,), generator=generator)]
        with exact_math(task.graph.placement.device):
            loss = trial.loss(picked, beta_at(step, options.iterations))
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(0.5 * (1.0 + math.cos(math.pi * step / options.iterations)))
        if step % _CHECK_EVERY == 0 or step == options.iterations - 1:
            _refuse_not_finite(task.name, step, loss)
    return trial.learned()


class _Trial:
    """The trainable values of a task."""

    def __init__(self, task: Task, start: State, options: LearnOptions) -> None:
        self._task, self._start, self._options = task, start, options
        sites = self._sites = _part_of(task.sites, task.nodes)
        unit_sites = [*sites.weights.values()]
        self._weights = dequantized_weights(sites, start, [site.node for site in unit_sites])
        learned = [site for site in unit_sites if options.rounding and not site.exact]
        self._soft = SoftCodes(learned, start.codes, sites.grid) if learned else None
        layers = sites.affines.keys() if options.affine else ()
        self._gain = {layer: _trainable(start.gain[layer]) for layer in sorted(layers)}
        self._shift = {layer: _trainable(start.shift[layer]) for layer in sorted(layers)}
        groups = {pair.group for pair in sites.pairs.values()} - task.frozen
        self._log_step = {
            group: _trainable(start.step[group].log()) for group in sorted(groups) if options.steps
        }

    @property
    def groups(self) -> list[Group]:
        """What the optimizer moves."""
        options = self._options
        groups = [
            Group([] if self._soft is None else [self._soft.v], options.rounding_rate, False),
            Group([*self._gain.values(), *self._shift.values()], options.affine_rate, True),
            Group([*self._log_step.values()], options.step_rate, True),
        ]
        return [group for group in groups if group.tensors]

    def loss(self, picked: Tensor, beta: float | None) -> Tensor:
        """Return the loss on the picked images without the value of the regularizer.

        Its gradient is part of the backward pass, unless ``beta`` is None.
        """
        task = self._task
        outputs = self._run(task.inputs(picked), beta)
        loss = torch.stack(task.loss.errors(outputs, task.targets(picked))).mean()
        if task.stage is not None:
            loss = loss + self._options.stage_weight * task.stage(outputs, picked)
        return loss

    def learned(self) -> State:
        """Return the current values, with hardened codes."""
        return State(
            {} if self._soft is None else self._soft.harden(),
            {layer: value.detach() for layer, value in self._gain.items()},
            {layer: value.detach() for layer, value in self._shift.items()},
            {group: value.detach().exp() for group, value in self._log_step.items()},
        )

    def _run(self, inputs: Mapping[str, Tensor], beta: float | None) -> dict[str, Tensor]:
        soft: dict[str, Tensor] = {}
        if self._soft is not None:
            strength = self._options.regularizer / self._soft.v.numel()  # a mean over weights
            soft = self._soft.weights(beta, strength)
        current = State(
            {}, self._gain, self._shift, {g: value.exp() for g, value in self._log_step.items()}
        )
        constants, hooks = simulation(
            self._sites, {**self._weights, **soft}, self._start.updated(current)
        )
        return self._task.graph.run({**inputs, **constants}, self._task.outputs, replace=hooks)


def _part_of(sites: Sites, nodes: Collection[str]) -> Sites:
    """Return the sites that some of the nodes read."""
    weights = {node: site for node, site in sites.weights.items() if node in nodes}
    layers = {site.layer for site in weights.values()}
    return replace(
        sites,
        weights=weights,
        pairs={
            name: pair for name, pair in sites.pairs.items() if not pair.readers.isdisjoint(nodes)
        },
        affines={layer: names for layer, names in sites.affines.items() if layer in layers},
    )


def _trainable(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_(True)


def _refuse_not_finite(name: str, step: int, loss: Tensor) -> None:
    if not bool(torch.isfinite(loss)):
        raise CalibrationError(
            f"unit {name}: the loss is {float(loss.detach())} at iteration {step}; lower the "
            "rates of LearnOptions, or leave out what diverges: "
            f"{option('qprep', False)}, {option('rounding', 'nearest')}"
        )
