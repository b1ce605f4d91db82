"""The executor on whole nets, as both of torch's exporters write them."""

import copy
import io
import warnings
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reptrt.execute.torchgraph import TorchGraph
from tests.support.helpers import ort_run


class Residual(nn.Module):
    """Two residual blocks with batch norm, the second with a strided shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.down = nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(8, 12, 1, 2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        x = F.max_pool2d(F.relu(self.conv3(x) + self.down(x)), 3, 2, 1)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class SqueezeExcite(nn.Module):
    """A depthwise-separable block with squeeze-excite and the activations of mobile nets."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(3, 9, 3, padding=1, groups=3)
        self.reduce, self.expand = nn.Conv2d(9, 5, 1), nn.Conv2d(5, 9, 1)
        self.pointwise = nn.Conv2d(9, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.depthwise(x))
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        x = F.silu(self.pointwise(x * torch.sigmoid(gate)))
        return x.mean((2, 3)).softmax(1)


class Neck(nn.Module):
    """Upsample by a factor and to another map's size, concat, split, a reshape that keeps N."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.head = nn.Conv2d(6 + 8 + 8 + 4, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = F.leaky_relu(self.stem(x), 0.125)
        low = self.down(high).clamp(0, 6)
        doubled = F.interpolate(low, scale_factor=2.0, mode="nearest")
        resized = F.interpolate(low, size=high.shape[2:], mode="bilinear", align_corners=False)
        y = self.head(torch.cat([high, doubled, resized, self.up(low)], 1))
        box, rest = y.split([4, 3], 1)
        return torch.cat([box.sigmoid(), rest], 1).view(x.shape[0], 7, -1).permute(0, 2, 1)


def build(cls: Callable[[], nn.Module]) -> nn.Module:
    """Return a net with seeded weights and batch statistics that are not trivial."""
    torch.manual_seed(0)
    net = cls()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net.eval()


def exported(net: nn.Module, dynamo: bool) -> onnx.ModelProto:
    """Return the ONNX model of a net for inputs (N, 3, 16, 16), N dynamic."""
    x = torch.zeros(2, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters deprecate parts of themselves
        if dynamo:
            shapes = ({0: torch.export.Dim("N")},)
            program = torch.onnx.export(
                net, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False
            )
            assert program is not None
            return program.model_proto
        file = io.BytesIO()
        axes = {"x": {0: "N"}}
        torch.onnx.export(
            net, (x,), file, dynamo=False, input_names=["x"], dynamic_axes=axes, opset_version=17
        )
        return onnx.load_model_from_string(file.getvalue())


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


NETS = [Residual, SqueezeExcite, Neck]


@pytest.fixture(scope="module", params=NETS, ids=lambda cls: cls.__name__)
def classic(request: pytest.FixtureRequest) -> tuple[nn.Module, onnx.ModelProto]:
    net = build(request.param)
    return net, exported(net, dynamo=False)


def assert_equals_onnxruntime(model: onnx.ModelProto) -> None:
    graph = TorchGraph(model)
    for count in (1, 2, 5):
        x = images(count)
        (expected,) = ort_run(model, {graph.input_names[0]: x.numpy()}).values()
        with torch.no_grad():
            got = graph(x).numpy()
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)  # sums of some 100 terms


def test_classic_export_equals_onnxruntime(classic: tuple[nn.Module, onnx.ModelProto]) -> None:
    assert_equals_onnxruntime(classic[1])


@pytest.mark.slow
@pytest.mark.parametrize("cls", NETS, ids=lambda cls: cls.__name__)
def test_dynamo_export_equals_onnxruntime(cls: type[nn.Module]) -> None:
    assert_equals_onnxruntime(exported(build(cls), dynamo=True))


def test_double_precision_is_the_net_in_float64(
    classic: tuple[nn.Module, onnx.ModelProto],
) -> None:
    net, model = classic
    x = images(3).double()
    with torch.no_grad():
        expected = copy.deepcopy(net).double()(x)
        got = TorchGraph(model).double()(x)
    assert got.dtype == torch.float64
    # The exporter folds batch norm in float32; everything else is exact to float64.
    tolerance = 1e-5 if isinstance(net, Residual) else 1e-12
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_images_give_the_same_bits_anywhere_in_a_batch(
    classic: tuple[nn.Module, onnx.ModelProto],
) -> None:
    graph, x = TorchGraph(classic[1]), images(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(graph(x[order]), graph(x)[order])


def test_every_sub_graph_gives_the_bits_of_the_whole(
    classic: tuple[nn.Module, onnx.ModelProto],
) -> None:
    # The given tensor is made contiguous, as one read from a cache would be.
    graph, x = TorchGraph(classic[1]), images(4)
    (output,) = graph.output_names
    names = [name for step in graph.steps for name in step.outputs]
    with torch.no_grad():
        every = graph.run({graph.input_names[0]: x}, names)
        for name in names:
            given = {graph.input_names[0]: x, name: every[name].contiguous()}
            assert torch.equal(graph.run(given, [output])[output], every[output]), name


def test_gradients_of_weights_are_those_of_the_net(
    classic: tuple[nn.Module, onnx.ModelProto],
) -> None:
    net, model = classic
    graph, x = TorchGraph(model), images(2)
    parameters = dict(net.named_parameters())
    shared = {
        name: value.clone().requires_grad_()
        for name, value in graph.constants.items()
        if name in parameters and torch.equal(value, parameters[name])
    }
    assert len(shared) >= 2
    graph.run({"x": x, **shared}, graph.output_names)[
        graph.output_names[0]
    ].square().sum().backward()
    net.zero_grad()
    net(x).square().sum().backward()
    for name, value in shared.items():
        torch.testing.assert_close(value.grad, parameters[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu(classic: tuple[nn.Module, onnx.ModelProto]) -> None:
    x = images(4)
    with torch.no_grad():
        on_cpu = TorchGraph(classic[1])(x)
        graph = TorchGraph(classic[1], "cuda")
        assert torch.equal(graph(x), graph(x))
        torch.testing.assert_close(graph(x).cpu(), on_cpu, rtol=1e-4, atol=1e-5)
