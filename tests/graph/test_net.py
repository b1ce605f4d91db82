"""ONNX in and out: what is refused, what is kept, and that the same model gives the same bytes."""

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import numpy_helper
from onnx_graphsurgeon.logger import G_LOGGER

from reptrt.core.errors import ArtifactError, RewriteError
from reptrt.graph.net import (
    Net,
    bytes_from_model,
    constant_value,
    first_free,
    get_json,
    is_private,
    model_from_net,
    net_from_model,
    producer,
    read_model,
    set_json,
    weighted_nodes,
)
from reptrt.rewrite.naming import name_layers
from tests.support.helpers import ort_run
from tests.support.onnx_nets import Builder, basic_block, plain_chain, without_names

X = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)


def save(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, str(path))
    return path


def external(model: onnx.ModelProto, path: Path) -> Path:
    """Write a model with every weight in ``weights.bin`` beside it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.save_model(
        copy, str(path), save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    return path


def test_read_returns_the_model(tmp_path: Path) -> None:
    assert read_model(save(plain_chain(), tmp_path / "m.onnx")) == plain_chain()


def test_read_resolves_external_data(tmp_path: Path) -> None:
    model = read_model(external(plain_chain(), tmp_path / "m.onnx"))
    (tmp_path / "weights.bin").unlink()
    np.testing.assert_array_equal(
        ort_run(model, {"x": X})["head"], ort_run(plain_chain(), {"x": X})["head"]
    )
    assert not any(tensor.external_data for tensor in model.graph.initializer)


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_external_data_that_is_not_there(tmp_path: Path, damage: str) -> None:
    path = external(plain_chain(), tmp_path / "m.onnx")
    if damage == "gone":
        (tmp_path / "weights.bin").unlink()
    else:
        (tmp_path / "weights.bin").write_bytes(b"123")
    reason = "weights.bin" if damage == "gone" else r"exceeds available data \(3 bytes"
    with pytest.raises(ArtifactError, match=rf"m\.onnx: .*{reason}"):
        read_model(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.onnx", b""),
        ("text.onnx", b"this is not a network\n" * 20),
        ("zip.onnx", b"PK\x03\x04" + bytes(100)),
        ("m.onnx.json", b'{"artifact": "float-onnx"}'),
        ("m.textproto", b"graph {"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_onnx_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{name}: not a readable ONNX file \(.+\)"):
        read_model(tmp_path / name)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no\.onnx does not exist; check the path"):
        read_model(tmp_path / "no.onnx")
    with pytest.raises(ArtifactError, match=r"is a folder, expected an ONNX file"):
        read_model(tmp_path)


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    content = bytes_from_model(plain_chain())
    for length in range(1, len(content), max(1, len(content) // 97)):
        (tmp_path / "cut.onnx").write_bytes(content[:length])
        with pytest.raises(ArtifactError, match=r"cut\.onnx: "):
            read_model(tmp_path / "cut.onnx")


def test_a_graph_without_nodes_is_refused(tmp_path: Path) -> None:
    model = plain_chain()
    del model.graph.node[:]
    del model.graph.output[:]
    model.graph.output.append(model.graph.input[0])
    with pytest.raises(ArtifactError, match="no nodes; expected a network"):
        read_model(save(model, tmp_path / "m.onnx"))


def test_round_trip_keeps_outputs_metadata_and_bytes() -> None:
    model = basic_block()
    onnx.helper.set_model_props(model, {"reptrt.b": "1", "somebody.else": "kept", "a": "0"})
    net = net_from_model(model)
    set_json(net, "preprocess", {"mean": [0.5], "channels": 3})
    assert get_json(net, "preprocess", dict) == {"channels": 3, "mean": [0.5]}
    assert get_json(net, "nothing", dict) is None
    again = model_from_net(net)
    assert {p.key: p.value for p in again.metadata_props}["somebody.else"] == "kept"
    assert [p.key for p in again.metadata_props] == sorted(p.key for p in again.metadata_props)
    np.testing.assert_array_equal(
        ort_run(again, {"x": X})["head"], ort_run(model, {"x": X})["head"]
    )
    assert bytes_from_model(again) == bytes_from_model(model_from_net(net_from_model(again)))


def test_every_node_gets_a_name_of_its_own() -> None:
    model = without_names(basic_block())
    model.graph.node[0].name = model.graph.node[3].name = "twice"
    names = [node.name for node in net_from_model(model).graph.nodes]
    assert len(set(names)) == len(names)
    assert names[:4] == ["twice", "stem.relu", "c1", "twice_1"]
    assert [node.name for node in net_from_model(basic_block()).graph.nodes] == [
        node.name for node in basic_block().graph.node
    ]


def test_a_type_that_numpy_lacks_is_no_word_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    model = plain_chain()
    model.graph.initializer.append(
        onnx.helper.make_tensor("bf", onnx.TensorProto.BFLOAT16, [2], [1.0, 2.0])
    )
    model.graph.node.append(onnx.helper.make_node("Cast", ["bf"], ["cast"], to=1))
    G_LOGGER.once_logged.clear()
    net_from_model(model)
    assert capsys.readouterr().out == ""
    assert G_LOGGER.severity < G_LOGGER.ERROR  # as it was


def test_rewriting_a_net_does_not_reach_into_the_model_it_came_from() -> None:
    b = Builder()
    pooled = b.node("Flatten", [b.node("GlobalAveragePool", ["x"], "pool")], "flat")
    b.node("Gemm", [pooled, b.parameter("w", 5, 3), b.parameter("bias", 5)], "y", transB=1)
    model = b.model("y")
    before = bytes_from_model(model)
    net = net_from_model(model)
    name_layers(net)
    renamed = model_from_net(net)
    assert {t.name for t in renamed.graph.initializer} == {"y.weight", "y.bias"}
    assert bytes_from_model(model) == before


def test_copy_is_independent() -> None:
    net = net_from_model(plain_chain())
    copy = net.copy()
    copy.graph.nodes[0].name = "changed"
    copy.graph.nodes.pop()
    copy.metadata["k"] = "v"
    assert net.graph.nodes[0].name == "c1"
    assert len(net.graph.nodes) == len(copy.graph.nodes) + 1
    assert net.metadata == {}


def test_a_broken_graph_is_a_rewrite_error() -> None:
    net = net_from_model(plain_chain())
    net.graph.nodes[0].op = "Nonsense"
    with pytest.raises(RewriteError, match="invalid ONNX after rewriting"):
        model_from_net(net)


def test_constant_value_looks_through_constant_nodes_and_identities() -> None:
    b = Builder()
    value = np.float32([1.5])
    b.constant("initializer", value)
    b.nodes.append(
        onnx.helper.make_node("Constant", [], ["node"], value=numpy_helper.from_array(value))
    )
    b.nodes.append(onnx.helper.make_node("Identity", ["node"], ["same"]))
    b.channels |= {"initializer": 1, "node": 1, "same": 1}
    y = "x"
    for name in ("initializer", "node", "same"):
        y = b.node("Mul", [y, name], f"by.{name}")
    graph = net_from_model(b.model(y)).graph
    muls = [node for node in graph.nodes if node.op == "Mul"]
    for node in muls:
        np.testing.assert_array_equal(constant_value(node.inputs[1]), value)
        assert constant_value(node.inputs[0]) is None
    assert producer(muls[0].inputs[0]) is None
    assert producer(muls[1].inputs[0]) is muls[0]


def test_weighted_nodes_are_those_with_a_constant_kernel_or_matrix() -> None:
    b = Builder()
    y = b.conv("x", 4, "conv")
    weight = b.parameter("t.weight", 4, 6, 2, 2)
    y = b.node("ConvTranspose", [y, weight], "transposed", strides=[2, 2])
    flat = b.node("Flatten", [b.node("GlobalAveragePool", [y], "pool")], "flat")
    b.channels["flat"] = 6
    m = b.node("MatMul", [flat, b.parameter("matrix", 6, 4)], "matmul")
    b.channels[m] = 4
    v = b.node("MatMul", [m, b.parameter("vector", 4)], "by.vector")
    stack = b.node("MatMul", [m, b.parameter("stack", 2, 4, 3)], "by.stack")
    dynamic = b.node("MatMul", [m, b.node("Transpose", [m], "mt")], "dynamic")
    head = b.gemm(m, 5, "head")
    graph = net_from_model(b.model(v, stack, dynamic, head)).graph
    assert [node.name for node in weighted_nodes(graph)] == [
        "conv",
        "transposed",
        "matmul",
        "head",
    ]


def test_free_names() -> None:
    assert first_free("a", []) == "a"
    assert first_free("a", ["a", "a_1", "b"]) == "a_2"


def test_private_is_one_reader_and_no_output() -> None:
    net = net_from_model(basic_block())
    tensors = net.graph.tensors()
    assert is_private(net.graph, tensors["c1"])
    assert not is_private(net.graph, tensors["stem.relu"])  # the block and its skip
    assert not is_private(net.graph, tensors["head"])  # the caller
    net.graph.outputs.append(tensors["c1"])
    assert not is_private(net.graph, tensors["c1"])


def test_unused_graph_inputs_stay() -> None:
    net = Net(gs.import_onnx(plain_chain()))
    net.graph.inputs.append(gs.Variable("unused", np.float32, [1]))
    assert [value.name for value in model_from_net(net).graph.input] == ["x", "unused"]


def test_fresh_names_are_free_and_given_once() -> None:
    net = net_from_model(plain_chain())
    node, tensor = net.graph.nodes[0].name, next(iter(net.graph.tensors()))
    assert net.fresh_name(node) == f"{node}_1"
    assert net.fresh_name(tensor) == f"{tensor}_1"
    assert [net.fresh_name("new") for _ in range(3)] == ["new", "new_1", "new_2"]
    assert net.copy().fresh_name("new") == "new_3"
    assert net.fresh_name("new") == "new_3"  # the copy has names of its own


def test_the_name_of_what_was_removed_is_free_again() -> None:
    net = net_from_model(plain_chain())
    node = net.graph.nodes[0]
    node.name = "before"
    assert net.fresh_name("before") == "before_1"
    node.name = "after"
    assert net.fresh_name("before") == "before"
    net.fresh_name("before")  # reads the names of the graph anew
    assert net.fresh_name("after") == "after_1"


def test_names_of_a_graph_that_took_the_place_of_another() -> None:
    net = net_from_model(plain_chain())
    net.fresh_name("new")
    net.graph = net_from_model(basic_block()).graph
    node = net.graph.nodes[0].name
    assert [net.fresh_name("new"), net.fresh_name(node)] == ["new", f"{node}_1"]


def test_a_fresh_prefix_is_free_for_every_role() -> None:
    net = net_from_model(plain_chain())
    net.graph.nodes[0].name = "a.two"
    assert [net.fresh_prefix("a", ("one", "two")) for _ in range(2)] == ["a_", "a__"]
    assert net.fresh_prefix("a", ["one"]) == "a"
    assert net.fresh_name("a.one") == "a.one_1"
