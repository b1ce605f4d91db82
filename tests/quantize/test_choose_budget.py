"""The spending of the budget in `quantize.choose`, against all combinations and measured noise."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from reptrt.core.grid import Grid
from reptrt.graph.net import Net, net_from_model
from reptrt.graph.placement import place
from reptrt.pipeline import CalibrateOptions, calibrate
from reptrt.quantize.calib.channels import ChannelStats
from reptrt.quantize.choose import (
    Choice,
    ChooseOptions,
    Decision,
    Option,
    choose,
    full_range_macs,
    num_macs,
)
from reptrt.rewrite.recentre import full_range_obstacle
from tests.rewrite.test_splits import rep_weight
from tests.support.helpers import ort_run
from tests.support.learned_nets import write_images, write_net
from tests.support.onnx_nets import Builder
from tests.support.qdq_nets import images, with_outputs

GRIDS = (Grid.activation(8), Grid.weight(6))  # coarse weights: splits are worth something
ELEMENTWISE = 8  # what one elementwise pass over an output element counts as
SIZE = 9
CHANNELS = 16  # where an identity split costs less than a coarse-fine one


def set_weight(b: Builder, name: str, weight: np.ndarray) -> None:
    kernel = next(tensor for tensor in b.constants if tensor.name == f"{name}.weight")
    kernel.CopyFrom(numpy_helper.from_array(weight.astype(np.float32), kernel.name))


def rep_chain(seed: int = 0) -> onnx.ModelProto:
    """Rep layers with more and less weight noise, padded and not, and a head.

    Full range of the last two activations costs less or nothing: a pointwise layer, an average.
    """
    b, rng = Builder(size=SIZE, seed=seed), np.random.default_rng(seed)
    y = b.relu(b.conv("x", CHANNELS, "stem"))
    for name, taps, stride, factor in (("a", 3, 1, 1.0), ("b", 3, 1, 0.2), ("c", 3, 2, 0.5)):
        y = b.relu(b.conv(y, CHANNELS, name, size=taps, strides=[stride] * 2))
        weight = rep_weight(rng, CHANNELS, CHANNELS, taps, 1)
        weight[np.arange(CHANNELS), np.arange(CHANNELS), 1, 1] *= factor
        set_weight(b, name, weight)
    y = b.relu(b.conv(y, CHANNELS, "point", size=1, pads=[0] * 4))
    set_weight(b, "point", rep_weight(rng, CHANNELS, CHANNELS, 1, 1))
    return b.model(b.head(y))


class Measured:
    """A net, its activations on some images, and those of them that can have full range."""

    def __init__(self, model: onnx.ModelProto, x: np.ndarray) -> None:
        self.net: Net = net_from_model(model)
        names = [name for node in model.graph.node for name in node.output]
        self.values = ort_run(with_outputs(model, names), {"x": x}, optimize=False) | {"x": x}
        layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
        self.inputs = {node.name: node.input[0] for node in layers}
        self.stats = {layer: stats64(self.values[name]) for layer, name in self.inputs.items()}
        placement = place(self.net)
        self.ranges = {
            activation.tensor: full_range_macs(
                self.net, activation.tensor, ChooseOptions(*GRIDS, 0.0).costs
            )
            for activation in placement.activations
            if full_range_obstacle(self.net, placement, activation.tensor) is None
        }
        self.macs = num_macs(self.net)

    def choice(self, budget: float, *, left: float = 1.0, ranges: bool = True) -> Choice:
        """Choose with a budget in multiply-accumulates; a part of the weight noise counts."""
        options = ChooseOptions(*GRIDS, budget / self.macs, remaining=left)
        return choose(self.net, self.stats, options, self.ranges if ranges else {})


def stats64(values: np.ndarray) -> ChannelStats:
    x = values.astype(np.float64).reshape(*values.shape[:2], -1)
    return ChannelStats(np.abs(x).max((0, 2)), np.square(x).mean((0, 2)), x.mean((0, 2)))


@pytest.fixture(scope="module")
def chain() -> Measured:
    return Measured(rep_chain(), images(16, size=SIZE))


# All combinations --------------------------------------------------------------------------------


def allowed(wanted: Decision) -> list[Option]:
    """Return the options of a layer: whole, the desired form, and every form that costs less."""
    target = wanted.option(wanted.form)
    cheaper = [o for o in wanted.options if o.extra_macs < target.extra_macs]
    return [*cheaper, target]


def noise_of(options: Sequence[tuple[Decision, Option]], left: float) -> float:
    return sum(left * option.weight_noise / decision.signal for decision, option in options)


def combinations(wanted: Choice, left: float) -> list[tuple[int, float]]:
    """Return cost and noise of every combination of forms of layers and full ranges."""
    found = []
    ways = [[(decision, option) for option in allowed(decision)] for decision in wanted.splits]
    switches = [(False, True)] * len(wanted.ranges)
    for options in itertools.product(*ways):
        for full in itertools.product(*switches):
            given = [d for d, on in zip(wanted.ranges, full, strict=True) if on]
            cost = sum(o.extra_macs for _, o in options) + sum(d.extra_macs for d in given)
            found.append((cost, noise_of(options, left) - sum(d.gain for d in given)))
    return found


def corners(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the corners of the lower convex hull of cost and noise."""
    best: list[tuple[int, float]] = []
    for cost, noise in sorted(points):
        if best and noise >= best[-1][1] - 1e-12:
            continue
        while best and best[-1][0] == cost:
            best.pop()
        while len(best) > 1:
            (c0, n0), (c1, n1) = best[-2:]
            if (n0 - n1) * (cost - c1) > (n1 - noise) * (c1 - c0):
                break
            best.pop()
        best.append((cost, noise))
    return best


def spent(choice: Choice) -> int:
    """Return the cost of a choice as its decisions state it."""
    splits = sum(d.option(d.form).extra_macs for d in choice.splits)
    return splits + sum(d.extra_macs for d in choice.ranges if d.full)


@pytest.mark.parametrize("left", [1.0, 0.1])
def test_no_combination_within_the_same_cost_leaves_less_noise(
    left: float, chain: Measured
) -> None:
    """With the cost of a corner as the budget, taking the best rate first is optimal."""
    wanted = chain.choice(1e9, left=left)
    assert len({decision.form for decision in wanted.splits}) > 1
    steps = corners(combinations(wanted, left))
    assert len(steps) >= 8
    for cost, noise in steps:
        choice = chain.choice(cost + 0.5, left=left)
        options = [(d, d.option(d.form)) for d in choice.splits]
        got = noise_of(options, left) - sum(d.gain for d in choice.ranges if d.full)
        assert got == pytest.approx(noise, rel=1e-9)
        assert spent(choice) == cost
    last = chain.choice(steps[-1][0] + 0.5, left=left)
    assert [d.form for d in last.splits] == [d.form for d in wanted.splits]
    assert {d.tensor for d in last.ranges if not d.full} <= {"point.relu"}  # no layer reads it


@pytest.mark.parametrize("left", [1.0, 0.1])
def test_the_budget_is_never_exceeded(left: float, chain: Measured) -> None:
    wanted = chain.choice(1e9, left=left)
    total, costs = spent(wanted), set()
    for budget in np.linspace(0, 1.1 * total, 60):
        choice = chain.choice(budget, left=left)
        assert choice.extra_macs == spent(choice) <= budget
        costs.add(choice.extra_macs)
        for decision, free in zip(choice.splits, wanted.splits, strict=True):
            cut = f"; {free.form} is beyond the budget" * (decision.form != free.form)
            assert decision.reason == free.reason + cut
    assert len(costs) > 8
    assert chain.choice(total + 0.5, left=left).extra_macs == total


def forms(choice: Choice) -> list[tuple[str, str]]:
    return [(decision.layer, decision.form) for decision in choice.splits]


def test_a_layer_is_upgraded_step_by_step(chain: Measured) -> None:
    """From whole to the desired form: less noise for more cost, each step at a lower rate."""
    wanted = chain.choice(1e9)
    taken: dict[str, Option] = {}
    for budget in np.linspace(0, spent(wanted) + 0.5, 80):
        found = next(d for d in chain.choice(budget).splits if d.layer == "a")
        taken[found.form] = found.option(found.form)
    assert list(taken) == ["none", "identity", "coarse-fine"]
    options = list(taken.values())
    rates = [
        (a.weight_noise - b.weight_noise) / (b.extra_macs - a.extra_macs)
        for a, b in itertools.pairwise(options)
    ]
    assert all(rate > 0 for rate in rates)
    assert rates == sorted(rates, reverse=True)


# Full range --------------------------------------------------------------------------------------


def test_full_range_that_costs_nothing_is_taken_without_a_budget(chain: Measured) -> None:
    choice = chain.choice(0.0)
    free = {decision.tensor for decision in choice.ranges if decision.extra_macs == 0}
    assert free == {"c.relu"}  # read by a pointwise layer
    assert {decision.tensor for decision in choice.ranges if decision.full} == free
    assert {form for _, form in forms(choice)} == {"none"}
    assert choice.extra_macs == 0
    assert not chain.choice(0.0, ranges=False).ranges


def test_what_full_range_costs(chain: Measured) -> None:
    """Full range costs a border map for each padded reader, and a constant after an average."""
    costs = {decision.tensor: decision.extra_macs for decision in chain.choice(0.0).ranges}
    half = (SIZE + 1) // 2
    assert costs == {
        "stem.relu": ELEMENTWISE * CHANNELS * SIZE * SIZE,
        "a.relu": ELEMENTWISE * CHANNELS * SIZE * SIZE,
        "b.relu": ELEMENTWISE * CHANNELS * half * half,
        "c.relu": 0,
        "point.relu": ELEMENTWISE * CHANNELS,
    }


def one_rep_layer(noise: float) -> Measured:
    """A stem and a padded rep layer with the given weight noise relative to activation noise."""
    b = Builder(size=SIZE)
    y = b.relu(b.conv(b.relu(b.conv("x", CHANNELS, "stem", size=1, pads=[0] * 4)), CHANNELS, "rep"))
    set_weight(b, "rep", rep_weight(np.random.default_rng(0), CHANNELS, CHANNELS, 3, 1))
    measured = Measured(b.model(b.conv(y, 4, "last", size=1, pads=[0] * 4)), images(16, size=SIZE))
    measured.ranges = {"stem.relu": measured.ranges["stem.relu"]}
    stats = measured.stats["rep"]
    measured.stats = {"rep": replace(stats, mean=np.zeros(CHANNELS))}
    (decision,) = measured.choice(0.0).splits
    factor = noise * decision.activation_noise / decision.option("none").weight_noise
    measured.stats = {"rep": replace(measured.stats["rep"], mean_square=factor * stats.mean_square)}
    (decision,) = measured.choice(0.0).splits
    ratio = decision.option("none").weight_noise / decision.activation_noise
    assert ratio == pytest.approx(noise)
    return measured


def test_full_range_goes_before_splits_where_rounding_is_learned() -> None:
    measured = one_rep_layer(20.0)  # times the activation noise; a tenth is left of it
    (wanted,) = measured.choice(1e9).splits
    budget = min(option.extra_macs for option in wanted.options if option.extra_macs)
    found = {
        left: (choice.splits[0].form != "none", choice.ranges[0].full)
        for left in (1.0, 0.1)
        for choice in [measured.choice(budget, left=left)]
    }
    assert found == {1.0: (True, False), 0.1: (False, True)}
    for left in found:
        rich = measured.choice(1e9, left=left)
        assert (rich.splits[0].form, rich.ranges[0].full) == (wanted.form, True)


def two_readers() -> onnx.ModelProto:
    """A net with one activation, never 0, that two convolutions without padding read."""
    b = Builder(size=SIZE)
    y = b.relu(b.conv("x", 6, "stem", size=1, pads=[0] * 4))
    for tensor in b.constants:
        if tensor.name == "stem.bias":
            tensor.CopyFrom(numpy_helper.from_array(np.full(6, 50, np.float32), tensor.name))
    left = b.conv(y, 5, "left", pads=[0] * 4)
    right = b.conv(y, 4, "right", size=1, pads=[1, 1, 1, 1], strides=[2, 2])
    return b.model(b.relu(left), b.relu(right))


def conv64(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return a convolution without padding, in float64."""
    size = weight.shape[2]
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (2, 3))
    return np.einsum("nihwuv,oiuv->nohw", windows, weight.astype(np.float64))


def rounded64(x: np.ndarray, levels: int) -> np.ndarray:
    step = np.abs(x).max() / levels
    return np.rint(x / step) * step


def test_the_gain_of_full_range_is_the_noise_that_it_removes() -> None:
    """Oracle: real activations rounded to 127 and to 255 steps, through real convolutions.

    The decision takes rounding errors to be uniform and independent; here they nearly are.
    """
    model = two_readers()
    measured = Measured(model, images(64, size=SIZE, seed=3))
    (decision,) = (d for d in measured.choice(0.0).ranges if d.tensor == "stem.relu")
    x = measured.values["stem.relu"].astype(np.float64)
    assert x.min() > 0
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    measured = by_formula = 0.0
    for layer in ("left", "right"):
        weight = weights[f"{layer}.weight"]
        signal = conv64(np.square(x).mean((0, 2, 3)).reshape(1, -1, 1, 1) * np.ones((1, 6, 3, 3)),
                        np.square(weight)).mean((0, 2, 3)).sum()  # fmt: skip
        noise = [
            np.square(conv64(rounded64(x, levels) - x, weight)).mean((0, 2, 3)).sum()
            for levels in (127, 255)
        ]
        measured += (noise[0] - noise[1]) / signal
        steps = [x.max() / levels for levels in (127, 255)]
        squares = np.square(weight.astype(np.float64)).sum()
        by_formula += squares * (steps[0] ** 2 - steps[1] ** 2) / 12 / signal
    assert decision.gain == pytest.approx(by_formula, rel=1e-5)
    assert decision.gain == pytest.approx(measured, rel=0.05)


# What was chosen is what is written --------------------------------------------------------------


def added_macs(before: onnx.ModelProto, after: onnx.ModelProto) -> int:
    """Return the cost of the nodes that only the written file has, from its shapes."""
    inferred = onnx.shape_inference.infer_shapes(after, strict_mode=True).graph
    shapes = {
        value.name: [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.output)
    }
    initial = {t.name: t.dims for t in after.graph.initializer}
    makers = {name: node for node in after.graph.node for name in node.output}

    def cost(node: onnx.NodeProto) -> int:
        elements = int(np.prod(shapes[node.output[0]]))
        if node.op_type == "Add":  # a Mul before it belongs to the same pass
            return ELEMENTWISE * elements
        if node.op_type in ("Conv", "Gemm"):
            weight = initial[makers[node.input[1]].input[0]]
            return elements * int(np.prod(weight[1:]))
        return 0

    original = {node.name for node in before.graph.node}
    original |= {
        f"{name}{part}" for name in original for part in (".rest", ".fine")
    }  # the layer's cost
    return sum(cost(node) for node in after.graph.node if node.name not in original)


@pytest.mark.slow
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("max_overhead", [0.0, 0.05, 0.3, 0.6, 5.0])
def test_the_overhead_that_is_reported_is_what_was_written(
    max_overhead: float, learn: bool, tmp_path: Path
) -> None:
    model = rep_chain()
    write_net(tmp_path / "m.onnx", model)
    write_images(tmp_path / "d.npz", 16, size=SIZE)
    options = CalibrateOptions(
        images=16,
        max_overhead=max_overhead,
        weight_bits=6,
        recipe="balanced" if learn else "fast",
        iterations=1 if learn else None,
    )
    report = calibrate(tmp_path / "m.onnx", tmp_path / "d.npz", tmp_path / "o.onnx", options)
    areas = {"stem": 81, "a": 81, "b": 81, "c": 25, "point": 25}
    macs = sum(
        int(np.prod(t.dims)) * areas.get(t.name.removesuffix(".weight"), 1)
        for t in model.graph.initializer
        if t.name.endswith(".weight")
    )
    added = added_macs(model, onnx.load(str(tmp_path / "o.onnx")))
    choice = Choice(report.decisions, report.ranges)
    assert report.overhead == pytest.approx(spent(choice) / macs, rel=1e-12)
    assert report.overhead * macs == pytest.approx(added)
    assert report.overhead <= max_overhead
    assert set(report.full_range) == {d.tensor for d in report.ranges if d.full}
    assert len(report.splits) == sum(d.form != "none" for d in report.decisions)
    json.dumps(report.to_dict())


@pytest.mark.parametrize("form", ["identity", "coarse-fine", "identity-scalar"])
@pytest.mark.parametrize("full_range", [False, True])
def test_splits_that_are_asked_for_count_as_those_that_are_chosen(
    form: str, full_range: bool, tmp_path: Path
) -> None:
    model = rep_chain()
    write_net(tmp_path / "m.onnx", model)
    write_images(tmp_path / "d.npz", 16, size=SIZE)
    options = CalibrateOptions(
        images=16,
        split=form,
        full_range=full_range,
        max_overhead=5.0,  # type: ignore[arg-type]
    )
    report = calibrate(tmp_path / "m.onnx", tmp_path / "d.npz", tmp_path / "o.onnx", options)
    assert {split.form for split in report.splits} == {form}
    macs = num_macs(net_from_model(onnx.load(str(tmp_path / "m.onnx"))))
    added = added_macs(model, onnx.load(str(tmp_path / "o.onnx")))
    assert report.overhead * macs == pytest.approx(added)
