"""Affines (QPRep): put in they change nothing, folded away they leave codes and outputs alone."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reptrt.core.grid import Grid
from reptrt.graph.affines import read_affines
from reptrt.graph.net import Net, constant_of, model_from_net, net_from_model, producer_of
from reptrt.graph.quantized import plan_from_net
from reptrt.graph.splits import read_splits
from reptrt.rewrite.fold_affine import fold_affine
from reptrt.rewrite.insert_affine import insert_affine
from reptrt.rewrite.split_coarse_fine import split_coarse_fine
from reptrt.rewrite.split_identity import split_identity
from tests.support.helpers import ort_run
from tests.support.onnx_nets import Builder, basic_block, plain_chain
from tests.support.qdq_nets import images, quantized, residual_net

SPLITS = ("none", "identity", "identity-scalar", "coarse-fine")


def split(net: Net, layers: Sequence[str], how: str, precision: str = "float") -> None:
    grid = Grid.weight(8)
    if how in ("identity", "identity-scalar"):
        split_identity(net, layers, grid=grid, form=how, precision=precision)
    elif how != "none":
        split_coarse_fine(net, layers, grid=grid, precision=precision)  # type: ignore


def outputs_of(net: Net, x: np.ndarray) -> np.ndarray:
    (found,) = ort_run(model_from_net(net.copy()), {"x": x}, optimize=False).values()
    return found


def set_affines(net: Net, seed: int) -> dict[str, np.ndarray]:
    """Give every affine random gains, about a third negative and a sixth 0, and random shifts."""
    rng = np.random.default_rng(seed)
    tensors, gains = net.graph.tensors(), {}
    for affine in read_affines(net):
        gain, shift = tensors[affine.gain], tensors[affine.shift]
        values = rng.uniform(0.5, 2.0, gain.shape) * rng.choice([1, 1, 1, -1, -1, 0], gain.shape)
        gain.values = values.astype(np.float32)
        shift.values = rng.standard_normal(shift.shape).astype(np.float32)
        gains[affine.layer] = gain.values.reshape(-1)
    return gains


def quantized_weights(net: Net) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """Return node -> codes, scales, axis of every quantized weight."""
    found = {}
    for node in net.graph.nodes:
        if node.op not in ("Conv", "Gemm") or isinstance(node.inputs[1], gs.Constant):
            continue
        dequantize = producer_of(node.inputs[1])
        codes, scale, zero_point = (constant_of(tensor) for tensor in dequantize.inputs)
        assert codes.dtype == zero_point.dtype == np.int8
        assert not zero_point.any()
        found[node.name] = (codes, scale, int(dequantize.attrs["axis"]))
    return found


def close(got: np.ndarray, wanted: np.ndarray) -> None:
    """Equal to the rounding of float32 sums of at most 200 products in another order."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@st.composite
def layers(draw: st.DrawFn) -> tuple[onnx.ModelProto, np.ndarray]:
    """One layer, alone between the quantized image and a ReLU: no later code can flip."""
    b = Builder(channels=4, size=6, seed=draw(st.integers(0, 99)))
    bias = draw(st.booleans())
    if draw(st.booleans()):
        group = draw(st.sampled_from([1, 2, 4]))
        outputs = draw(st.sampled_from([4, 8]))
        size = draw(st.sampled_from([1, 3]))
        b.conv(
            "x", outputs, "layer", size, group=group, strides=[draw(st.sampled_from([1, 2]))] * 2
        )
    else:
        b.node("GlobalAveragePool", ["x"], "pool")
        b.gemm(b.node("Flatten", ["pool"], "flat"), 5, "layer")
        if draw(st.booleans()):  # transB = 0
            layer = b.nodes[-1]
            layer.attribute.remove(layer.attribute[0])
            (weight,) = (tensor for tensor in b.constants if tensor.name == "layer.weight")
            turned = np.ascontiguousarray(onnx.numpy_helper.to_array(weight).T)
            weight.CopyFrom(onnx.numpy_helper.from_array(turned, weight.name))
    if not bias:
        b.nodes[-1].input.pop()
    return b.model(b.relu("layer")), images(3, 4, 6, seed=draw(st.integers(0, 99)))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(case=layers(), how=st.sampled_from(SPLITS), codes=st.booleans(), seed=st.integers(0, 99))
def test_in_and_out_again(
    case: tuple[onnx.ModelProto, np.ndarray], how: str, codes: bool, seed: int
) -> None:
    model, x = case
    net = net_from_model(model)
    split(net, ["layer"], how)
    if codes:
        net = net_from_model(quantized(model_from_net(net), x))
    before, plain, ops = outputs_of(net, x), quantized_weights(net), op_counts(net)

    report = insert_affine(net)
    assert report.changed == ("layer",)
    assert op_counts(net) == ops + Counter(["Mul", "Add"])
    close(outputs_of(net, x), before)

    gain = set_affines(net, seed)["layer"]
    unfolded = outputs_of(net, x)
    if np.any(gain != 1):
        assert np.abs(unfolded - before).max() > 0
    assert quantized_weights(net).keys() == plain.keys()
    assert fold_affine(net, plan_from_net(net))[0].changed == ("layer",)
    close(outputs_of(net, x), unfolded)
    assert op_counts(net) == ops
    assert not [key for key in net.metadata if "affine" in key]
    assert not [name for name in net.graph.tensors() if "gain" in name or "shift" in name]
    for name, (found, scale, axis) in quantized_weights(net).items():
        old_codes, old_scale, _ = plain[name]
        shape = [-1 if i == axis else 1 for i in range(found.ndim)]
        np.testing.assert_array_equal(found, old_codes * np.sign(gain).reshape(shape).astype(int))
        wanted = np.where(gain == 0, old_scale, np.abs(gain) * old_scale)
        np.testing.assert_array_equal(scale, wanted)  # to the bit, never from weights again


def op_counts(net: Net) -> Counter[str]:
    return Counter(node.op for node in net.graph.nodes)


NETS: dict[str, Callable[[], onnx.ModelProto]] = {
    "chain": plain_chain,
    "residual": basic_block,
    "downsampling": lambda: basic_block(True),
    "everything": residual_net,
}


@pytest.mark.parametrize("how", ["none", "identity", "coarse-fine"])
@pytest.mark.parametrize("name", NETS)
def test_whole_float_nets(name: str, how: str) -> None:
    net, x = net_from_model(NETS[name]()), images()
    split(net, [node.name for node in net.graph.nodes if node.op == "Conv"], how)
    assert how == "none" or read_splits(net)
    before = outputs_of(net, x)
    changed = insert_affine(net).changed
    assert set(changed) == {affine.layer for affine in read_affines(net)}
    assert len(changed) == sum(
        n.op in ("Conv", "Gemm") for n in net_from_model(NETS[name]()).graph.nodes
    )
    close(outputs_of(net, x), before)
    set_affines(net, 3)
    unfolded = outputs_of(net, x)
    fold_affine(net, plan_from_net(net))
    close(outputs_of(net, x), unfolded)


@pytest.mark.parametrize("how", ["none", "identity", "coarse-fine"])
def test_a_whole_quantized_net(how: str) -> None:
    """Float rounding may turn codes of activations: a step here and there."""
    net, x = net_from_model(residual_net()), images()
    split(net, ["a1", "a2", "b2"], how)
    net = net_from_model(quantized(model_from_net(net), x))
    codes = quantized_weights(net)
    assert len(insert_affine(net).changed) == 12
    gains = set_affines(net, 5)
    unfolded = outputs_of(net, x)
    fold_affine(net, plan_from_net(net))
    folded = outputs_of(net, x)
    assert np.linalg.norm(folded - unfolded) < 0.01 * np.linalg.norm(unfolded)
    parts = {s.main: s.layer for s in read_splits(net)} | {
        s.side: s.layer for s in read_splits(net)
    }
    for name, (found, _, axis) in quantized_weights(net).items():
        sign = np.sign(gains[parts.get(name, name)]).astype(np.int8)
        shape = [-1 if i == axis else 1 for i in range(found.ndim)]
        np.testing.assert_array_equal(found, codes[name][0] * sign.reshape(shape))


def test_the_record_survives_the_file_and_nothing_is_inserted_twice() -> None:
    net, x = net_from_model(quantized(plain_chain(), images())), images()
    insert_affine(net)
    set_affines(net, 1)
    wanted = outputs_of(net, x)
    again = net_from_model(model_from_net(net))
    assert read_affines(again) == read_affines(net)
    assert insert_affine(again).changed == ()
    np.testing.assert_array_equal(outputs_of(again, x), wanted)
    assert len(fold_affine(again, plan_from_net(again))[0].changed) == 3
    assert fold_affine(again, plan_from_net(again))[0].changed == ()
    assert insert_affine(again).changed == ("c1", "c2", "head")


@pytest.mark.parametrize("how", ["none", "identity"])
def test_a_bias_that_came_later_is_folded_too(how: str) -> None:
    """Full range puts one into a layer whose affine is kept."""
    b = Builder()
    net, x = net_from_model(b.model(b.relu(b.conv("x", 3, "layer")))), images()
    split(net, ["layer"], how)
    insert_affine(net)
    set_affines(net, 4)
    (conv,) = (node for node in net.graph.nodes if node.op == "Conv")
    conv.inputs.append(gs.Constant("later", np.float32([0.5, -1.0, 2.0])))
    unfolded = outputs_of(net, x)
    fold_affine(net, plan_from_net(net))
    close(outputs_of(net, x), unfolded)


def test_shared_constants_and_taken_names() -> None:
    """Two layers share weight and bias; names that affines would take are taken."""
    b = Builder()
    first = b.relu(b.conv("x", 3, "c1"))
    b.node("Conv", [first, "c1.weight", "c1.bias"], "c2", kernel_shape=[3, 3], pads=[1] * 4)
    b.node("Mul", ["c2", b.constant("c1.gain", np.float32(2))], "c2.bare")
    b.node("Add", ["c2.bare", b.constant("c2.shift", np.float32(1))], "c2.affine.mul")
    for net in (
        net_from_model(b.model("c2.affine.mul")),
        net_from_model(quantized(b.model("c2.affine.mul"), images())),
    ):
        before = outputs_of(net, images())
        insert_affine(net)
        close(outputs_of(net, images()), before)
        set_affines(net, 2)
        unfolded = outputs_of(net, images())
        fold_affine(net, plan_from_net(net))
        folded = outputs_of(net, images())
        assert np.linalg.norm(folded - unfolded) < 0.01 * np.linalg.norm(unfolded)


def test_a_layer_that_the_caller_reads() -> None:
    b = Builder()
    net = net_from_model(b.model(b.conv("x", 4, "c1"), b.relu("c1")))
    x = {"x": images()}
    insert_affine(net)
    set_affines(net, 2)
    unfolded = ort_run(model_from_net(net.copy()), x)
    fold_affine(net, plan_from_net(net))
    folded = ort_run(model_from_net(net), x)
    assert unfolded.keys() == folded.keys() == {"c1", "c1.relu"}
    for name, values in unfolded.items():
        close(folded[name], values)


def computed_weight() -> onnx.ModelProto:
    b = Builder()
    weight = b.node("Sigmoid", [b.parameter("w", 4, 3, 3, 3)], "sigmoid")
    b.node("Conv", ["x", weight], "layer", kernel_shape=[3, 3])
    b.channels["layer"] = 4
    return b.model("layer")


def computed_bias() -> onnx.ModelProto:
    b = Builder()
    bias = b.node("Sigmoid", [b.parameter("b", 4)], "sigmoid")
    b.node("Conv", ["x", b.parameter("w", 4, 3, 3, 3), bias], "layer", kernel_shape=[3, 3])
    return b.model("layer")


def gemm(bias: np.ndarray, **attrs: object) -> onnx.ModelProto:
    b = Builder()
    flat = b.node("Flatten", [b.node("GlobalAveragePool", ["x"], "pool")], "flat")
    b.node("Gemm", [flat, b.parameter("w", 3, 5), b.constant("b", bias)], "layer", **attrs)
    return b.model("layer", batch=4)


REFUSED = {
    "weight": (computed_weight, "its weight is not a constant"),
    "bias": (computed_bias, "its bias is not a constant"),
    "alpha": (lambda: gemm(np.ones(5, np.float32), alpha=0.5), "alpha or beta is not 1"),
    "beta": (lambda: gemm(np.ones(5, np.float32), beta=2.0), "alpha or beta is not 1"),
    "rows": (lambda: gemm(np.ones((4, 1), np.float32)), "its bias is not one value per channel"),
    "matrix": (lambda: gemm(np.ones((4, 5), np.float32)), "its bias is not one value per channel"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_affine_says_why(name: str) -> None:
    make, reason = REFUSED[name]
    net = net_from_model(make())
    before = outputs_of(net, images())
    report = insert_affine(net)
    assert report.changed == ()
    assert [(skip.node, skip.reason) for skip in report.skipped] == [("layer", reason)]
    np.testing.assert_array_equal(outputs_of(net, images()), before)
    assert read_affines(net) == ()


@pytest.mark.parametrize("bias", [np.ones(1), np.ones((1, 5)), np.ones((1, 1)), np.float64(1)])
def test_the_other_forms_of_a_gemm_bias(bias: np.ndarray) -> None:
    net = net_from_model(gemm(np.asarray(bias, np.float32)))
    before = outputs_of(net, images())
    insert_affine(net)
    close(outputs_of(net, images()), before)
    set_affines(net, 0)
    unfolded = outputs_of(net, images())
    fold_affine(net, plan_from_net(net))
    close(outputs_of(net, images()), unfolded)


def test_summands_that_are_quantized_have_no_affine() -> None:
    """Their steps are per tensor: a gain per channel could not be folded through them."""
    net, x = net_from_model(basic_block()), images()
    split(net, ["c2"], "identity", precision="int8")
    net = net_from_model(quantized(model_from_net(net), x))
    report = insert_affine(net)
    assert "c2" not in report.changed
    assert [(skip.node, skip.reason) for skip in report.skipped] == [
        ("c2", "the summands of its split are quantized")
    ]
