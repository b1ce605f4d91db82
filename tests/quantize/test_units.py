"""Units and stages of nets of every shape, and the store of the activations between them."""

import functools
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import Net, net_from_model
from reptrt.graph.placement import place
from reptrt.quantize.calib.measure import Measure
from reptrt.quantize.reconstruct.cache import Store, batches, choose_storage, peak_bytes
from reptrt.quantize.reconstruct.units import MAX_LAYERS, Layout, Unit, find_units, stage_end
from tests.support.onnx_nets import Builder, basic_block, plain_chain
from tests.support.qdq_nets import images, residual_net

CPU = torch.device("cpu")


def neck() -> onnx.ModelProto:
    """Three scales that meet twice, as in a detector; two outputs."""
    b = Builder(size=16)
    p1 = b.relu(b.conv("x", 4, "p1"))
    p2 = b.relu(b.conv(p1, 6, "p2", strides=[2, 2]))
    p3 = b.relu(b.conv(p2, 8, "p3", strides=[2, 2]))

    def up(name: str) -> str:
        scales = b.constant(f"{name}.scales", np.float32([1, 1, 2, 2]))
        return b.node("Resize", [name, "", scales], f"{name}.up", mode="nearest")

    def cat(first: str, second: str, name: str) -> str:
        b.node("Concat", [first, second], name, axis=1)
        b.channels[name] = b.channels[first] + b.channels[second]
        return name

    t2 = b.relu(b.conv(cat(up(b.relu(b.conv(p3, 4, "t3"))), p2, "cat2"), 6, "t2"))
    t1 = b.relu(b.conv(cat(up(b.relu(b.conv(t2, 4, "t2b"))), p1, "cat1"), 4, "t1"))
    d2 = b.relu(b.conv(cat(b.relu(b.conv(t1, 4, "d1", strides=[2, 2])), t2, "cat3"), 6, "d2"))
    d3 = b.relu(b.conv(cat(b.relu(b.conv(d2, 4, "d2b", strides=[2, 2])), p3, "cat4"), 8, "d3"))
    deep = b.relu(b.conv(b.relu(b.conv(d3, 8, "e1")), 8, "e2"))
    return b.model(b.conv(deep, 5, "large", size=1), b.conv(d2, 5, "middle", size=1))


def two_branches() -> onnx.ModelProto:
    """Two branches of three layers each between single tensors."""
    b = Builder()
    stem = b.relu(b.conv("x", 6, "stem"))
    left = b.relu(b.conv(b.relu(b.conv(stem, 6, "l1")), 6, "l2"))
    right = b.relu(b.conv(b.relu(b.conv(stem, 6, "r1")), 6, "r2"))
    y = b.node("Add", [b.conv(left, 6, "l3"), b.conv(right, 6, "r3")], "sum")
    return b.model(b.head(b.relu(y)))


def tail_without_layer() -> onnx.ModelProto:
    """A net with only a pool after the last boundary."""
    b = Builder()
    y = b.relu(b.conv(b.relu(b.conv("x", 4, "c1")), 4, "c2"))
    y = b.node("GlobalAveragePool", [y], "pool")
    return b.model(b.node("Flatten", [y], "flat"))


def image_read_late() -> onnx.ModelProto:
    """A net that reads the image again in the middle."""
    b = Builder()
    y = b.relu(b.conv("x", 3, "c1"))
    y = b.relu(b.node("Add", [b.conv(y, 3, "c2"), "x"], "sum"))
    return b.model(b.head(b.relu(b.conv(y, 4, "c3"))))


def wide() -> onnx.ModelProto:
    """More layers than a unit may have, while a second tensor stays alive to the end."""
    b = Builder()
    skip = y = b.relu(b.conv("x", 4, "c0"))
    for i in range(1, 2 * MAX_LAYERS):
        y = b.relu(b.conv(y, 4, f"c{i}"))
    return b.model(b.head(b.relu(b.node("Add", [b.conv(y, 4, "last"), skip], "sum"))))


def interleaved() -> onnx.ModelProto:
    """Two long branches level by level: every activation function lies behind the other's layer."""
    b = Builder()
    left = right = b.relu(b.conv("x", 4, "c0"))
    for i in range(MAX_LAYERS):
        layers = b.conv(left, 4, f"l{i}"), b.conv(right, 4, f"r{i}")
        gates = [b.node("Sigmoid", [layer], f"{layer}.gate") for layer in layers]
        left, right = (
            b.node("Mul", [y, g], f"{y}.silu") for y, g in zip(layers, gates, strict=True)
        )
    return b.model(b.head(b.relu(b.node("Add", [b.conv(left, 4, "last"), right], "sum"))))


NETS: dict[str, Callable[[], onnx.ModelProto]] = {
    "chain": plain_chain,
    "residual": basic_block,
    "downsampling": lambda: basic_block(True),
    "everything": residual_net,
    "neck": neck,
    "two branches": two_branches,
    "tail": tail_without_layer,
    "late": image_read_late,
    "wide": wide,
    "interleaved": interleaved,
}


def cut(name: str) -> tuple[Net, TorchGraph, Layout, torch.Tensor]:
    net = net_from_model(NETS[name]())
    graph = TorchGraph(net)
    size = int(net.graph.inputs[0].shape[2])
    x = torch.from_numpy(images(3, size=size))
    placement = place(net)
    layers = [weight.node for weight in placement.weights]
    quantized = [activation.tensor for activation in placement.activations]
    return net, graph, find_units(graph, x[:2], layers, quantized, Measure(graph).names), x


def described(layout: Layout) -> list[str]:
    return ["+".join(unit.layers) for unit in layout.units]


UNITS = {
    "chain": ["c1", "c2", "head"],
    "residual": ["stem", "c1+c2", "head"],
    "two branches": ["stem", "l1+l2+r1+r2+l3+r3", "head"],
    "tail": ["c1", "c2"],
    "late": ["c1+c2", "c3", "head"],
}


@pytest.mark.parametrize("name", UNITS)
def test_units_lie_between_single_tensors(name: str) -> None:
    _, _, layout, _ = cut(name)
    assert [sorted(text.split("+")) for text in described(layout)] == [
        sorted(text.split("+")) for text in UNITS[name]
    ]
    assert all(len(alive) == 1 for alive in layout.alive)


def test_no_boundary_lies_between_a_layer_and_its_activation_function() -> None:
    net, _, layout, _ = cut("interleaved")
    layers = {node.outputs[0].name for node in net.graph.nodes if node.op in ("Conv", "Gemm")}
    boundaries = [set(alive) for alive in layout.alive[:-1]]
    assert any(len(alive) > 1 for alive in boundaries)
    assert all(layers.isdisjoint(alive) for alive in boundaries)


@pytest.mark.parametrize("name", ["neck", "wide", "interleaved"])
def test_where_no_single_tensor_passes_units_stay_small(name: str) -> None:
    _, _, layout, _ = cut(name)
    assert max(len(unit.layers) for unit in layout.units) <= MAX_LAYERS
    assert any(len(alive) > 1 for alive in layout.alive[:-1])


@pytest.mark.parametrize("name", NETS)
def test_every_layer_is_in_one_unit_and_is_named(name: str) -> None:
    net, _, layout, _ = cut(name)
    layers = [layer for unit in layout.units for layer in unit.layers]
    assert sorted(layers) == sorted(weight.node for weight in place(net).weights)
    nodes = [node for unit in layout.units for node in unit.nodes]
    assert len(nodes) == len(set(nodes))
    assert {node.name for node in net.graph.nodes if node.op != "Constant"} == set(nodes)
    for unit in layout.units:
        assert set(unit.layers) <= unit.nodes
        assert unit.name == unit.layers[-1]


@pytest.mark.parametrize("name", NETS)
def test_boundaries_are_where_quantized_tensors_are(name: str) -> None:
    net, _, layout, _ = cut(name)
    quantized = {activation.tensor for activation in place(net).activations}
    for unit in layout.units[:-1]:
        assert quantized & set(unit.outputs), unit.name


@pytest.mark.parametrize("name", NETS)
def test_unit_after_unit_gives_the_bits_of_the_whole(name: str) -> None:
    _, graph, layout, x = cut(name)
    wanted = graph.run({graph.input_names[0]: x}, graph.output_names)
    values = {graph.input_names[0]: x}
    for unit, alive in zip(layout.units, layout.alive, strict=True):
        given = {name: values[name] for name in unit.inputs}  # nothing else is needed
        values |= graph.run(given, unit.outputs)
        for tensor in unit.outputs:
            assert tuple(values[tensor].shape[1:]) == layout.shapes[tensor]
        values = {name: values[name] for name in alive}  # nothing else is read later
    assert values.keys() == set(graph.output_names)
    for tensor, value in wanted.items():
        assert torch.equal(values[tensor], value)


def test_a_stage_ends_where_the_resolution_changes() -> None:
    b = Builder(size=16)
    y = b.relu(b.conv("x", 4, "a1"))
    y = b.relu(b.conv(y, 4, "a2"))
    y = b.relu(b.conv(y, 4, "b1", strides=[2, 2]))
    y = b.relu(b.conv(y, 4, "c1", strides=[2, 2]))
    y = b.relu(b.conv(y, 4, "c2"))
    NETS["stages"] = functools.partial(b.model, b.head(y))
    _, _, layout, _ = cut("stages")
    del NETS["stages"]
    assert {unit.name: unit.stage for unit in layout.units} == {
        "a1": 0,
        "a2": 0,
        "b1": 1,
        "c1": 2,
        "c2": 2,
        "head": 3,
    }


ENDS = {
    "one stage": ([0, 0, 0], [2, 2, 2]),
    "two": ([0, 0, 1, 1], [1, 3, 3, 3]),
    "a stage of one unit": ([0, 0, 1, 2, 2], [1, 2, 4, 4, 4]),
    "each its own": ([0, 1, 2], [1, 2, 2]),
    "one unit": ([0], [0]),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_supervises_a_unit(name: str) -> None:
    """The end of its stage supervises a unit; the last unit has the end of the next stage."""
    stages, ends = ENDS[name]
    empty: frozenset[str] = frozenset()
    units = [Unit(str(i), (), (), empty, (), stage) for i, stage in enumerate(stages)]
    assert [stage_end(units, i) for i in range(len(units))] == ends


# The store ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["float32", "float16", "disk"])
def test_what_is_written_is_read(storage: str, tmp_path: Path) -> None:
    values = torch.randn(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    values[3, 0, 0, 0], values[4, 0, 0, 0] = 1e6, -1e6
    store = Store(10, (3, 4, 4), storage, CPU, tmp_path)  # type: ignore[arg-type]
    for part in batches(10, 4):
        store.write(part.start, values[part])
    wanted = values
    if storage != "float32":
        wanted = values.numpy().clip(-65504, 65504).astype(np.float16).astype(np.float32)
        wanted = torch.from_numpy(wanted)
        assert 0 < float((wanted - values).abs()[5:].max()) < 1e-3 * float(values[5:].abs().max())
    picked = torch.tensor([7, 0, 3, 3])
    for index in (slice(0, 10), slice(2, 5), picked):
        got = store.read(index)
        assert got.dtype == torch.float32
        assert torch.equal(got, wanted[index])
    assert list(tmp_path.iterdir()) == []  # whatever happens to the process


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_what_lies_on_disk_is_not_this_process_s_memory(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    store = Store(64, (1 << 19,), "disk", CPU, tmp_path)  # 64 MiB
    part = torch.ones(1, 1 << 19)
    before = resident()
    for i in range(64):
        store.write(i, part)
    assert float(sum(store.read(slice(i, i + 1)).sum() for i in range(64))) == 64 * (1 << 19)
    assert resident() - before < 16 << 20


def test_gradients_do_not_reach_the_store(tmp_path: Path) -> None:
    store = Store(2, (3,), "float32", CPU, tmp_path)
    store.write(0, torch.ones(2, 3, requires_grad=True))
    assert not store.read(slice(0, 2)).requires_grad


def test_batches_cover_all() -> None:
    assert [(part.start, part.stop) for part in batches(70, 32)] == [(0, 32), (32, 64), (64, 70)]
    assert list(batches(0, 32)) == []


def test_storage_by_budget() -> None:
    assert choose_storage(1000, 1000) == "float32"
    assert choose_storage(1001, 1000) == "float16"
    assert choose_storage(2000, 1000) == "float16"
    assert choose_storage(2002, 1000) == "disk"


def test_peak_of_a_chain_and_of_a_neck() -> None:
    """Both nets' tensors at the two boundaries of a unit; the images once."""
    _, graph, layout, _ = cut("chain")
    image, first, second, head = 3 * 64, 8 * 64, 8 * 64, 5
    bytes_each = 4 * 7
    peak = max(image + 2 * first, 2 * (first + second), 2 * (second + head))
    assert peak_bytes(layout, graph.input_names, 7) == bytes_each * peak
    _, graph, layout, _ = cut("neck")
    sizes = [sum(int(np.prod(layout.shapes[name])) for name in alive) for alive in layout.alive]
    assert peak_bytes(layout, graph.input_names, 7) >= bytes_each * 2 * max(sizes)
