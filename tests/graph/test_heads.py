"""Where the float tail of a detector begins."""

import numpy as np
import onnx
import pytest
import torch

from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.heads import decoding_of, heads_of
from reptrt.graph.net import net_from_model, weighted_nodes
from tests.support.detector_nets import FORMS, SIZE, detector
from tests.support.onnx_nets import Builder
from tests.support.qdq_nets import images, quantized

BOTH = ("0", "1")  # levels
HEADS = {
    "yolov6": ({"boxes.low", "boxes.high"}, {"scores.turned"}),
    "yolox": (
        {f"reg.{level}" for level in BOTH},
        {f"{name}.{level}.p" for name in ("obj", "cls") for level in BOTH},
    ),
    "yolov5": (
        {f"{name}.{level}" for name in ("xy", "wh") for level in BOTH},
        {f"conf.{level}" for level in BOTH},
    ),
    "yolov8": ({"bins.p"}, {"scores"}),
    "ssd": ({"boxes.low", "boxes.high"}, {"scores"}),
    "centres": ({"size"}, {"heat"}),
}


def found(model: onnx.ModelProto) -> tuple[set[str], set[str]]:
    heads = heads_of(net_from_model(model))
    assert len(heads.names) == len(set(heads.names))
    scores = {name for name in heads.names if heads.scores[name]}
    return set(heads.names) - scores, scores


@pytest.mark.parametrize("form", FORMS)
def test_heads_of_families(form: str) -> None:
    assert found(detector(form)) == HEADS[form]


@pytest.mark.parametrize("form", FORMS)
def test_the_outputs_are_computed_from_the_heads_alone(form: str) -> None:
    net = net_from_model(detector(form))
    graph = TorchGraph(net)
    x = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    names = heads_of(net).names
    values = graph.run({"x": x}, [*graph.output_names, *names])
    # Neither the image nor a tensor before the heads is given.
    again = graph.run({name: values[name] for name in names}, graph.output_names)
    for name in graph.output_names:
        assert torch.equal(again[name], values[name])


@pytest.mark.parametrize("form", FORMS)
def test_every_layer_lies_before_the_heads(form: str) -> None:
    net = net_from_model(detector(form))
    net.graph.cleanup()  # the second level of "centres" leads nowhere
    names = heads_of(net).names
    graph = TorchGraph(net)
    layers = {node.name for node in weighted_nodes(net.graph)}
    run: set[str] = set()
    steps = {name: step for step in graph.steps for name in step.outputs}
    pending = list(names)
    while pending:
        step = steps.get(pending.pop())
        if step is not None and step.name not in run:
            run.add(step.name)
            pending += step.inputs
    assert layers <= run


def classifier(*tail: tuple[str, dict[str, object]]) -> onnx.ModelProto:
    b = Builder()
    y = b.head(b.relu(b.conv("x", 8, "body")))
    for op, attributes in tail:
        y = b.node(op, [y], f"{op}.y", **attributes)
    return b.model(y)


@pytest.mark.parametrize(
    "tail",
    [(), (("Softmax", {}),), (("Sigmoid", {}),), (("ArgMax", {"axis": 1}),)],
    ids=["none", "softmax", "sigmoid", "argmax"],
)
def test_a_classifier_has_no_heads(tail: tuple[tuple[str, dict[str, object]], ...]) -> None:
    assert found(classifier(*tail)) == (set(), set())


def test_outputs_without_a_tail_are_no_heads() -> None:
    b = Builder()
    body = b.relu(b.conv("x", 8, "body"))
    assert found(b.model(b.conv(body, 3, "cls"), b.conv(body, 4, "reg"))) == (set(), set())


def test_a_gated_activation_behind_a_head_is_no_score() -> None:
    b = Builder()
    body = b.relu(b.conv("x", 8, "body"))
    head = b.conv(body, 4, "reg")
    silu = b.node("Mul", [head, b.node("Sigmoid", [head], "gate")], "silu")
    scores = b.node("Sigmoid", [b.conv(body, 3, "cls")], "scores")
    assert found(b.model(b.node("Neg", [silu], "y"), scores)) == ({"reg"}, {"scores"})


def test_a_head_that_the_caller_reads_too_is_one_head() -> None:
    b = Builder()
    body = b.relu(b.conv("x", 8, "body"))
    cls = b.conv(body, 3, "cls")
    scores = b.node("Sigmoid", [cls], "scores")
    model = b.model(cls, scores, b.node("Exp", [b.conv(body, 4, "reg")], "boxes"))
    assert found(model) == ({"cls", "reg"}, set())


def test_objectness_times_class_is_one_score() -> None:
    b = Builder()
    body = b.relu(b.conv("x", 8, "body"))
    parts = [b.node("Sigmoid", [b.conv(body, n, name)], f"{name}.p") for name, n in SCORES]
    scores = b.node("Mul", parts, "scores")
    model = b.model(scores, b.node("Exp", [b.conv(body, 4, "reg")], "boxes"))
    assert found(model) == ({"reg"}, {"scores"})


SCORES = (("obj", 1), ("cls", 3))


def test_a_pool_that_averages_is_a_layer() -> None:
    """Two means of features: what reads them is no detector's tail behind the convolutions."""
    b = Builder()
    body = b.relu(b.conv("x", 8, "body"))
    first = b.node("GlobalAveragePool", [body], "mean")
    second = b.node(
        "Sigmoid", [b.node("GlobalAveragePool", [b.relu(b.conv(body, 8, "c"))], "m2")], "p"
    )
    assert found(b.model(b.node("Exp", [first], "y"), second)) == ({"mean"}, {"p"})


def behind(model: onnx.ModelProto) -> set[str]:
    """Nodes that make floats and need a head, by definition: they change if a head changes."""
    net = net_from_model(model)
    graph = TorchGraph(net)
    x = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    made = {node.name: [t.name for t in node.outputs] for node in net.graph.nodes}
    names = [name for outputs in made.values() for name in outputs]
    exact = graph.run({"x": x}, names)
    heads = {name: exact[name] + 0.1 for name in heads_of(net).names}
    other = graph.run({"x": x, **heads}, names)
    return {
        node
        for node, outputs in made.items()
        if any(not torch.equal(exact[t], other[t]) for t in outputs if t not in heads)
    }


@pytest.mark.parametrize("form", FORMS)
def test_decoding_is_what_the_heads_change(form: str) -> None:
    net = net_from_model(detector(form))
    assert behind(detector(form)) <= decoding_of(net)
    makers = {
        node.name for name in heads_of(net).names for node in net.graph.tensors()[name].inputs
    }
    assert decoding_of(net).isdisjoint(makers)
    assert decoding_of(net).isdisjoint(node.name for node in weighted_nodes(net.graph))


@pytest.mark.parametrize("form", FORMS)
def test_decoding_is_the_same_behind_pairs(form: str) -> None:
    before = detector(form)
    after = quantized(before, images(size=SIZE))
    assert decoding_of(net_from_model(after)) == decoding_of(net_from_model(before))


def test_a_grid_that_nodes_compute_is_decoding() -> None:
    b = Builder()
    body = b.relu(b.conv("x", 8, "body"))
    scores = b.node("Sigmoid", [b.conv(body, 3, "cls")], "scores")
    shape = b.node("Shape", [body], "shape")
    grid = b.node("ConstantOfShape", [shape], "grid")
    b.node("Cast", [grid], "grid.float", to=1)
    model = b.model(scores, b.node("Add", [b.conv(body, 8, "reg"), "grid.float"], "boxes"))
    assert decoding_of(net_from_model(model)) == {"grid", "grid.float", "boxes"}


def test_two_maps_that_are_resized_are_not_decoded() -> None:
    b = Builder()
    body = b.relu(b.conv("x", 8, "body"))
    b.constant("twice", np.array([1, 1, 2, 2], np.float32))
    maps = [
        b.node("Resize", [b.conv(body, 3, name), "", "twice"], f"{name}.y", mode="linear")
        for name in ("main", "auxiliary")
    ]
    net = net_from_model(b.model(*maps))
    assert heads_of(net).names
    assert decoding_of(net) == set()
