"""The choice of splits: layers that need one get it, others stay whole, the budget is kept."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from reptrt.core.grid import Grid
from reptrt.graph.net import Net, model_from_net, net_from_model
from reptrt.quantize.calib.channels import ChannelStats
from reptrt.quantize.choose import ChooseOptions, Decision, Policy, choose, num_macs
from tests.rewrite.test_splits import conv_net, rep_weight

GRIDS = (Grid.activation(8), Grid.weight(8))
RNG = np.random.default_rng(0)


def stats_of(channels: int) -> ChannelStats:
    """Return statistics with the largest value 4 and the mean square 0.5 in every channel."""
    return ChannelStats(np.full(channels, 4.0), np.full(channels, 0.5), np.zeros(channels))


def decide(
    weight: np.ndarray, *, groups: int = 1, stride: int = 1, budget: float = 10.0
) -> Decision:
    net = with_shapes(
        conv_net(weight, groups=groups, stride=stride, pad=weight.shape[2] // 2, height=8)
    )
    stats = {"conv": stats_of(weight.shape[1] * groups)}
    return next(
        d for d in choose(net, stats, ChooseOptions(*GRIDS, budget)).splits if d.layer == "conv"
    )


def with_shapes(net: Net) -> Net:
    """Return the net with shapes."""
    return net_from_model(model_from_net(net))


def test_a_rep_layer_is_split_and_an_ordinary_one_is_not() -> None:
    assert decide(rep_weight(RNG, 32, 32, 3, 1)).form in ("identity", "coarse-fine")
    ordinary = RNG.normal(0, 0.05, (32, 32, 3, 3)).astype(np.float32)
    assert decide(ordinary).form == "none"


def test_a_pointwise_rep_layer_needs_the_identity_form() -> None:
    decision = decide(rep_weight(RNG, 64, 64, 1, 1))
    assert decision.form == "identity"
    forms = {option.form for option in decision.options}
    assert forms == {"none", "identity-scalar", "identity"}


def test_a_strided_rep_layer_needs_the_coarse_fine_form() -> None:
    weight = 0.004 * RNG.standard_normal((32, 32, 3, 3))
    weight[:, :, 1, 1] += RNG.normal(0, 0.3, (32, 32))
    assert decide(weight.astype(np.float32), stride=2).form == "coarse-fine"


def test_a_depthwise_layer_has_a_scale_for_each_kernel_and_needs_nothing() -> None:
    weight = RNG.normal(0, 0.3, (32, 1, 3, 3)).astype(np.float32)
    assert decide(weight, groups=32).form == "none"


def test_one_ill_layer_among_many_healthy_ones_is_split_unless_all_stay_whole() -> None:
    x = gs.Variable("x", np.float32, ("N", 64, 8, 8))
    nodes, tensor = [], x
    for index in range(30):
        ill = index == 7
        weight = RNG.normal(0, 0.025, (64, 64, 1, 1)).astype(np.float32)
        weight = rep_weight(RNG, 64, 64, 1, 1) if ill else weight
        after = gs.Variable(f"t{index}", np.float32, ("N", 64, 8, 8))
        nodes.append(gs.Node("Conv", f"n{index}", {}, [tensor, gs.Constant(f"w{index}", weight)]))
        nodes[-1].outputs = [after]
        tensor = after
    net = with_shapes(Net(gs.Graph(nodes, [x], [tensor], opset=19, ir_version=9)))
    stats = {f"n{i}": stats_of(64) for i in range(30)}
    policies: tuple[Policy, ...] = ("whole", "balance", "identity")
    split = {
        policy: {d.layer for d in choose(net, stats, options).splits if d.form != "none"}
        for policy in policies
        for options in [ChooseOptions(*GRIDS, 1.0, policy)]
    }
    assert split == {"whole": set(), "balance": {"n7"}, "identity": {"n7"}}


def test_the_identity_policy_splits_where_that_halves_the_weight_noise() -> None:
    """A layer that is healthy, by its activations, is split nevertheless."""
    weight = rep_weight(RNG, 32, 32, 1, 1)
    net = with_shapes(conv_net(weight, groups=1, stride=1, pad=0, height=8))
    loud = ChannelStats(np.full(32, 400.0), np.full(32, 0.5), np.zeros(32))
    forms = {}
    policies: tuple[Policy, ...] = ("balance", "identity")
    for policy in policies:
        (decision,) = choose(net, {"conv": loud}, ChooseOptions(*GRIDS, 10.0, policy)).splits
        forms[policy] = decision.form
    assert forms == {"balance": "none", "identity": "identity"}


def test_the_weight_noise_is_what_a_convolution_shows() -> None:
    """Oracle: the mean squared output error over many random inputs with those mean squares."""
    weight = rep_weight(RNG, 8, 8, 3, 1)
    decision = decide(weight)
    scale = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / 127
    error = np.rint(weight / scale) * scale - weight
    x = RNG.normal(0, np.sqrt(0.5), (200_000, 8 * 9))
    measured = np.square(x @ error.reshape(8, -1).T).sum(axis=1).mean()
    assert decision.option("none").weight_noise == pytest.approx(measured, rel=0.02)


def test_no_budget_no_node_and_a_small_one_goes_where_it_gains_most() -> None:
    weights = [rep_weight(RNG, 16, 16, 3, 1), 0.2 * rep_weight(RNG, 16, 16, 3, 1)]
    weights[1][:, :, 1, 1] *= 0.05  # hardly ill
    x = gs.Variable("x", np.float32, ("N", 16, 8, 8))
    mid, y = gs.Variable("mid", np.float32), gs.Variable("y", np.float32, ("N", 16, 8, 8))
    attrs = {"kernel_shape": [3, 3], "pads": [1] * 4}
    nodes = [
        gs.Node("Conv", "ill", attrs, [x, gs.Constant("w0", weights[0])], [mid]),
        gs.Node("Conv", "fair", attrs, [mid, gs.Constant("w1", weights[1])], [y]),
    ]
    net = with_shapes(Net(gs.Graph(nodes, [x], [y], opset=19, ir_version=9)))
    stats = {"ill": stats_of(16), "fair": stats_of(16)}
    assert all(d.form == "none" for d in choose(net, stats, ChooseOptions(*GRIDS, 0.0)).splits)
    free = choose(net, stats, ChooseOptions(*GRIDS, 10.0)).splits
    ill = next(d for d in free if d.layer == "ill")
    assert ill.form == "identity"
    least = ill.option("identity").extra_macs / num_macs(net)
    tight = {d.layer: d for d in choose(net, stats, ChooseOptions(*GRIDS, least * 1.01)).splits}
    assert (tight["ill"].form, tight["fair"].form) == ("identity", "none")
    spent = sum(d.option(d.form).extra_macs for d in tight.values())
    assert spent <= least * 1.01 * num_macs(net)
