"""A plan is what its graph says, at every step of calibration and in the file in the end."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reptrt.core.grid import Grid
from reptrt.graph.net import Net, model_from_net, net_from_model
from reptrt.graph.placement import Placement, place
from reptrt.graph.plan import QuantPlan, plan_from_placement
from reptrt.graph.qdq import insert_qdq, quantize_weights, update_qdq
from reptrt.graph.quantized import plan_from_net
from reptrt.rewrite.fold_affine import fold_affine
from reptrt.rewrite.fold_skip_scale import fold_skip_scale
from reptrt.rewrite.insert_affine import insert_affine
from reptrt.rewrite.recentre import full_range_obstacle, recentre, round_scales
from reptrt.rewrite.round_biases import round_biases
from reptrt.rewrite.to_fp16 import to_fp16
from tests.support.full_range_nets import Case, cases, split_net
from tests.support.onnx_nets import basic_block, plain_chain
from tests.support.plans import assert_same_plan
from tests.support.qdq_nets import residual_net


def made_up_plan(
    net: Net, bits: int, exclude: Sequence[str] = (), *, full_range: bool = True, seed: int = 0
) -> QuantPlan:
    """A plan with random scales, one for each group, and full range wherever it is possible."""
    rng = np.random.default_rng(seed)
    placement = place(net, exclude)
    groups = {activation.group for activation in placement.activations}
    steps = {group: float(rng.uniform(0.01, 0.1)) for group in groups}
    scales = {a.tensor: steps[a.group] for a in placement.activations}
    tensors = _possible(net, placement) if full_range else []
    weights = quantize_weights(net, placement, Grid.weight(bits))
    return plan_from_placement(placement, scales, weights, Grid.activation(bits), tensors)


def without_dead_ends(net: Net) -> Net:
    """The same net without nodes that nothing reads."""
    net.graph.cleanup(remove_unused_graph_inputs=False)
    return net


def _possible(net: Net, placement: Placement) -> list[str]:
    names = [activation.tensor for activation in placement.activations]
    return [name for name in names if full_range_obstacle(net, placement, name) is None]


def from_file(net: Net) -> Net:
    """The net as a file holds it."""
    return net_from_model(model_from_net(net.copy()))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(case=cases(), bits=st.sampled_from([8, 8, 5]), full=st.booleans(), seed=st.integers(0, 99))
def test_the_plan_of_a_graph_is_the_one_that_was_written(
    case: Case, bits: int, full: bool, seed: int
) -> None:
    net = without_dead_ends(split_net(case))
    plan = made_up_plan(net, bits, full_range=full, seed=seed)
    insert_qdq(net, plan)
    assert_same_plan(plan_from_net(net), plan)
    assert_same_plan(plan_from_net(from_file(net)), plan)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(case=cases(), bits=st.sampled_from([8, 8, 5]), seed=st.integers(0, 99))
def test_the_plan_goes_on_through_all_steps(case: Case, bits: int, seed: int) -> None:
    net = without_dead_ends(split_net(case))
    plan = made_up_plan(net, bits, seed=seed)
    insert_qdq(net, plan)
    rounded = round_scales(net, plan)
    assert bool(plan.full_range) == any(
        rounded.activations[name].scale != plan.activations[name].scale for name in plan.full_range
    )
    assert_same_plan(plan_from_net(net), rounded)
    round_biases(net)
    recentre(net, rounded)
    fold_skip_scale(net)
    assert_same_plan(plan_from_net(net), rounded)
    assert_same_plan(plan_from_net(from_file(net)), rounded)


def test_nets_with_groups_excluded_layers_and_pools() -> None:
    net = net_from_model(residual_net())
    plan = made_up_plan(net, 8, exclude=[r"^b\d$"])
    assert plan.excluded == ("b1", "b2")
    assert len({a.group for a in plan.activations.values()}) < len(plan.activations)  # a Concat
    insert_qdq(net, plan)
    assert_same_plan(plan_from_net(from_file(net)), plan)


def test_fp16_leaves_the_plan_but_for_the_rounding_of_scales() -> None:
    net = net_from_model(basic_block())
    plan = made_up_plan(net, 8)
    insert_qdq(net, plan)
    plan = round_scales(net, plan)
    recentre(net, plan)
    to_fp16(net)
    found = plan_from_net(from_file(net))
    for tensor in plan.full_range:
        assert found.activations[tensor].scale == plan.activations[tensor].scale
    scales = {name: found.activations[name].scale for name in plan.activations}
    np.testing.assert_allclose(
        list(scales.values()), [a.scale for a in plan.activations.values()], rtol=2**-11
    )
    weights = {
        name: replace(weight, scale=found.weights[name].scale)
        for name, weight in plan.weights.items()
    }
    assert_same_plan(found, plan.with_scales(scales).with_weights(weights))


def test_other_numbers_for_the_same_pairs() -> None:
    net = net_from_model(residual_net())
    plan = made_up_plan(net, 5)
    insert_qdq(net, plan)
    names = set(net.graph.tensors())
    scales = {name: 2 * activation.scale for name, activation in plan.activations.items()}
    weights = {
        name: replace(weight, codes=-weight.codes, scale=3 * weight.scale)
        for name, weight in plan.weights.items()
    }
    other = plan.with_scales(scales).with_weights(weights)
    update_qdq(net, other)
    assert set(net.graph.tensors()) == names
    assert_same_plan(plan_from_net(from_file(net)), other)


@pytest.mark.parametrize("split", ["none", "identity", "coarse_fine"])
def test_folded_affines_are_in_the_plan(split: str) -> None:
    case = Case(basic_block())
    if split != "none":
        getattr(case, split).append("c2")
    net = split_net(case)
    plan = made_up_plan(net, 8)
    insert_qdq(net, plan)
    insert_affine(net)
    rng = np.random.default_rng(0)
    for name, tensor in net.graph.tensors().items():
        if name.endswith(".gain"):
            tensor.values = rng.uniform(-2, 2, tensor.values.shape).astype(np.float32)
    assert_same_plan(plan_from_net(net), plan)
    _, folded = fold_affine(net, plan)
    assert any((folded.weights[n].scale != w.scale).any() for n, w in plan.weights.items())
    assert_same_plan(plan_from_net(net), folded)


def test_a_group_has_one_scale() -> None:
    net = net_from_model(residual_net())
    placement = place(net)
    scales = {a.tensor: 0.1 for a in placement.activations}
    groups = [a.group for a in placement.activations]
    shared = next(a for a in placement.activations if groups.count(a.group) > 1)
    scales[shared.tensor] = 0.2
    weights = quantize_weights(net, placement, Grid.weight(8))
    with pytest.raises(ValueError, match=r"expected .* as all of group \d"):
        plan_from_placement(placement, scales, weights, Grid.activation(8))


@pytest.mark.parametrize(
    ("zero_point", "grid"),
    [
        (np.array(0, np.int8), Grid(-128, 127)),
        (np.array(-5, np.int8), Grid(-123, 132)),
        (np.array(128, np.uint8), Grid(-128, 127)),
        (np.array(10, np.uint8), Grid(-10, 245)),
    ],
)
def test_codes_of_a_pair_of_another_tool(zero_point: np.ndarray, grid: Grid) -> None:
    net = net_from_model(plain_chain())
    insert_qdq(net, made_up_plan(net, 8, full_range=False))
    quantize = next(node for node in net.graph.nodes if node.name == "c1.relu.quantize")
    (dequantize,) = quantize.outputs[0].outputs
    for node in (quantize, dequantize):
        node.inputs[2] = gs.Constant("z", zero_point)
    assert plan_from_net(net).activations["c1.relu"].grid == grid


def test_what_a_plan_cannot_express_is_left_out() -> None:
    net = net_from_model(plain_chain())
    plan = made_up_plan(net, 8, full_range=False)
    insert_qdq(net, plan)
    nodes = {node.name: node for node in net.graph.nodes}
    channels = net.graph.tensors()["c1.relu"].shape[1]
    per_channel = gs.Constant("s", np.full(channels, 0.1, np.float32))
    zero_points = gs.Constant("z", np.zeros(channels, np.int8))
    for name in ("c1.relu.quantize", "c1.relu.dequantize"):
        nodes[name].inputs[1], nodes[name].inputs[2] = per_channel, zero_points
    weight = nodes["c2.weight.dequantize"]
    weight.inputs[2].values = np.ones_like(weight.inputs[2].values)
    found = plan_from_net(net)
    assert plan.activations.keys() - found.activations.keys() == {"c1.relu"}
    assert plan.weights.keys() - found.weights.keys() == {"c2"}


def test_a_float_net_has_an_empty_plan() -> None:
    plan = plan_from_net(net_from_model(plain_chain()))
    assert not plan.activations
    assert not plan.weights
    assert plan.excluded == ("c1", "c2", "head")
