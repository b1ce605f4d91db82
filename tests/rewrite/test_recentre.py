"""Recentring is exact: UINT8 codes are those of INT8 plus 128, for any padding and any reader."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from reptrt.core.errors import RewriteError
from reptrt.core.metrics import sqnr_db
from reptrt.execute.lowering import lower
from reptrt.execute.runner import OrtRunner
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import Net, constant_value, model_from_net, net_from_model
from reptrt.graph.placement import place
from reptrt.graph.quantized import plan_from_net
from reptrt.graph.recentred import read_recentred
from reptrt.linter import lint_net
from reptrt.rewrite.recentre import full_range_obstacle, padded_readers, recentre, round_scales
from reptrt.rewrite.to_fp16 import to_fp16
from tests.support.full_range_nets import Case, cases, on_grid, split_net, unsigned
from tests.support.helpers import optimized_op_counts, ort_run
from tests.support.lint_graphs import needs_rtx, refused_by_rtx
from tests.support.onnx_nets import Builder, basic_block, plain_chain
from tests.support.qdq_nets import images, with_outputs


def codes_and_logits(
    model: onnx.ModelProto, tensors: list[str], x: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Run a Q/DQ graph as it is; codes less their zero points, as integers."""
    names = {tensor: f"{tensor}.q" for tensor in tensors}
    found = ort_run(with_outputs(model, list(names.values())), {"x": x}, optimize=False)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    zero = {
        node.output[0]: int(constants[node.input[2]])
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }
    return {t: found[name].astype(int) - zero[name] for t, name in names.items()}, found["head"]


def exact_images(case: Case) -> np.ndarray:
    """Images in multiples of 1/64."""
    size = case.model.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    return np.rint(images(3, size=size) * 64).astype(np.float32) / np.float32(64)


def assert_trt_form(model: onnx.ModelProto) -> None:
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero_point = constants[node.input[2]]
            assert zero_point.dtype == np.int8
            assert not zero_point.any()
    assert not [t for t in constants.values() if t.dtype == np.uint8]


def close(model: onnx.ModelProto, got: np.ndarray, expected: np.ndarray) -> bool:
    """Whether logits differ by no more than a step of the last average: its sum is rounded."""
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    step = float(constants["pool.scale"]) if "pool.scale" in constants else 1e-6
    weight = np.abs(constants["head.weight.q"] * constants["head.weight.scale"][:, None])
    return np.abs(got - expected).max() <= step * weight.sum(axis=1).max() + 1e-4


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(case=cases(), bits=st.sampled_from([8, 8, 8, 5]))
def test_same_codes_in_every_form(case: Case, bits: int) -> None:
    x = exact_images(case)
    net, wanted = unsigned(split_net(case), x, bits=bits)
    assert wanted
    before = model_from_net(net)
    expected, logits = codes_and_logits(before, wanted, x)
    report = recentre(net, plan_from_net(net))
    assert set(report.changed) == set(wanted)
    after = model_from_net(net)
    assert_trt_form(after)
    half = 2 ** (bits - 1)
    got, same = codes_and_logits(after, wanted, x)
    for tensor in wanted:
        np.testing.assert_array_equal(got[tensor] + half, expected[tensor], err_msg=tensor)
        assert got[tensor].min() >= -half
        assert got[tensor].max() < half
    back, lowered = codes_and_logits(lower(after), wanted, x)
    for tensor in wanted:
        np.testing.assert_array_equal(back[tensor], expected[tensor], err_msg=tensor)
    with torch.inference_mode():
        simulated = TorchGraph(after)(torch.from_numpy(x)).numpy()
    for logits_of in (same, lowered, simulated):
        assert close(after, logits_of, logits)


@pytest.mark.slow
def test_the_random_nets_have_all_kinds_of_readers() -> None:
    """What the test above is about does occur in what it draws."""
    seen: dict[str, int] = dict.fromkeys(("layers", "factors", "skips", "added", "clips"), 0)
    adds: set[str] = set()

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(case=cases())
    def look(case: Case) -> None:
        net, _ = unsigned(split_net(case), exact_images(case), bits=5)
        recentre(net, plan_from_net(net))
        for one in read_recentred(net):
            for kind in seen:
                seen[kind] += len(getattr(one, kind))
            adds.update(name.rsplit(".", 1)[-1] for name in one.added)
            adds.update("sum" for name in one.added if name.endswith(".sum.border"))
            adds.add(one.producer.rsplit(".", 1)[-1])

    look()
    assert min(seen.values()) >= 3
    assert {"border", "offset", "sum", "Add", "rest", "fine"} <= adds


def one_conv(weight: np.ndarray, height: int, width: int, **attrs: object) -> Net:
    """x -> Q/DQ UINT8 behind a 1x1 convolution and ReLU -> the convolution "conv"."""
    channels = weight.shape[1] * int(attrs.get("group", 1))
    names = ("first", "act", "act.q", "act.dq", "y")
    x = gs.Variable("x", np.float32, ("N", channels, height, width))
    first, act, q, dq, y = (gs.Variable(name, np.float32) for name in names)
    act.shape = dq.shape = ("N", channels, height, width)
    q.dtype = np.uint8
    y.shape = ("N", weight.shape[0], None, None)
    eye = np.eye(channels, dtype=np.float32)[:, :, None, None]
    pair = [gs.Constant("s", np.array(0.5, np.float32)), gs.Constant("z", np.array(0, np.uint8))]
    nodes = [
        gs.Node("Conv", "maker", {}, [x, gs.Constant("eye", eye)], [first]),
        gs.Node("Relu", "relu", {}, [first], [act]),
        gs.Node("QuantizeLinear", "quantize", {}, [act, *pair], [q]),
        gs.Node("DequantizeLinear", "dequantize", {}, [q, *pair], [dq]),
        gs.Node("Conv", "conv", dict(attrs), [dq, gs.Constant("w", weight)], [y]),
    ]
    return Net(gs.Graph(nodes, [x], [y], opset=19, ir_version=9))


def outside_by_hand(
    weight: np.ndarray, size: tuple[int, int], window: dict[str, list[int]], shape: tuple[int, ...]
) -> np.ndarray:
    """Sum of the weights that meet padding, tap by tap."""
    total = np.zeros(shape)
    for o, h, w, i, k, m in np.ndindex(*shape, *weight.shape[1:]):
        row = h * window["strides"][0] + k * window["dilations"][0] - window["pads"][0]
        column = w * window["strides"][1] + m * window["dilations"][1] - window["pads"][1]
        if not (0 <= row < size[0] and 0 <= column < size[1]):
            total[o, h, w] += float(weight[o, i, k, m])
    return total


WINDOWS = {
    "3x3": ((6, 4, 3, 3), 1, {"strides": [1, 1], "pads": [1, 1, 1, 1], "dilations": [1, 1]}),
    "asymmetric": ((4, 4, 3, 2), 1, {"strides": [2, 1], "pads": [2, 0, 1, 3], "dilations": [1, 2]}),
    "depthwise": ((4, 1, 5, 3), 4, {"strides": [1, 2], "pads": [2, 1, 2, 1], "dilations": [1, 1]}),
    "groups": ((4, 2, 3, 3), 2, {"strides": [2, 2], "pads": [0, 2, 2, 0], "dilations": [2, 1]}),
}


@pytest.mark.parametrize("name", list(WINDOWS))
def test_the_map_is_what_the_border_lacks(name: str) -> None:
    shape, group, window = WINDOWS[name]
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    net = one_conv(weight, 6, 9, group=group, **window)
    (reader,) = padded_readers(net, "act.dq")
    recentre(net, plan_from_net(net))
    (add,) = [node for node in net.graph.nodes if node.name == "conv.border"]
    found = constant_value(add.inputs[1])
    expected = -64.0 * outside_by_hand(weight, (6, 9), window, found.shape[1:])  # c = 128 * 0.5
    np.testing.assert_allclose(found[0], expected, rtol=2**-23, atol=1e-9)  # it is float32
    assert (reader.layer, reader.map_shape) == ("conv", found.shape[1:])
    np.testing.assert_allclose(
        constant_value(add.inputs[0].inputs[0].inputs[2]),
        64.0 * weight.astype(np.float64).sum(axis=(1, 2, 3)),
        atol=1e-4,
    )


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_that_the_runtime_chooses(auto_pad: str, stride: int) -> None:
    weight = np.random.default_rng(1).integers(-4, 5, (3, 2, 4, 3)).astype(np.float32)
    net = one_conv(weight, 5, 6, auto_pad=auto_pad, strides=[stride] * 2)
    x = np.random.default_rng(2).integers(-20, 200, (2, 2, 5, 6)).astype(np.float32)
    before = ort_run(model_from_net(net), {"x": x}, optimize=False)["y"]
    recentre(net, plan_from_net(net))
    assert any(node.op == "Add" for node in net.graph.nodes) == (auto_pad != "VALID")
    np.testing.assert_array_equal(
        ort_run(model_from_net(net), {"x": x}, optimize=False)["y"], before
    )


def test_a_gemm_with_factors_and_no_bias() -> None:
    """y = 2 A B + 3 C, the weight not transposed; and without C."""
    rng = np.random.default_rng(0)
    for bias in ([], [gs.Constant("c", rng.integers(-9, 9, (1, 4)).astype(np.float32))]):
        net = one_conv(np.ones((3, 2, 1, 1), np.float32), 1, 1)
        conv = net.graph.nodes[-1]
        flat, y = gs.Variable("flat", np.float32), gs.Variable("y2", np.float32, ("N", 4))
        weight = gs.Constant("b", rng.integers(-9, 9, (2, 4)).astype(np.float32))
        source = conv.inputs[0]
        conv.inputs.clear()
        net.graph.nodes += [
            gs.Node("Flatten", "flatten", {}, [source], [flat]),
            gs.Node("Gemm", "gemm", {"alpha": 2.0, "beta": 3.0}, [flat, weight, *bias], [y]),
        ]
        net.graph.outputs = [y]
        x = rng.integers(-20, 200, (5, 2, 1, 1)).astype(np.float32)
        before = ort_run(model_from_net(net), {"x": x}, optimize=False)["y2"]
        recentre(net, plan_from_net(net))
        np.testing.assert_allclose(
            ort_run(model_from_net(net), {"x": x}, optimize=False)["y2"], before, rtol=1e-6
        )
        assert_trt_form(model_from_net(net))


def rep_chain(form: str) -> Case:
    """A chain with 3x3, depthwise and split layers, wide enough for narrow kernels not to matter.

    Form: "plain", "split" (coarse-fine, identity) or "depthwise".
    """
    b = Builder(size=8)
    y = b.relu(b.conv("x", 16, "stem"))
    y = b.relu(b.conv(y, 16, "c1", group=16 if form == "depthwise" else 1))
    y = b.relu(b.conv(y, 16, "c2"))
    y = b.node("MaxPool", [y], "pool1", kernel_shape=[2, 2], strides=[2, 2])
    y = b.relu(b.node("Add", [b.conv(y, 16, "c3"), y], "add"))
    y = b.relu(b.conv(y, 16, "c4"))
    case = Case(b.model(b.head(y)))
    if form == "split":
        case.identity, case.scalar, case.coarse_fine = ["c1"], ["c2"], ["c4"]
    return case


@pytest.mark.parametrize("form", ["plain", "split", "depthwise"])
def test_real_scales_fp16_lint_and_engine(form: str) -> None:
    x = images(16, seed=3)
    float_net = split_net(rep_chain(form))
    net, wanted = unsigned(float_net, x, exact=False)
    assert len(wanted) == 5
    reference = ort_run(model_from_net(float_net), {"x": x})["head"]
    _, before = codes_and_logits(model_from_net(net), wanted, x)
    recentre(net, plan_from_net(net))
    model = model_from_net(net)
    _, after = codes_and_logits(model, wanted, x)
    # beside rare codes that fall the other way, scales were rounded to FP16
    assert sqnr_db(before, after) > 35.0
    assert sqnr_db(reference, after) > sqnr_db(reference, before) - 1.5
    half = net.copy()
    to_fp16(half)
    half_model = model_from_net(half)
    assert_trt_form(half_model)
    assert sqnr_db(after, codes_and_logits(half_model, wanted, x)[1]) > 33.0
    lowered = ort_run(lower(half_model), {"x": x}, optimize=False)["head"]
    assert sqnr_db(after, lowered) > 33.0
    for graph in (net, half):
        found = [f for f in lint_net(graph).findings if f.severity != "info"]
        assert not [f for f in found if f.rule != "QDQ205"], found


@needs_rtx
@pytest.mark.parametrize("form", ["plain", "split", "depthwise"])
def test_tensorrt_rtx_builds_it(form: str) -> None:
    net, _ = unsigned(split_net(rep_chain(form)), images(8), exact=False)
    recentre(net, plan_from_net(net))
    to_fp16(net)
    assert not refused_by_rtx(model_from_net(net))


def test_scales_are_what_fp16_holds() -> None:
    """FP16 rounds scales; rounded before, the offset and what makes up for it agree there too."""
    net, _ = unsigned(split_net(rep_chain("plain")), images(8), exact=False)
    rounded, plan = net.copy(), plan_from_net(net)
    recentre(rounded, round_scales(rounded, plan))
    recentre(net, plan)
    changed = 0
    for one, other in zip(read_recentred(rounded), read_recentred(net), strict=True):
        scale = one.offset / one.code
        assert scale == float(np.float16(scale))
        assert abs(one.offset - other.offset) <= 2.0**-11 * other.offset
        changed += one.offset != other.offset
    assert changed
    offsets = {one.quantize: one.offset / one.code for one in read_recentred(rounded)}
    to_fp16(rounded)
    for node in rounded.graph.nodes:
        if node.name in offsets:
            assert float(constant_value(node.inputs[1])) == offsets[node.name]


def test_full_range_halves_the_step() -> None:
    """What it is for: half the step, 6 dB at most, where little but activations is rounded."""
    b = Builder(size=8)
    y = b.relu(b.conv(b.relu(b.conv("x", 8, "c1")), 8, "c2"))
    flat = b.node("Flatten", [b.relu(b.conv(y, 8, "c3"))], "flat")
    b.channels[flat] = 8 * 8 * 8
    float_net = split_net(Case(on_grid(b.model(b.gemm(flat, 5, "head")))))
    x = np.rint(images(32, seed=3) * 16).astype(np.float32) / np.float32(16)
    reference = ort_run(model_from_net(float_net), {"x": x})["head"]
    found = []
    for leave in ([], [a.tensor for a in place(float_net).activations]):
        net, wanted = unsigned(float_net, x, leave=leave)
        recentre(net, plan_from_net(net))
        logits = ort_run(model_from_net(net), {"x": x}, optimize=False)["head"]
        found.append((len(wanted), sqnr_db(reference, logits)))
    assert [count for count, _ in found] == [3, 0]
    assert 4.0 < found[0][1] - found[1][1] < 6.5


def test_lowered_runs_in_int8_without_clips() -> None:
    net, _ = unsigned(split_net(Case(plain_chain())), images(), exact=False)
    recentre(net, plan_from_net(net))
    counts = optimized_op_counts(model_from_net(net).SerializeToString())
    assert (counts["QLinearConv"], counts["QGemm"]) == (2, 1)
    assert not [op for op in ("Conv", "FusedConv", "Relu", "Clip", "Add") if counts[op]]
    x = images(8, seed=2)
    plain = ort_run(model_from_net(net), {"x": x}, optimize=False)["head"]
    with OrtRunner(model_from_net(net).SerializeToString(), threads=1) as runner:
        np.testing.assert_allclose(runner.run(x)["head"], plain, atol=0.05)


def test_a_record_that_does_not_fit_changes_nothing() -> None:
    """A node was renamed since: the graph stays recentred, and right."""
    net, wanted = unsigned(split_net(Case(basic_block())), images(), exact=False)
    recentre(net, plan_from_net(net))
    next(node for node in net.graph.nodes if node.name == "c1").name = "renamed"
    model = model_from_net(net)
    x = images(8, seed=2)
    expected, logits = codes_and_logits(model, wanted, x)
    got, same = codes_and_logits(lower(model), wanted, x)
    shifted = {t for t in wanted if got[t].max() > 127}
    assert shifted
    assert shifted < set(wanted)
    for tensor in wanted:
        difference = got[tensor] - 128 * (tensor in shifted) - expected[tensor]
        assert np.abs(difference).max() <= 1
        assert (difference != 0).mean() < 1e-2
    np.testing.assert_allclose(same, logits, atol=0.05)


def test_nothing_to_do() -> None:
    net, _ = unsigned(split_net(Case(plain_chain())), images(), leave=["c1.relu", "c2.relu"])
    before = model_from_net(net).SerializeToString(deterministic=True)
    assert recentre(net, plan_from_net(net)).changed == ()
    assert model_from_net(net).SerializeToString(deterministic=True) == before


def obstacle(b: Builder, *outputs: str, tensor: str = "c1.relu", batch: str = "N") -> str | None:
    net = net_from_model(b.model(*outputs, batch=batch))
    return full_range_obstacle(net, place(net), tensor)


def test_what_stands_in_the_way() -> None:
    """One reason each; without it there is none."""
    b = Builder()
    y = b.relu(b.conv("x", 8, "c1"))
    assert obstacle(b, b.head(b.relu(b.conv(y, 8, "c2")))) is None
    assert "made by the caller" in str(obstacle(b, "head", tensor="x"))
    assert "no Q/DQ pair" in str(obstacle(b, "head", tensor="c1"))
    assert "read in float" in str(obstacle(b, "head", "c1.relu"))
    assert "made by GlobalAveragePool" in str(obstacle(b, "head", tensor="pool"))
    assert "c1, before it, is read by others" in str(obstacle(b, "head", "c1"))


def test_readers_that_cannot_make_up_for_it() -> None:
    b = Builder()
    y = b.relu(b.conv("x", 8, "c1"))
    pads = b.constant("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1], dtype=np.int64))
    padded = b.node("Pad", [y, pads], "pad")
    assert "Pad pad puts zeros" in str(obstacle(b, b.head(b.conv(padded, 8, "c2", pads=[0] * 4))))
    b = Builder()
    y = b.relu(b.conv("x", 8, "c1"))
    cat = b.node("Concat", [y, b.relu(b.conv("x", 8, "other"))], "cat", axis=1)
    b.channels[cat] = 16
    assert "Concat" in str(obstacle(b, b.head(b.relu(b.conv(cat, 8, "c2")))))
    b = Builder()
    y = b.relu(b.conv("x", 8, "c1"))
    both = b.relu(b.node("Add", [y, b.relu(b.conv("x", 8, "other"))], "add"))
    assert "other summand of add is INT8" in str(obstacle(b, b.head(b.conv(both, 8, "c2"))))
    b = Builder()
    y = b.relu(b.conv("x", 8, "c1"))
    pooled = b.node("AveragePool", [y], "mean", kernel_shape=[3, 3], pads=[1] * 4)
    assert "AveragePool mean pads" in str(obstacle(b, b.head(b.conv(pooled, 8, "c2"))))
    b = Builder()
    y = b.relu(b.node("Sigmoid", [b.conv("x", 8, "c1")], "gate"))
    reason = obstacle(b, b.head(b.conv(y, 8, "c2")), tensor="gate.relu")
    assert "Sigmoid gate takes no constant" in str(reason)


@pytest.mark.parametrize("form", ["identity", "coarse_fine"])
def test_int8_summands(form: str) -> None:
    b = Builder()
    y = b.relu(b.conv(b.relu(b.conv("x", 8, "c1")), 8, "c2"))
    case = Case(b.model(b.head(b.relu(b.conv(y, 8, "c3")))), **{form: ["c2"]})
    net = split_net(case, precision="int8")
    placement = place(net)
    before = full_range_obstacle(net, placement, "c1.relu")
    behind = full_range_obstacle(net, placement, "c2.relu")
    assert "no summand of c2.sum has a bias" in str(behind)
    assert (before is None) == (form == "coarse_fine")
    if form == "identity":
        assert "INT8" in str(before)
        return
    x = images(8)  # the parts are quantized one by one, so each gets its own map
    quantized, wanted = unsigned(net, x, exact=False)
    assert wanted == ["c1.relu", "c3.relu"]
    _, expected = codes_and_logits(model_from_net(quantized), wanted, x)
    recentre(quantized, plan_from_net(quantized))
    assert [node.name for node in quantized.graph.nodes if "border" in node.name] == [
        "c2.fine.border"
    ]
    _, got = codes_and_logits(model_from_net(quantized), wanted, x)
    assert sqnr_db(expected, got) > 35.0


def test_a_free_height_and_width() -> None:
    """Padding needs a fixed size, a 1x1 convolution does not."""
    for size, reason in ((3, "height and width are not fixed"), (1, None)):
        b = Builder()
        y = b.relu(b.conv("x", 8, "c1"))
        model = b.model(b.head(b.relu(b.conv(y, 8, "c2", size=size))))
        dims = model.graph.input[0].type.tensor_type.shape.dim
        dims[2].dim_param, dims[3].dim_param = "H", "W"
        del model.graph.value_info[:]
        model = onnx.shape_inference.infer_shapes(model)
        net = net_from_model(model)
        found = full_range_obstacle(net, place(net), "c1.relu")
        assert (found is None) if reason is None else reason in str(found)
        readers = [(r.layer, r.map_shape) for r in padded_readers(net, "c1.relu")]
        assert readers == ([] if reason is None else [("c2", None)])


def test_a_pair_that_cannot_be_recentred_is_refused() -> None:
    net = one_conv(np.ones((2, 2, 3, 3), np.float32), 5, 5, pads=[1] * 4)
    conv = next(node for node in net.graph.nodes if node.name == "conv")
    conv.inputs[0].shape = ("N", 2, "H", "W")
    before = model_from_net(net.copy()).SerializeToString(deterministic=True)
    with pytest.raises(RewriteError, match=r"act: cannot have all 256 codes .*conv pads it with"):
        recentre(net, plan_from_net(net))
    assert model_from_net(net.copy()).SerializeToString(deterministic=True) == before
