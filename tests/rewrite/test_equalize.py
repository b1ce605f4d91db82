"""Equalization changes no output and gives channels equal ranges; refused where not exact."""

import numpy as np
import onnx_graphsurgeon as gs
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
from reptrt.rewrite.equalize import equalize, find_links
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
    """A residual tensor, a sigmoid and an output in the middle: none may be scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.convs[0](x))
        y = torch.relu(self.convs[1](torch.sigmoid(self.convs[4](y))) + y)
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


def maxima(net: Net, images: Dataset) -> dict[str, np.ndarray]:
    names = [link.tensor.name for link in find_links(net)[0]]
    with torch.inference_mode():
        found = collect_channels(TorchGraph(net), images, names)
    return {name: stats.maximum for name, stats in found.items()}


def test_the_output_stays_and_the_ranges_become_equal(images: Dataset) -> None:
    net = net_of(Chain())
    x = next(images.batches(50))
    expected = ort_run(model_from_net(net.copy()), {"input": x})["output"]
    before = maxima(net, images)
    report, grown = equalize(net, before)
    assert len(report.changed) == 4
    assert set(grown) == {"b", "c", "d", "head"}
    got = ort_run(model_from_net(net.copy()), {"input": x})["output"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    for name, values in maxima(net, images).items():
        alive = before[name] > 1e-2 * before[name].max()
        assert before[name][alive].max() > 1.2 * before[name][alive].min(), "already equal"
        np.testing.assert_allclose(values[alive], values[alive][0], rtol=1e-4)


def test_a_dead_channel_is_not_blown_up(images: Dataset) -> None:
    net = net_of(Chain())
    found = maxima(net, images)
    for values in found.values():
        values[0] = 0.0
    equalize(net, found)
    weights = [t.values for t in net.graph.tensors().values() if isinstance(t, gs.Constant)]
    assert all(np.isfinite(w).all() for w in weights)
    assert max(np.abs(w).max() for w in weights if w.dtype == np.float32) < 1e5


def test_what_is_not_exact_is_left_with_the_reason() -> None:
    links, skipped = find_links(net_of(Branching()))
    assert links == ()
    reasons = {skip.reason for skip in skipped}
    assert "a node other than a layer or a pool reads it" in reasons
    assert "it is an output of the graph" in reasons


def test_channel_statistics_are_those_of_numpy(images: Dataset) -> None:
    net = net_of(Chain())
    name = find_links(net)[0][0].tensor.name
    x = next(images.batches(50))
    graph = TorchGraph(net)
    with torch.inference_mode():
        value = graph.run({"input": torch.from_numpy(x)}, [name])[name].double().numpy()
        stats = collect_channels(graph, images, [name])[name]
    np.testing.assert_allclose(stats.maximum, np.abs(value).max(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(stats.mean_square, (value**2).mean(axis=(0, 2, 3)), rtol=1e-5)


def test_statistics_of_two_parts_are_those_of_all(images: Dataset) -> None:
    graph, names = TorchGraph(net_of(Chain())), list(maxima(net_of(Chain()), images))
    others, judges = images.parted(3)
    first, second, whole = (
        collect_channels(graph, part, names) for part in (others, judges, images)
    )
    for name, expected in whole.items():
        found = first[name].merged(second[name], judges.length / images.length)
        np.testing.assert_array_equal(found.maximum, expected.maximum)
        np.testing.assert_allclose(found.mean_square, expected.mean_square, rtol=1e-6)
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-6, atol=1e-7)
