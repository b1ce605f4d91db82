"""Where Q/DQ pairs go, on the patterns that TensorRT has rules for."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from reptrt.core.errors import ConfigError
from reptrt.core.grid import Grid
from reptrt.graph.net import Net, model_from_net, net_from_model
from reptrt.graph.placement import Placement, place
from reptrt.graph.splits import read_splits
from reptrt.rewrite.split_coarse_fine import split_coarse_fine
from reptrt.rewrite.split_identity import split_identity
from tests.support.onnx_nets import Builder, basic_block, give_identity, plain_chain, without_names

Pairs = dict[str, set[tuple[str, int]]]


def plan(model: onnx.ModelProto, *exclude: str) -> Placement:
    return place(net_from_model(model), exclude)


def pairs(placement: Placement) -> Pairs:
    """Return tensor -> who reads its Q/DQ pair."""
    return {a.tensor: set(a.readers) for a in placement.activations}


def groups(placement: Placement) -> list[set[str]]:
    """Return the sets of tensors that share one scale."""
    found: dict[int, set[str]] = {}
    for activation in placement.activations:
        found.setdefault(activation.group, set()).add(activation.tensor)
    return sorted(found.values(), key=sorted)


SAME = {"kernel_shape": [3, 3], "pads": [1] * 4}
HEAD = {"pool": {("flat", 0)}}  # Flatten moves values: the pair goes before it


@pytest.mark.parametrize("value", [0.0, 1.0], ids=["zeros", "ones"])
def test_the_pair_goes_before_a_pad_of_zeros_only(value: float) -> None:
    b = Builder()
    pads = b.constant("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1], dtype=np.int64))
    padded = b.node("Pad", ["x", pads, b.constant("value", np.array(value, np.float32))], "pad")
    placement = plan(b.model(b.conv(padded, 4, "c", pads=[0] * 4)))
    expected = {"x": {("pad", 0)}} if value == 0.0 else {"pad": {("c", 0)}}
    assert pairs(placement) == expected


def test_plain_chain() -> None:
    placement = plan(plain_chain())
    assert pairs(placement) == {
        "x": {("c1", 0)},
        "c1.relu": {("c2", 0)},  # after the ReLU, not between it and the convolution
        "c2.relu": {("pool", 0)},
        **HEAD,
    }
    assert [(w.node, w.axis) for w in placement.weights] == [("c1", 0), ("c2", 0), ("head", 0)]
    assert len(groups(placement)) == len(placement.activations)


def test_basic_block_quantizes_the_skip_only() -> None:
    assert pairs(plan(basic_block())) == {
        "x": {("stem", 0)},
        "stem.relu": {("c1", 0), ("add", 1)},  # one pair, read by the block and the skip
        "c1.relu": {("c2", 0)},  # c2 itself has none: TensorRT fuses c2, the Add and the ReLU
        "add.relu": {("pool", 0)},
        **HEAD,
    }


def test_downsample_block_quantizes_the_cheaper_convolution() -> None:
    found = pairs(plan(basic_block(downsample=True)))
    assert found["down"] == {("add", 1)}
    assert "c2" not in found
    assert found["stem.relu"] == {("c1", 0), ("down", 0)}


def test_order_of_the_operands_does_not_matter() -> None:
    model = basic_block(downsample=True)
    (add,) = (node for node in model.graph.node if node.op_type == "Add")
    add.input[:] = list(reversed(add.input))
    found = pairs(plan(model))
    assert found["down"] == {("add", 0)}
    assert "c2" not in found


def test_an_add_of_two_activations_gets_two_pairs() -> None:
    b = Builder()
    left, right = b.relu(b.conv("x", 8, "a")), b.relu(b.conv("x", 8, "b"))
    model = b.model(b.head(b.node("Add", [left, right], "add")))
    found = pairs(plan(model))
    assert found["a.relu"] == {("add", 0)}
    assert found["b.relu"] == {("add", 1)}


def test_a_convolution_that_is_read_twice_is_not_fused_with_the_add() -> None:
    b = Builder()
    main = b.conv("x", 8, "a")
    total = b.node("Add", [main, b.relu(b.node("MaxPool", [main], "m", **SAME))], "add")
    found = pairs(plan(b.model(b.head(total))))
    assert found["a"] == {("add", 0)}
    assert found["m.relu"] == {("add", 1)}


def test_an_add_at_the_output_stays_in_float() -> None:
    b = Builder()
    stem = b.relu(b.conv("x", 8, "a"))
    found = pairs(plan(b.model(b.node("Add", [b.conv(stem, 8, "b"), stem], "add"))))
    assert found == {"x": {("a", 0)}, "a.relu": {("b", 0)}}


def test_a_constant_added_is_no_residual() -> None:
    b = Builder()
    y = b.node("Add", [b.conv("x", 8, "a"), b.parameter("shift", 8, 1, 1)], "add")
    assert set(pairs(plan(b.model(b.head(b.relu(y)))))) == {"x", "add.relu", "pool"}


# A residual Add of a split layer's sum ------------------------------------------------------------

FORMS = ["identity", "identity-scalar", "coarse-fine"]


def split_block(form: str, layer: str, *, precision: str = "float", turned: bool = False) -> Net:
    """A block whose Add has a large convolution and a small one; one of them is split."""
    b = Builder()
    stem = b.relu(b.conv("x", 8, "stem"))
    main = b.conv(b.relu(b.conv(stem, 8, "c1")), 8, "large", size=5)
    operands = [main, b.conv(stem, 8, "small")]
    add = b.node("Add", operands[::-1] if turned else operands, "add")
    net = net_from_model(b.model(b.head(b.relu(add))))
    return split(net, form, layer, precision)


def split(net: Net, form: str, layer: str, precision: str = "float") -> Net:
    grid = Grid.weight(8)
    if form == "coarse-fine":
        report = split_coarse_fine(net, [layer], grid=grid, precision=precision)
    else:
        give_identity(net, [layer])
        report = split_identity(net, [layer], grid=grid, form=form, precision=precision)
    assert report.changed == (layer,)
    return net_from_model(model_from_net(net))


def parts_read(net: Net, tensor: str) -> set[tuple[str, int]]:
    """Both parts of the split layer, which read one pair."""
    (found,) = read_splits(net)
    nodes = {node.name: node for node in net.graph.nodes}
    return {
        (name, [t.name for t in nodes[name].inputs].index(tensor))
        for name in (found.main, found.side)
    }


@pytest.mark.parametrize("form", FORMS)
def test_a_split_layer_before_a_residual_add(form: str) -> None:
    """The sum, the Add and the ReLU are one pass, as the layer was: only the skip has a pair."""
    net = split(net_from_model(basic_block()), form, "c2")
    assert pairs(place(net)) == {
        "x": {("stem", 0)},
        "stem.relu": {("c1", 0), ("add", 1)},
        "c1.relu": parts_read(net, "c1.relu"),
        "add.relu": {("pool", 0)},
        **HEAD,
    }


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", ["large", "small"])
def test_of_two_convolutions_the_larger_absorbs_the_add_split_or_not(
    layer: str, form: str, turned: bool
) -> None:
    net = split_block(form, layer, turned=turned)
    found = pairs(place(net))
    readers = parts_read(net, {"large": "c1.relu", "small": "stem.relu"}[layer])
    others = {"large": {("small", 0)}, "small": {("large", 0)}}[layer]
    assert found == {
        "x": {("stem", 0)},
        "stem.relu": {("c1", 0)} | (readers if layer == "small" else others),
        "c1.relu": readers if layer == "large" else others,
        "small": {("add", 0 if turned else 1)},
        "add.relu": {("pool", 0)},
        **HEAD,
    }


@pytest.mark.parametrize("form", ["identity", "coarse-fine"])
def test_int8_summands_before_a_residual_add(form: str) -> None:
    """Each summand has a pair; between their sum and the Add there is none."""
    net = split_block(form, "large", precision="int8")
    found = pairs(place(net))
    (total,) = (split.sum for split in read_splits(net))
    assert {(total, 0), (total, 1)} <= set.union(*found.values())
    assert "large" not in found
    assert found["small"] == {("add", 1)}


@pytest.mark.parametrize("form", FORMS)
def test_a_sum_that_is_read_twice_is_not_fused_with_the_add(form: str) -> None:
    b = Builder()
    main = b.conv(b.relu(b.conv("x", 8, "stem")), 8, "a")
    total = b.node("Add", [main, b.relu(b.node("MaxPool", [main], "m", **SAME))], "add")
    net = split(net_from_model(b.model(b.head(total))), form, "a")
    found = pairs(place(net))
    assert found["a"] == {("add", 0)}
    assert found["m.relu"] == {("add", 1)}


def test_concat_has_one_scale() -> None:
    b = Builder()
    stem = b.relu(b.conv("x", 8, "stem"))
    left, right = b.relu(b.conv(stem, 8, "a")), b.relu(b.conv(stem, 4, "b"))
    cat = b.node("Concat", [left, right, stem], "cat", axis=1)
    b.channels[cat] = 20
    placement = plan(b.model(b.head(b.relu(b.conv(cat, 8, "last")))))
    found = pairs(placement)
    assert found["cat"] == {("last", 0)}
    assert found["a.relu"] == {("cat", 0)}
    assert found["b.relu"] == {("cat", 1)}
    assert found["stem.relu"] == {("a", 0), ("b", 0), ("cat", 2)}
    together = {"a.relu", "b.relu", "stem.relu", "cat"}
    assert groups(placement) == sorted([together, {"x"}, {"last.relu"}, {"pool"}], key=sorted)


def test_concats_in_a_chain_share_one_scale() -> None:
    b = Builder()
    first = b.relu(b.conv("x", 4, "a"))
    second = b.relu(b.conv(first, 4, "b"))
    inner = b.node("Concat", [first, second], "c1", axis=1)
    b.channels[inner] = 8
    third = b.relu(b.conv(inner, 4, "c"))
    outer = b.node("Concat", [inner, third], "c2", axis=1)
    b.channels[outer] = 12
    placement = plan(b.model(b.head(b.relu(b.conv(outer, 4, "d")))))
    assert {"a.relu", "b.relu", "c1", "c.relu", "c2"} in groups(placement)


def test_spatial_pyramid_pooling_shares_the_scale_of_its_input() -> None:
    b = Builder()
    y = b.relu(b.conv("x", 4, "a"))
    pools = [y]
    for i in range(2):
        pools.append(b.node("MaxPool", [pools[-1]], f"m{i}", kernel_shape=[5, 5], pads=[2] * 4))
    cat = b.node("Concat", pools, "cat", axis=1)
    b.channels[cat] = 12
    placement = plan(b.model(b.head(b.relu(b.conv(cat, 4, "last")))))
    found = pairs(placement)
    # one pair at the tensor where the values were made; the pools read it
    assert {("cat", 0), ("m0", 0)} <= found["a.relu"]
    assert "m0" not in found
    assert "m1" not in found
    assert {"a.relu", "cat"} in groups(placement)


def test_a_concat_of_outputs_stays_in_float() -> None:
    b = Builder()
    cat = b.node("Concat", [b.conv("x", 4, "a"), b.conv("x", 4, "b")], "cat", axis=1)
    assert pairs(plan(b.model(cat))) == {"x": {("a", 0), ("b", 0)}}


def test_max_pool_commutes() -> None:
    b = Builder()
    y = b.node("MaxPool", [b.relu(b.conv("x", 4, "a"))], "pool1", kernel_shape=[2, 2])
    found = pairs(plan(b.model(b.head(b.relu(b.conv(y, 4, "b"))))))
    assert found["a.relu"] == {("pool1", 0)}
    assert "pool1" not in found


def average(b: Builder, x: str, form: str) -> str:
    if form == "global":
        return b.node("GlobalAveragePool", [x], "mean")
    if form == "window":
        return b.node("AveragePool", [x], "mean", kernel_shape=[2, 2])
    axes = b.constant("axes", np.int64([-1, -2] if form == "negative axes" else [2, 3]))
    return b.node("ReduceMean", [x, axes], "mean", keepdims=1)


@pytest.mark.parametrize("form", ["global", "window", "reduce", "negative axes"])
def test_averaging_pools_read_a_pair(form: str) -> None:
    b = Builder()
    y = average(b, b.relu(b.conv("x", 4, "a")), form)
    found = pairs(plan(b.model(b.conv(y, 4, "b", size=1))))
    assert found["a.relu"] == {("mean", 0)}
    assert found["mean"] == {("b", 0)}


def test_a_mean_over_channels_is_no_pool() -> None:
    b = Builder()
    axes = b.constant("axes", np.int64([1]))
    y = b.node("ReduceMean", [b.relu(b.conv("x", 4, "a")), axes], "mean", keepdims=1)
    b.channels[y] = 1
    assert "a.relu" not in pairs(plan(b.model(b.conv(y, 4, "b"))))


def test_a_pool_of_the_input_stays_in_float() -> None:
    b = Builder()
    y = b.node("AveragePool", ["x"], "mean", kernel_shape=[2, 2])
    assert pairs(plan(b.model(b.conv(y, 4, "a")))) == {"mean": {("a", 0)}}


def test_squeeze_and_excite() -> None:
    b = Builder()
    y = b.relu(b.conv("x", 8, "a"))
    s = b.node("GlobalAveragePool", [y], "squeeze")
    s = b.relu(b.conv(s, 4, "down", size=1))
    s = b.node("Sigmoid", [b.conv(s, 8, "up", size=1)], "gate")
    y = b.conv(b.relu(b.node("Mul", [y, s], "excite")), 8, "b")
    found = pairs(plan(b.model(b.head(b.relu(y)))))
    assert found == {
        "x": {("a", 0)},
        "a.relu": {("squeeze", 0)},  # the Mul reads the float tensor
        "squeeze": {("down", 0)},
        "down.relu": {("up", 0)},
        "excite.relu": {("b", 0)},
        "b.relu": {("pool", 0)},
        **HEAD,
    }


def test_transposed_convolution() -> None:
    b = Builder()
    y = b.relu(b.conv("x", 4, "a"))
    weight = b.parameter("t.weight", 4, 6, 2, 2)
    b.node("ConvTranspose", [y, weight], "t", strides=[2, 2])
    b.channels["t"] = 6
    placement = plan(b.model(b.conv(b.relu("t"), 4, "b")))
    assert pairs(placement)["a.relu"] == {("t", 0)}
    assert ("t", 1) in [(w.node, w.axis) for w in placement.weights]


def test_matmul_head() -> None:
    b = Builder()
    pooled = b.node("GlobalAveragePool", [b.relu(b.conv("x", 6, "a"))], "pool")
    flat = b.node("Flatten", [pooled], "flat")
    y = b.node("MatMul", [flat, b.parameter("w", 6, 5)], "fc")
    placement = plan(b.model(b.node("Add", [y, b.parameter("bias", 5)], "logits")))
    assert pairs(placement) == {"x": {("a", 0)}, "a.relu": {("pool", 0)}, **HEAD}
    assert [(w.node, w.axis) for w in placement.weights] == [("a", 0), ("fc", 1)]


def test_a_product_of_activations_is_left_alone() -> None:
    b = Builder()
    flat = b.node("Flatten", [b.relu(b.conv("x", 6, "a"))], "flat")
    gram = b.node("MatMul", [flat, b.node("Transpose", [flat], "t")], "gram")
    assert pairs(plan(b.model(gram))) == {"x": {("a", 0)}}


def test_excluded_layers_stay_in_float() -> None:
    placement = plan(basic_block(), r"^c\d$")
    assert placement.excluded == ("c1", "c2")
    assert [w.node for w in placement.weights] == ["stem", "head"]
    found = pairs(placement)
    assert "c1.relu" not in found
    # c2 no longer absorbs the Add, which has two inputs to be quantized now
    assert found["stem.relu"] == {("add", 1)}
    assert found["c2"] == {("add", 0)}


def test_float_nodes_take_their_tail_with_them() -> None:
    """Any node can be named; what is reached only behind it stays in float too."""
    net = net_from_model(basic_block())
    placement = place(net, float_nodes=["^add$"])
    assert placement.float_nodes == ("add", "add.relu", "flat", "head", "pool")
    assert placement.excluded == ("head",)
    assert pairs(placement) == {
        "x": {("stem", 0)},
        "stem.relu": {("c1", 0)},
        "c1.relu": {("c2", 0)},
    }


def test_a_tail_ends_where_other_values_come_in() -> None:
    placement = place(net_from_model(basic_block()), float_nodes=[r"^c1\.relu$"])
    assert placement.float_nodes == ("c1.relu", "c2")
    assert pairs(placement) == {
        "x": {("stem", 0)},
        "stem.relu": {("c1", 0), ("add", 1)},
        "c2": {("add", 0)},  # a float layer: TensorRT does not fuse it with the Add
        "add.relu": {("pool", 0)},
        **HEAD,
    }


def test_float_nodes_say_what_is_wrong_with_a_pattern() -> None:
    net = net_from_model(basic_block())
    with pytest.raises(ConfigError, match=r"float_nodes='no': matches none of 10 nodes \(stem, st"):
        place(net, float_nodes=["no"])
    with pytest.raises(ConfigError, match=r"no layer to quantize \(4 weighted\)"):
        place(net, float_nodes=["stem"])


# Behind the last layer ---------------------------------------------------------------------------


def test_decoded_boxes_stay_in_float() -> None:
    """Reshape, Sigmoid, arithmetic on slices, and a Concat of pixels and scores."""
    b = Builder()
    feature = b.relu(b.conv("x", 8, "body"))
    levels = []
    for level in ("p3", "p4"):
        flat = b.constant(f"{level}.shape", np.array([0, 6, -1]))
        y = b.node("Reshape", [b.conv(feature, 6, level), flat], f"{level}.flat")
        y = b.node("Sigmoid", [y], f"{level}.sigmoid")
        sizes = b.constant(f"{level}.sizes", np.array([2, 2, 2]))
        parts = [f"{level}.{part}" for part in ("centre", "size", "score")]
        b.nodes.append(helper.make_node("Split", [y, sizes], parts, f"{level}.split", axis=1))
        grid = b.constant(f"{level}.grid", np.float32(0.5))
        centre = b.node("Add", [parts[0], grid], f"{level}.add")
        half = b.node("Mul", [parts[1], grid], f"{level}.half")
        corner = b.node("Sub", [centre, half], f"{level}.corner")
        other = b.node("Add", [centre, half], f"{level}.other")  # two tensors, but no residual
        levels.append(b.node("Concat", [corner, other, parts[2]], f"{level}.boxes", axis=1))
    found = pairs(plan(b.model(b.node("Concat", levels, "boxes", axis=2))))
    assert found == {"x": {("body", 0)}, "body.relu": {("p3", 0), ("p4", 0)}}


def test_a_softmax_lets_nothing_through() -> None:
    """The layer behind it reads a pair of its own; the Concat in front of it gets none."""
    b = Builder()
    cat = b.node("Concat", [b.conv("x", 4, "a"), b.conv("x", 4, "b")], "cat", axis=1)
    spread = b.node("Softmax", [cat], "softmax", axis=1)
    b.channels[spread] = 8
    found = pairs(plan(b.model(b.conv(spread, 1, "mean", size=1))))
    assert found == {"x": {("a", 0), ("b", 0)}, "softmax": {("mean", 0)}}


def test_a_residual_behind_a_residual_is_on_the_way() -> None:
    b = Builder()
    x = b.relu(b.conv("x", 8, "stem"))
    first = b.node("Add", [b.conv(x, 8, "a"), x], "add1")
    second = b.node("Add", [b.conv(first, 8, "b"), first], "add2")
    found = pairs(plan(b.model(b.head(second))))
    assert found["stem.relu"] == {("a", 0), ("add1", 1)}
    assert found["add1"] == {("b", 0), ("add2", 1)}


def test_three_summands_have_pairs_on_the_skips_only() -> None:
    """One layer absorbs both sums, so there is no pair between the sums."""
    b = Builder()
    x = b.relu(b.conv("x", 8, "stem"))
    y = b.relu(b.conv(x, 8, "other"))
    inner = b.node("Add", [b.conv(y, 8, "a"), x], "add1")
    found = pairs(plan(b.model(b.head(b.node("Add", [inner, y], "add2")))))
    assert found["stem.relu"] == {("other", 0), ("add1", 1)}
    assert found["other.relu"] == {("a", 0), ("add2", 1)}
    assert "add1" not in found


def test_one_half_of_a_split_goes_to_the_caller() -> None:
    """A pair in front of the Split would round the half that is an output of the net."""
    b = Builder()
    y = b.relu(b.conv("x", 8, "a"))
    b.nodes.append(
        helper.make_node("Split", [y], ["left", "right"], "split", axis=1, num_outputs=2)
    )
    b.channels["left"] = b.channels["right"] = 4
    last = b.relu(b.conv("left", 4, "b"))
    assert pairs(plan(b.model(last, "right"))) == {"x": {("a", 0)}, "left": {("b", 0)}}
    both = b.relu(b.conv("right", 4, "c"))
    assert pairs(plan(b.model(last, both))) == {"x": {("a", 0)}, "a.relu": {("split", 0)}}


def test_a_gather_reads_floats() -> None:
    """Not every TensorRT gathers codes: the pair goes behind it."""
    b = Builder()
    y = b.relu(b.conv("x", 8, "a"))
    y = b.node("Gather", [y, b.constant("order", np.arange(8)[::-1].copy())], "shuffle", axis=1)
    b.channels[y] = 8
    assert pairs(plan(b.model(b.conv(y, 4, "b"))))["shuffle"] == {("b", 0)}


@pytest.mark.parametrize("mode", ["reflect", "edge"])
def test_a_pad_that_repeats_values_commutes(mode: str) -> None:
    b = Builder()
    pads = b.constant("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    y = b.node("Pad", [b.relu(b.conv("x", 4, "a")), pads], "pad", mode=mode)
    b.channels[y] = 4
    found = pairs(plan(b.model(b.conv(y, 4, "b", pads=[0] * 4))))
    assert found == {"x": {("a", 0)}, "a.relu": {("pad", 0)}}


def test_exclude_says_what_is_wrong_with_a_pattern() -> None:
    with pytest.raises(ConfigError, match=r"exclude='nope': matches none of 4 layers \(stem, c1"):
        plan(basic_block(), "nope")
    with pytest.raises(ConfigError, match=r"exclude='\(': not a regular expression"):
        plan(basic_block(), "(")
    with pytest.raises(ConfigError, match=r"no layer to quantize \(4 weighted\)"):
        plan(basic_block(), ".")


def weight_in_a_node(op: str) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    """Return a change that gives every convolution its weight by a Constant or Identity node."""

    def change(model: onnx.ModelProto) -> onnx.ModelProto:
        values = {t.name: t for t in model.graph.initializer}
        for i, conv in reversed(list(enumerate(model.graph.node))):
            if conv.op_type != "Conv":
                continue
            source = conv.input[1]
            conv.input[1] = f"{source}.made"
            if op == "Constant":
                made = helper.make_node(op, [], [f"{source}.made"], value=values[source])
            else:
                made = helper.make_node(op, [source], [f"{source}.made"])
            model.graph.node.insert(i, made)
        return model

    return change


@pytest.mark.parametrize(
    "change",
    [without_names, weight_in_a_node("Constant"), weight_in_a_node("Identity")],
    ids=["unnamed nodes", "weights in Constant nodes", "weights behind Identity"],
)
@pytest.mark.parametrize("downsample", [False, True])
def test_the_form_that_an_exporter_chose_does_not_matter(
    change: Callable[[onnx.ModelProto], onnx.ModelProto], downsample: bool
) -> None:
    model = basic_block(downsample)
    assert plan(change(basic_block(downsample))) == plan(model)


def test_a_quantized_graph_is_refused() -> None:
    b = Builder()
    b.constant("scale", np.float32(0.1))
    b.constant("zero", np.int8(0))
    y = b.node("QuantizeLinear", ["x", "scale", "zero"], "q")
    y = b.node("DequantizeLinear", [y, "scale", "zero"], "dq")
    b.channels[y] = 3
    with pytest.raises(ConfigError, match=r"q: .* quantized already \(QuantizeLinear, 2 such"):
        plan(b.model(b.conv(y, 4, "c")))


def test_a_graph_whose_weights_alone_are_quantized_is_refused() -> None:
    b = Builder()
    b.constants.append(numpy_helper.from_array(np.ones((4, 3, 1, 1), np.int8), "w.q"))
    b.constant("scale", np.float32(0.1))
    weight = b.node("DequantizeLinear", ["w.q", "scale"], "w")
    y = b.node("Conv", ["x", weight], "c1")
    b.channels[y] = 4
    with pytest.raises(ConfigError, match="quantized already"):
        plan(b.model(b.head(b.conv(y, 4, "c2"))))


def test_a_graph_without_layers_is_refused() -> None:
    b = Builder()
    with pytest.raises(ConfigError, match=r"graph net: no layer to quantize \(0 weighted\)"):
        plan(b.model(b.relu("x")))


def test_the_plan_does_not_change_the_net() -> None:
    model = basic_block()
    net = net_from_model(model)
    before = [(n.name, [t.name for t in n.inputs]) for n in net.graph.nodes]
    assert place(net) == place(net)
    assert [(n.name, [t.name for t in n.inputs]) for n in net.graph.nodes] == before


def test_a_shape_put_together_by_a_concat_gets_no_pair() -> None:
    """As exporters of x.view(x.shape[0], -1) write it."""
    b = Builder()
    tensor = b.relu(b.conv("x", 4, "c"))
    b.node("Shape", [tensor], "shape")
    b.node("Gather", ["shape", b.constant("zero", np.array([0], dtype=np.int64))], "batch", axis=0)
    rest = b.constant("rest", np.array([-1], dtype=np.int64))
    b.node("Concat", ["batch", rest], "target", axis=0)
    b.node("Reshape", [tensor, "target"], "flat")
    b.channels["flat"] = 4 * 8 * 8
    placement = plan(b.model(b.gemm("flat", 5, "fc")))
    assert pairs(placement) == {"x": {("c", 0)}, "c.relu": {("flat", 0)}}
