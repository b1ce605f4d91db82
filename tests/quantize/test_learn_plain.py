"""Learning a unit gives what the formulas give if they are computed the plain way.

The plain way has one parameter for each tensor, a regularizer for each layer, autograd through all
formulas and torch's Adam for single tensors. Learning has one buffer for all codes of a unit,
passes that share work, and a fused optimizer.
"""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reptrt.core.grid import Grid
from reptrt.quantize.reconstruct import attempt
from reptrt.quantize.reconstruct.learn import Task, learn
from reptrt.quantize.reconstruct.options import LearnOptions
from reptrt.quantize.reconstruct.rounding import beta_at
from reptrt.quantize.reconstruct.state import State, WeightSite, simulation
from tests.support.learned_nets import Case, nearest, rep_net, write_images

OPTIONS = LearnOptions(iterations=10, batch=16, rounding_rate=0.8, loss="mse")


class PlainCodes:
    """The soft codes of one layer."""

    def __init__(self, site: WeightSite, start: Tensor, grid: Grid) -> None:
        exact = site.weight / site.scale
        self.scale, self.floor = site.scale, exact.floor()
        self.low, self.high = (f.clamp(grid.qmin, grid.qmax) for f in (self.floor, exact.ceil()))
        near = start + 0.2 * (exact - start)  # start: the floor or the ceiling
        self.v = (-torch.log(1.2 / (near - self.floor + 0.1) - 1)).requires_grad_()

    def h(self) -> Tensor:
        return (1.2 * torch.sigmoid(self.v) - 0.1).clamp(0, 1)

    def weight(self) -> Tensor:
        return (self.floor + self.h()).clamp(self.low, self.high) * self.scale

    def harden(self) -> Tensor:
        return (self.floor + (self.v >= 0)).clamp(self.low, self.high)


def plain_quantize(x: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """Straight-through rounding; gradients of x and step are those of arXiv 1902.08153."""
    scaled = (x / step).clamp(grid.qmin, grid.qmax)
    return (scaled + (scaled.round() - scaled).detach()) * step


def plainly(
    task: Task, start: State, images: Tensor, options: LearnOptions, generator: torch.Generator
) -> State:
    """What `learn` does, for a net without splits."""
    sites = task.sites
    codes = {
        n: PlainCodes(s, start.codes[n], sites.grid)
        for n, s in sites.weights.items()
        if n in task.nodes
    }
    gain, shift = (
        {n: values[n].clone().requires_grad_() for n in codes if n in sites.affines}
        for values in (start.gain, start.shift)
    )
    pairs = [pair for pair in sites.pairs.values() if pair.readers & task.nodes]
    logs = {
        pair.group: start.step[pair.group].log().requires_grad_()
        for pair in pairs
        if pair.group not in task.frozen
    }
    groups = [
        {"params": [c.v for c in codes.values()], "lr": options.rounding_rate},
        {"params": [*gain.values(), *shift.values()], "lr": options.affine_rate},
        {"params": [*logs.values()], "lr": options.step_rate},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], foreach=False)
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(options.iterations):
        picked = images[torch.randint(len(images), (options.batch,), generator=generator)]
        decay = 0.5 * (1 + math.cos(math.pi * step / options.iterations))
        for index, (group, rate) in enumerate(zip(optimizer.param_groups, rates, strict=True)):
            group["lr"] = rate * (decay if index else 1.0)
        now = start.updated(State({}, gain, shift, {g: value.exp() for g, value in logs.items()}))
        weights = {n: c.weight() for n, c in codes.items()}
        constants, hooks = simulation(sites, weights, now)
        for pair in pairs:
            at = now.step[pair.group]
            hooks[pair.dequantize] = lambda x, *_, at=at, grid=pair.grid: plain_quantize(
                x, at, grid
            )
        values = task.graph.run({**task.inputs(picked), **constants}, task.outputs, replace=hooks)
        errors = task.loss.errors(values, task.targets(picked))
        loss = torch.stack(errors).mean()
        if (beta := beta_at(step, options.iterations)) is not None:
            terms = [(1 - (2 * c.h() - 1).abs().pow(beta)).sum() for c in codes.values()]
            count = sum(c.v.numel() for c in codes.values())
            loss = loss + options.regularizer * torch.stack(terms).sum() / count
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    detached = ({n: value.detach() for n, value in values.items()} for values in (gain, shift))
    steps = {group: value.detach().exp() for group, value in logs.items()}
    return State({n: c.harden() for n, c in codes.items()}, *detached, steps)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    data = write_images(tmp_path_factory.mktemp("plain") / "d.npz", 64)
    return nearest(rep_net(2), data, weight_bits=4)


@pytest.mark.parametrize("seed", [0, 1])
def test_each_unit_is_learned_as_the_formulas_say(
    seed: int, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[State, State, State]] = []

    def both(
        task: Task, start: State, images: Tensor, options: LearnOptions, generator: torch.Generator
    ) -> State:
        draws = generator.get_state()
        expected = plainly(task, start, images, options, generator)
        generator.set_state(draws)
        found = learn(task, start, images, options, generator)
        compared.append((start, expected, found))
        return found

    monkeypatch.setattr(attempt, "learn", both)
    case.learn(tmp_path, replace(OPTIONS, seed=seed))
    assert len(compared) == 4
    moved = 0
    for start, expected, found in compared:
        for node, codes in expected.codes.items():
            differ = int((codes != found.codes[node]).sum())
            assert differ <= max(1, 0.003 * codes.numel()), f"{node}: {differ} codes differ"
            moved += int((codes != start.codes[node]).sum())
        for kind in ("gain", "shift", "step"):
            one, other = getattr(expected, kind), getattr(found, kind)
            assert one.keys() == other.keys()
            assert one
            for name, value in one.items():
                torch.testing.assert_close(other[name], value, rtol=2e-3, atol=2e-3)
    assert moved > 20  # against 1 of each tensor that may differ
