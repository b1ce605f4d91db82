"""A module's outputs keep their names, whatever containers they come in."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import reptrt
from reptrt.core.errors import ConfigError, RewriteError
from reptrt.execute.module_outputs import flat_outputs
from reptrt.exporter.from_module import Exporter, ExportSettings, onnx_from_module
from reptrt.graph.preprocess import Preprocess
from tests.support.helpers import ort_run


@dataclass
class Detections:
    boxes: Tensor
    scores: Tensor
    loss: float | None = None


class Heads(NamedTuple):
    features: Tensor
    maps: list[Tensor]


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        forms = {
            "tensor": y,
            "tuple": (y, y.mean((2, 3)), None),
            "dict": {"features": y, "pooled": y.mean((2, 3))},
            "dataclass": Detections(y, y.mean((2, 3))),
            "named tuple": Heads(y, [y.mean((2, 3)), y.sum((2, 3))]),
            "nested": OrderedDict(main=y, aux=[y.mean((2, 3)), {"sum": y.sum((2, 3))}]),
        }
        return forms[self.kind]


NAMES = {
    "tensor": ["output"],
    "tuple": ["output", "output_1"],
    "dict": ["features", "pooled"],
    "dataclass": ["boxes", "scores"],
    "named tuple": ["features", "maps.0", "maps.1"],
    "nested": ["main", "aux.0", "aux.1.sum"],
}


@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("kind", list(NAMES))
def test_outputs_by_name_with_a_free_batch(kind: str, exporter: Exporter) -> None:
    module = Net(kind).eval()
    settings = ExportSettings(exporters=(exporter,))
    model = onnx_from_module(module, Preprocess.plain(3, 8, 8), settings)
    assert [value.name for value in model.graph.output] == NAMES[kind]
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in model.graph.output:
        assert value.type.tensor_type.shape.dim[0].dim_param == batch
    x = torch.randn(3, 3, 8, 8)
    expected = flat_outputs(module(x))
    got = ort_run(model, {"input": x.numpy()})
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value.detach().numpy(), atol=1e-5)
    assert isinstance(module(x), type(Net(kind)(x)))  # the module is as it was


class Constants(nn.Module):
    """Outputs of which one has the batch as its first axis, one another axis, and one none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("anchors", torch.arange(10.0).view(5, 2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.conv(x)
        return {"map": y, "anchors": self.anchors * 1.0, "loss": y.mean()}


@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_only_outputs_with_the_batch_have_its_name(exporter: Exporter) -> None:
    module, settings = Constants().eval(), ExportSettings(exporters=(exporter,))
    model = onnx_from_module(module, Preprocess.plain(3, 8, 8), settings)
    shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.output}
    assert list(shapes) == ["map", "anchors", "loss"]
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert shapes["map"][0].dim_param == batch
    assert [dim.dim_value for dim in shapes["anchors"]] == [5, 2]
    assert not shapes["loss"]
    x = torch.randn(3, 3, 8, 8)
    outputs = ort_run(model, {"input": x.numpy()})
    for name, value in module(x).items():
        np.testing.assert_allclose(outputs[name], value.detach().numpy(), atol=1e-5)
    exported = reptrt.export(module, input_size=(3, 8, 8))
    for value, expected in zip(exported(x), module(x).values(), strict=True):
        torch.testing.assert_close(value, expected.detach())


def test_every_output_is_proved() -> None:
    class Traced(Constants):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = super().forward(x)["map"]
            return {"map": y, "scores": [y.mean((2, 3)), y.sum((2, 3)) * float(x.abs().sum() > 0)]}

    with pytest.raises(RewriteError, match=r"scores\.1: what torch exported differs"):
        reptrt.export(Traced(), input_size=(3, 8, 8))


def test_a_forward_without_tensors_is_refused() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> dict[str, float]:
            return {"loss": 0.0}

    with pytest.raises(ConfigError, match="returns dict without a tensor"):
        onnx_from_module(Nothing(), Preprocess.plain(3, 8, 8), ExportSettings())
