"""Scaling channels changes no output, in chains and residual streams; refused where not exact."""

import numpy as np
import pytest
import torch
from torch import nn

from reptrt.data.dataset import Dataset, open_dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.exporter.from_module import ExportSettings, onnx_from_module
from reptrt.exporter.fuse import fuse
from reptrt.graph.net import Net, model_from_net, net_from_model
from reptrt.graph.preprocess import Preprocess
from reptrt.quantize.calib.channels import collect_channels
from reptrt.rewrite.equalize import Stream, equalize, find_streams
from tests.support.helpers import ort_run

SIZE = Preprocess.plain(3, 8, 8)


class Chain(nn.Module):
    """Dense, depthwise, grouped, pooled, and a classifier: everything a scale may pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c, self.d = nn.Conv2d(8, 12, 1, groups=2), nn.Conv2d(12, 6, 3, stride=2)
        self.pool, self.leaky = nn.MaxPool2d(2), nn.LeakyReLU(0.1)
        self.gap, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.b(self.pool(torch.relu(self.a(x)))))
        x = torch.relu(self.d(self.leaky(self.c(x))))
        return self.head(torch.flatten(self.gap(x), 1))


class Branching(nn.Module):
    """A residual tensor with a tanh, a sigmoid, and the output: none may be scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.convs[0](x))
        y = torch.relu(self.convs[1](torch.sigmoid(self.convs[4](y))) + torch.tanh(y))
        return self.convs[3](torch.sigmoid(self.convs[2](y)))


def net_of(module: nn.Module) -> Net:
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5)
        else:
            nn.init.uniform_(parameter, 0.5, 1.5)  # no channel is dead
    model = onnx_from_module(module.eval(), SIZE, ExportSettings())
    net, _ = fuse(model, SIZE)
    return net_from_model(model_from_net(net))


@pytest.fixture
def images(tmp_path) -> Dataset:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 3, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    return open_dataset(tmp_path / "x.npy", SIZE)


class Residual(nn.Module):
    """Two residual streams, each read twice; the second begins where the first is strided."""

    def __init__(self, gate: bool = False) -> None:
        super().__init__()
        self.stem, self.gate = nn.Conv2d(3, 6, 3, padding=1), gate
        self.a, self.b = (nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))
        self.down, self.skip = nn.Conv2d(6, 8, 3, padding=1, stride=2), nn.Conv2d(6, 8, 1, stride=2)
        self.c, self.head = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.b(torch.relu(self.a(x))))
        x = torch.relu(self.down(x) + torch.relu(self.skip(x)))
        x = x * torch.sigmoid(x) if self.gate else x - torch.relu(self.c(x))
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


def random_factors(streams: tuple[Stream, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    widths = {stream.name: len(stream.producers[0].inputs[1].values) for stream in streams}
    return {name: np.exp(rng.normal(0, 1.5, width)) for name, width in widths.items()}


@pytest.mark.parametrize(
    ("module", "readers"),
    [
        (Chain(), [{"b"}, {"c"}, {"d"}, {"head"}]),
        (Residual(), [{"a", "down", "skip"}, {"b"}, {"c", "head"}]),
    ],
)
def test_the_output_stays_and_every_tensor_of_a_stream_is_scaled(
    module: nn.Module, readers: list[set[str]], images: Dataset
) -> None:
    net = net_of(module)
    x = torch.from_numpy(next(images.batches(50)))
    streams, _ = find_streams(net)
    assert sorted(sorted(n.name for n in s.consumers) for s in streams) == sorted(
        map(sorted, readers)
    )
    factors = random_factors(streams)
    names = [name for stream in streams for name in stream.tensors]
    expected = ort_run(model_from_net(net.copy()), {"input": x.numpy()})["output"]
    before = TorchGraph(net).run({"input": x}, names)
    assert equalize(net, streams, factors).changed == tuple(factors)
    got = ort_run(model_from_net(net.copy()), {"input": x.numpy()})["output"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    after = TorchGraph(net).run({"input": x}, names)
    for stream in streams:
        for name in stream.tensors:
            shape = (1, -1, *[1] * (before[name].dim() - 2))
            wanted = before[name].double() * torch.from_numpy(factors[stream.name]).reshape(shape)
            error = (after[name].double() - wanted).abs().amax() / wanted.abs().amax()
            assert float(error) < 1e-5


def test_a_stream_that_one_node_cannot_scale_stays_as_a_whole() -> None:
    streams, skipped = find_streams(net_of(Residual(gate=True)))
    assert {node.name for stream in streams for node in stream.consumers} == {
        "a",
        "b",
        "down",
        "skip",
    }
    assert any("a node other than a layer" in skip.reason for skip in skipped)


def test_what_is_not_exact_is_left_with_the_reason() -> None:
    streams, skipped = find_streams(net_of(Branching()))
    assert streams == ()
    reasons = {skip.reason for skip in skipped}
    assert "a node other than a layer, a pool or a sum reads it" in reasons
    assert "it is an output of the graph" in reasons


def test_channel_statistics_are_those_of_numpy(images: Dataset) -> None:
    net = net_of(Chain())
    name = find_streams(net)[0][0].tensors[0]
    x = next(images.batches(50))
    graph = TorchGraph(net)
    with torch.inference_mode():
        value = graph.run({"input": torch.from_numpy(x)}, [name])[name].double().numpy()
        stats = collect_channels(graph, images, [name])[name]
    np.testing.assert_allclose(stats.maximum, np.abs(value).max(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(stats.mean_square, (value**2).mean(axis=(0, 2, 3)), rtol=1e-5)


def test_statistics_of_two_parts_are_those_of_all(images: Dataset) -> None:
    net = net_of(Chain())
    graph, names = TorchGraph(net), [stream.name for stream in find_streams(net)[0]]
    others, judges = images.parted(3)
    first, second, whole = (
        collect_channels(graph, part, names) for part in (others, judges, images)
    )
    for name, expected in whole.items():
        found = first[name].merged(second[name], judges.length / images.length)
        np.testing.assert_array_equal(found.maximum, expected.maximum)
        np.testing.assert_allclose(found.mean_square, expected.mean_square, rtol=1e-6)
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-6, atol=1e-7)
