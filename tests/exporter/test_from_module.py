"""A module's outputs keep their names, whatever containers they come in."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reptrt.exporter.from_module import Exporter, ExportSettings, onnx_from_module
from reptrt.exporter.outputs import flat_outputs
from reptrt.graph.preprocess import Preprocess
from tests.support.helpers import ort_run


@dataclass
class Detections:
    boxes: Tensor
    scores: Tensor
    loss: float | None = None


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
            "nested": OrderedDict(main=y, aux=[y.mean((2, 3)), {"sum": y.sum((2, 3))}]),
        }
        return forms[self.kind]


NAMES = {
    "tensor": ["output"],
    "tuple": ["output", "output_1"],
    "dict": ["features", "pooled"],
    "dataclass": ["boxes", "scores"],
    "nested": ["main", "aux", "aux.sum"],
}


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
