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

from reptrt.core.clock import Clock
from reptrt.data.dataset import Dataset
from reptrt.execute.runner import OrtRunner
from reptrt.execute.torchgraph import TorchGraph
from reptrt.exporter.from_module import ExportSettings, onnx_from_module
from reptrt.graph.net import Net
from reptrt.graph.placement import place
from reptrt.graph.preprocess import Preprocess
from reptrt.pipeline import PLAIN_INT8, CalibrateOptions, calibrate, export
from reptrt.pipeline.planning import Planned, plan_net
from reptrt.quantize.calib.channels import collect_channels
from reptrt.quantize.calib.collect import collect
from reptrt.quantize.reconstruct.driver import Quantized, reconstruct
from reptrt.quantize.reconstruct.resume import Finished
from reptrt.rewrite.insert_affine import insert_affine
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


@pytest.mark.benchmark(group="calibrate")
def test_onnxruntime_forward(
    benchmark: BenchmarkFixture, float_file: Path, dataset: Dataset
) -> None:
    """The pass over the images that calibration cannot do without."""
    with OrtRunner(float_file, threads=1) as runner:

        def run() -> int:
            return sum(len(runner.run(batch)) for batch in dataset.batches(32))

        assert benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)


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


LEARNED = CalibrateOptions(images=IMAGES, recipe="balanced", iterations=20)


@pytest.fixture(scope="module")
def planned(net: Net, dataset: Dataset) -> Planned:
    return plan_net(net.copy(), dataset, LEARNED, Clock())


@pytest.mark.benchmark(group="learning, 20 iterations")
def test_learning(benchmark: BenchmarkFixture, dataset: Dataset, planned: Planned) -> None:
    learning = LEARNED.learning
    assert learning is not None
    device = torch.device("cpu")

    def inserted() -> tuple[tuple[Quantized], dict[str, Any]]:
        net = planned.quantized()
        insert_affine(net)
        return (Quantized(net, planned.reference, planned.plan, LEARNED.grids[1]),), {}

    def run(quantized: Quantized) -> Any:
        finished = Finished(None, {})
        return reconstruct(quantized, dataset, learning, device=device, finished=finished)

    report, _ = benchmark.pedantic(run, setup=inserted, rounds=ROUNDS)
    assert report.units


@pytest.mark.benchmark(group="learning, 20 iterations")
def test_forward_and_backward_alone(
    benchmark: BenchmarkFixture, net: Net, dataset: Dataset
) -> None:
    """As many images as all steps take, through the float net, with gradients for all weights."""
    graph, learning = TorchGraph(net), LEARNED.learning
    assert learning is not None
    x = torch.from_numpy(next(dataset.batches(learning.batch))).requires_grad_()
    weights = {
        name: graph.constants[name].clone().requires_grad_()
        for name in (step.inputs[1] for step in graph.steps if step.op == "Conv")
    }
    assert weights

    def run() -> None:
        for _ in range(learning.iterations):
            inputs = {graph.input_names[0]: x, **weights}
            graph.run(inputs, graph.output_names)[graph.output_names[0]].sum().backward()

    benchmark.pedantic(run, rounds=ROUNDS)
    assert x.grad is not None
