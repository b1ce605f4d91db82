"""Time stages beside the same step of a rival, or beside a plain pass over the images."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnxruntime.quantization import (  # the rival
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from pytest_benchmark.fixture import BenchmarkFixture

from reptrt.data.dataset import Dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.exporter.from_module import ExportSettings, onnx_from_module
from reptrt.graph.net import Net
from reptrt.graph.placement import place
from reptrt.graph.preprocess import Preprocess
from reptrt.pipeline import PLAIN_INT8, CalibrateOptions, calibrate, export
from reptrt.quantize.calib.channels import collect_channels
from reptrt.quantize.calib.collect import collect
from reptrt.sources.source import module_from_source
from tests.benchmarks.conftest import EXPORT, IMAGES, SOURCE

ROUNDS = 3
PREPROCESS = Preprocess(3, 32, 32, (0.5,) * 3, (0.25,) * 3)


class Batches(CalibrationDataReader):
    """The images, a batch at a time."""

    def __init__(self, dataset: Dataset, name: str) -> None:
        self._feeds = ({name: batch} for batch in dataset.batches(32))

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch by input name, then None."""
        return next(self._feeds, None)


@pytest.mark.benchmark(group="export")
def test_torch_onnx_export_alone(benchmark: BenchmarkFixture, folder: Path) -> None:
    def run() -> onnx.ModelProto:
        return onnx_from_module(module_from_source(SOURCE), PREPROCESS, ExportSettings())

    assert benchmark.pedantic(run, rounds=ROUNDS).graph.node


@pytest.mark.benchmark(group="export")
def test_export_with_fusion_and_proof(benchmark: BenchmarkFixture, folder: Path) -> None:
    def run() -> Any:
        return export(SOURCE, folder / "e.onnx", EXPORT)

    assert benchmark.pedantic(run, rounds=ROUNDS).proof


@pytest.mark.benchmark(group="calibrate")
def test_onnxruntime_minmax(
    benchmark: BenchmarkFixture, folder: Path, float_file: Path, dataset: Dataset, net: Net
) -> None:
    def run() -> None:
        quantize_static(
            str(float_file),
            str(folder / "rival.onnx"),
            Batches(dataset, net.graph.inputs[0].name),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
        )

    benchmark.pedantic(run, rounds=ROUNDS)
    assert (folder / "rival.onnx").exists()


PARTS = {
    "plain": replace(PLAIN_INT8, images=IMAGES),
    "fast": CalibrateOptions(images=IMAGES),
    "balanced, 20 iterations": CalibrateOptions(images=IMAGES, recipe="balanced", iterations=20),
}


@pytest.mark.benchmark(group="calibrate")
@pytest.mark.parametrize("recipe", PARTS)
def test_reptrt(
    benchmark: BenchmarkFixture, folder: Path, float_file: Path, images: Path, recipe: str
) -> None:
    def run() -> Any:
        return calibrate(float_file, images, folder / "c.onnx", PARTS[recipe])

    assert benchmark.pedantic(run, rounds=ROUNDS).layers


@pytest.mark.benchmark(group="passes over the images")
@pytest.mark.parametrize("kind", ["forward alone", "histograms", "statistics per channel"])
def test_pass(benchmark: BenchmarkFixture, net: Net, dataset: Dataset, kind: str) -> None:
    tensors = [activation.tensor for activation in place(net.copy()).activations]
    graph = TorchGraph(net, torch.device("cpu"))

    def forward() -> dict[str, Any]:
        for batch in dataset.batches(32):
            graph(torch.from_numpy(batch))
        return {"any": None}

    passes: dict[str, Callable[[], Any]] = {
        "forward alone": forward,
        "histograms": lambda: collect(graph, dataset, tensors).histograms,
        "statistics per channel": lambda: collect_channels(graph, dataset, tensors),
    }
    with torch.inference_mode():
        assert benchmark.pedantic(passes[kind], rounds=ROUNDS, warmup_rounds=1)
