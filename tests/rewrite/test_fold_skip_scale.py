"""The scalar identity: its factor is the scale of its skip; what a ReLU hides gets no codes."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from reptrt.cli import main
from reptrt.core.grid import Grid
from reptrt.execute.runner import OrtRunner
from reptrt.execute.torch_runner import float_activations, graph_runner
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import Net, constant_of, model_from_net, net_from_model, read_model
from reptrt.graph.placement import place
from reptrt.graph.plan import plan_from_placement
from reptrt.graph.qdq import insert_qdq, quantize_weights
from reptrt.pipeline import CalibrateOptions, calibrate
from reptrt.quantize.calib.histogram import histogram_of
from reptrt.quantize.calib.options import ThresholdOptions
from reptrt.quantize.calib.saturation import with_needed
from reptrt.quantize.choose import int8_obstacle
from reptrt.rewrite.fold_skip_scale import fold_skip_scale
from reptrt.rewrite.recentre import recentre
from reptrt.rewrite.split_identity import split_identity
from tests.support.helpers import optimized_op_counts, ort_run
from tests.support.learned_nets import SIZE, rep_net, write_images, write_net
from tests.support.qdq_nets import images

torch = pytest.importorskip("torch")


def quantized_scalar(*, full: bool = False, factor: float | None = None) -> Net:
    """A rep net with all layers split that can be, in the float form, quantized."""
    net = net_from_model(rep_net(blocks=2))
    split_identity(
        net, [n.name for n in net.graph.nodes], grid=Grid.weight(8), form="identity-scalar"
    )
    for node in net.graph.nodes:
        if node.op == "Mul" and factor is not None:
            node.inputs[1].values = np.array(factor, np.float32)
    placement = place(net)
    scales = {a.tensor: 0.02 for a in placement.activations}
    relus = {n.outputs[0].name for n in net.graph.nodes if n.op == "Relu"}
    weights = quantize_weights(net, placement, Grid.weight(8))
    full_range = relus if full else ()
    plan = plan_from_placement(placement, scales, weights, Grid.activation(8), full_range)
    insert_qdq(net, plan)
    recentre(net, plan)
    return net


def muls(net: Net) -> list[gs.Node]:
    return [node for node in net.graph.nodes if node.op == "Mul"]


def run(net: Net, x: np.ndarray) -> np.ndarray:
    (found,) = ort_run(model_from_net(net.copy()), {"x": x}, optimize=False).values()
    return found


@pytest.mark.parametrize("full", [False, True], ids=["symmetric", "full range"])
def test_folding_changes_nothing_and_leaves_no_mul(full: bool) -> None:
    net, x = quantized_scalar(full=full), images(8, 3, SIZE, seed=3)
    before, count = run(net, x), len(muls(net))
    report = fold_skip_scale(net)
    assert count == len(report.changed) > 0
    assert not muls(net)
    np.testing.assert_allclose(run(net, x), before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_a_factor_that_cannot_be_a_scale_stays_a_mul() -> None:
    net, x = quantized_scalar(factor=-0.5), images(8, 3, SIZE, seed=3)
    before, count = run(net, x), len(muls(net))
    report = fold_skip_scale(net)
    assert (len(report.changed), len(report.skipped), len(muls(net))) == (0, count, count)
    np.testing.assert_array_equal(run(net, x), before)


@pytest.mark.parametrize("full", [False, True], ids=["symmetric", "full range"])
def test_onnxruntime_form_and_torch_agree_with_the_folded_graph(full: bool) -> None:
    net, x = quantized_scalar(full=full), images(16, 3, SIZE, seed=3)
    fold_skip_scale(net)
    expected = run(net, x)
    with OrtRunner(model_from_net(net).SerializeToString(), threads=1) as runner:
        lowered = next(iter(runner.run(x).values()))
    by_torch = next(iter(graph_runner(net, torch.device("cpu")).run(x).values()))
    for got in (lowered, by_torch):
        # A sum near the middle of two codes may fall to either side.
        assert np.linalg.norm(got - expected) < 0.02 * np.linalg.norm(expected)


def test_without_rounding_the_skip_keeps_its_factor() -> None:
    """The simulation with float activations: a pair of two scales multiplies."""
    net, x = quantized_scalar(), images(4, 3, SIZE, seed=3)
    unfolded = graph_runner(net, torch.device("cpu"), float_activations(net)).run(x)["head"]
    fold_skip_scale(net)
    folded = graph_runner(net, torch.device("cpu"), float_activations(net)).run(x)["head"]
    np.testing.assert_allclose(folded, unfolded, rtol=0, atol=1e-5 * np.abs(unfolded).max())


# What a ReLU hides -------------------------------------------------------------------------------


def split_sum(factor: float) -> Net:
    """relu(conv(x) + factor x) of a scalar split with INT8 summands, x behind a ReLU."""
    net = net_from_model(rep_net(blocks=1))
    layers = [n.name for n in net.graph.nodes]
    split_identity(net, layers, grid=Grid.weight(8), form="identity-scalar", precision="int8")
    (mul,) = muls(net)
    mul.inputs[1].values = np.array(factor, np.float32)
    return net


@pytest.mark.parametrize(("factor", "mean"), [(0.5, -3), (3.0, -3), (3.0, -15)])
def test_what_a_sum_needs_of_its_summand_makes_the_same_output(factor: float, mean: int) -> None:
    """Brute force: in the range that was found, and only there, every y is as before."""
    net = split_sum(factor)
    (mul,) = muls(net)
    added = mul.outputs[0].outputs[0]
    rest, x, y = added.inputs[0].name, mul.inputs[0].name, added.outputs[0].outputs[0].outputs[0]
    rng = np.random.default_rng(0)
    values = {x: rng.uniform(0, 2, (4000, 1, 1, 1)), rest: rng.normal(mean, 4, (4000, 1, 1, 1))}
    tensors = {name: torch.from_numpy(value).float() for name, value in values.items()}
    watched, needed = with_needed(net)
    graph = TorchGraph(watched)
    before = graph.run(tensors, [y.name])[y.name]
    found = graph.run(tensors, [needed[rest]])[needed[rest]]
    low, high = histogram_of(found).range
    assert low > float(tensors[rest].min())
    assert (low, high) == (float(found.min().clamp(max=0)), float(found.max().clamp(min=0)))

    def cut(low: float) -> torch.Tensor:
        clipped = {x: tensors[x], rest: tensors[rest].clamp(low, high)}
        return graph.run(clipped, [y.name])[y.name]

    torch.testing.assert_close(cut(low), before, rtol=0, atol=1e-5)
    assert not torch.equal(cut(0.7 * low), before)


def test_nothing_is_hidden_where_no_relu_follows() -> None:
    net = split_sum(0.5)
    (mul,) = muls(net)
    mul.outputs[0].outputs[0].outputs[0].outputs[0].op = "Sigmoid"
    watched, needed = with_needed(net)
    assert needed == {}
    assert len(watched.graph.nodes) == len(net.graph.nodes)


# The whole way -----------------------------------------------------------------------------------


def test_int8_all_the_way_in_onnxruntime(tmp_path: Path) -> None:
    """Every convolution and every sum runs in INT8; no float operator but the input's Q is left."""
    model = write_net(tmp_path / "m.onnx", rep_net(blocks=4))
    data = write_images(tmp_path / "d.npz", 64)
    options = CalibrateOptions(images=64, split="identity", split_precision="int8")
    report = calibrate(model, data, tmp_path / "o.onnx", options)
    assert {split.form for split in report.splits} == {"identity-scalar"}
    counts = optimized_op_counts((tmp_path / "o.onnx").read_bytes())
    layers = [n for n in read_model(model).graph.node if n.op_type == "Conv"]
    assert counts["QLinearConv"] == len(layers)
    assert counts["QLinearAdd"] == len(report.splits) > 0
    assert not {"Conv", "FusedConv", "Add", "Mul", "DequantizeLinear"} & {
        k for k in counts if counts[k]
    }


def test_the_rest_is_calibrated_without_what_the_relu_hides(tmp_path: Path) -> None:
    net = rep_net(blocks=3)
    for bias in (t for t in net.graph.initializer if re.fullmatch(r"block\d\.bias", t.name)):
        mostly_off = numpy_helper.to_array(bias) - np.float32(30) * (np.arange(bias.dims[0]) % 2)
        bias.CopyFrom(numpy_helper.from_array(mostly_off.astype(np.float32), bias.name))
    model = write_net(tmp_path / "m.onnx", net)
    data = write_images(tmp_path / "d.npz", 64)
    options = CalibrateOptions(
        images=64,
        equalize=False,  # its ranges would have to be known here
        split="identity",
        split_precision="int8",
        threshold=ThresholdOptions("max"),
    )
    report = calibrate(model, data, tmp_path / "o.onnx", options)
    assert report.splits
    nodes = {n.name: n for n in net_from_model(read_model(tmp_path / "o.onnx")).graph.nodes}
    found = {tensor.tensor: tensor for tensor in report.tensors}
    for split in report.splits:
        skip, added = nodes[split.side], nodes[split.sum].outputs[0]
        (x,) = (t for t in found.values() if f"{t.tensor}.q" == skip.inputs[0].name)
        factor = float(constant_of(skip.inputs[1])) / x.scale
        y = found[added.outputs[0].outputs[0].name]
        bound = max(factor * x.maximum, y.maximum)
        rest = found[nodes[split.main].outputs[0].name]
        assert rest.amax <= bound * (1 + 1e-5)
        assert rest.maximum <= bound * (1 + 1e-5)  # of what is left


def test_the_skip_has_the_codes_of_its_layer_under_another_scale(tmp_path: Path) -> None:
    model = write_net(tmp_path / "m.onnx", rep_net(blocks=2))
    data = write_images(tmp_path / "d.npz", 64)
    command = ["calibrate", model, "--data", data, "-n", 64, "-o", tmp_path / "o.onnx"]
    done = CliRunner().invoke(main, [*map(str, command), "--split", "identity-scalar"])
    assert done.exit_code == 0, done.output
    written = onnx.load(str(tmp_path / "o.onnx"))
    net = net_from_model(written)
    splits = json.loads((tmp_path / "o.onnx.json").read_text())["details"]["splits"]
    assert splits
    nodes = {node.name: node for node in net.graph.nodes}
    for split in splits:
        skip = nodes[split["side"]]
        assert skip.op == "DequantizeLinear"
        reads = nodes[split["main"]].inputs[0].inputs[0]  # the DQ of the convolution's input
        assert skip.inputs[0].name == reads.inputs[0].name
        assert constant_of(skip.inputs[1]) != constant_of(reads.inputs[1])
    found = CliRunner().invoke(main, ["lint", str(tmp_path / "o.onnx")])
    assert found.exit_code == 0, found.output


def test_coarse_fine_with_int8_summands_wants_unequalized_channels() -> None:
    with pytest.raises(Exception, match="equalize=False"):
        CalibrateOptions(split="coarse-fine", split_precision="int8")
    assert CalibrateOptions(split="coarse-fine", split_precision="int8", equalize=False)


def conv_node(weight: np.ndarray, stride: int = 1) -> gs.Node:
    x, w = gs.Variable("x", np.float32), gs.Constant("w", weight.astype(np.float32))
    attrs = {"pads": [weight.shape[2] // 2] * 4, "strides": [stride] * 2}
    return gs.Node("Conv", "conv", attrs, [x, w], [gs.Variable("y", np.float32)])


@pytest.mark.parametrize(
    ("centre", "others", "identity", "coarse"),
    [
        (1.0, 0.9, False, False),  # steps fall to 0.9: 0.9 dB
        (1.0, 0.6, True, False),  # 4.4 dB: enough for one rounded summand, not for two
        (1.0, 0.4, True, True),  # 8 dB
        (-1.0, 0.4, False, True),  # no positive factor
    ],
)
def test_int8_summands_have_to_bring_what_their_rounding_costs(
    centre: float, others: float, identity: bool, coarse: bool
) -> None:
    weight = np.zeros((4, 4, 3, 3))
    weight[:, :, 0, 0] = others
    weight[range(4), range(4), 1, 1] = centre
    node = conv_node(weight)
    grid, rounding = Grid.weight(8), "rounding the INT8 summands would add more"
    for form, pays in (("identity-scalar", identity), ("coarse-fine", coarse)):
        reason = int8_obstacle(node, form, grid)
        if pays:
            assert reason is None
        elif centre < 0:
            assert reason == "no positive factor leaves smaller steps"
        else:
            assert rounding in (reason or "")


@pytest.mark.parametrize(
    ("form", "node", "reason"),
    [
        ("identity-scalar", conv_node(np.ones((4, 4, 3, 3)), stride=2), "stride: "),
        ("coarse-fine", conv_node(np.ones((4, 4, 1, 1))), "a 1x1 kernel is all centre"),
    ],
    ids=["stride", "1x1"],
)
def test_a_layer_that_cannot_be_split_says_so_for_int8_summands_too(
    form: Any, node: gs.Node, reason: str
) -> None:
    assert (int8_obstacle(node, form, Grid.weight(8)) or "").startswith(reason)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["identity", "coarse-fine"])
def test_layers_for_which_it_does_not_pay_stay_whole(form: Any, tmp_path: Path) -> None:
    model = write_net(tmp_path / "m.onnx", rep_net(blocks=3))
    data = write_images(tmp_path / "d.npz", 64)
    options = CalibrateOptions(images=64, split=form, split_precision="int8", equalize=False)
    report = calibrate(model, data, tmp_path / "o.onnx", options)
    assert {split.layer for split in report.splits} == {f"block{i}" for i in range(3)}
    whole = calibrate(model, data, tmp_path / "f.onnx", replace(options, split_precision="float"))
    stem = {"coarse-fine": {"stem"}, "identity": set()}[form]
    assert {split.layer for split in whole.splits} == {f"block{i}" for i in range(3)} | stem
