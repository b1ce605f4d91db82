"""Time parts of reptrt beside similar functions of libraries, and graphs beside each other."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from reptrt.core.choices import Rule
from reptrt.core.grid import Grid
from reptrt.data.dataset import Dataset
from reptrt.execute.runner import OrtRunner
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import Net
from reptrt.quantize.calib.histogram import histogram_of
from reptrt.quantize.calib.options import ThresholdOptions
from reptrt.quantize.calib.thresholds import amax_from_histogram
from reptrt.quantize.reconstruct.fake_quantize import fake_quantize
from reptrt.sources.source import module_from_source
from tests.benchmarks.conftest import FORMS, SOURCE

X = torch.randn(32, 64, 16, 16, generator=torch.Generator().manual_seed(0))
GRID = Grid.activation(8)


def with_gradient(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        x, step = X.clone().requires_grad_(), torch.tensor(0.02, requires_grad=True)
        y = function(x, step)
        y.sum().backward()
        return y.detach()

    return run


QUANTIZERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reptrt": lambda x, step: fake_quantize(x, step, GRID),
    "torch": lambda x, step: torch._fake_quantize_learnable_per_tensor_affine(
        x, step.reshape(1), torch.zeros(1), GRID.qmin, GRID.qmax, 1.0
    ),
}


@pytest.mark.benchmark(group="learned step, forward and backward")
@pytest.mark.parametrize("whose", QUANTIZERS)
def test_fake_quantize(benchmark: BenchmarkFixture, whose: str) -> None:
    actual = benchmark(with_gradient(QUANTIZERS[whose]))
    expected = torch.fake_quantize_per_tensor_affine(X, 0.02, 0, GRID.qmin, GRID.qmax)
    torch.testing.assert_close(actual, expected)


@pytest.mark.benchmark(group="histogram of 2^19 values")
@pytest.mark.parametrize("whose", ["reptrt", "torch.histc", "numpy"])
def test_histogram(benchmark: BenchmarkFixture, whose: str) -> None:
    magnitude, bins = X.abs(), 8192
    top = float(magnitude.max())
    ways: dict[str, Callable[[], Any]] = {
        "reptrt": lambda: histogram_of(X).counts,
        "torch.histc": lambda: torch.histc(X.abs(), bins, 0, top).numpy(),
        "numpy": lambda: np.histogram(np.abs(X.numpy()), bins, (0, top))[0],
    }
    assert int(np.asarray(benchmark(ways[whose])).sum()) == X.numel()


@pytest.mark.benchmark(group="threshold rules")
@pytest.mark.parametrize("rule", get_args(Rule))
def test_threshold(benchmark: BenchmarkFixture, rule: Rule) -> None:
    histogram = histogram_of(X)
    kept = benchmark(lambda: amax_from_histogram(histogram, ThresholdOptions(rule, 99.99), GRID))
    assert 0 < kept <= histogram.maximum + histogram.width


@pytest.mark.benchmark(group="float net, batch 32")
@pytest.mark.parametrize("where", ["torch module", "torch graph", "onnxruntime"])
def test_float_net(
    benchmark: BenchmarkFixture, net: Net, float_file: Path, dataset: Dataset, where: str
) -> None:
    x = next(dataset.batches(32))
    module, graph = module_from_source(SOURCE).eval(), TorchGraph(net, torch.device("cpu"))
    with torch.inference_mode(), OrtRunner(float_file, threads=1) as runner:
        ways: dict[str, Callable[[], Any]] = {
            "torch module": lambda: module(torch.from_numpy(x)),
            "torch graph": lambda: graph(torch.from_numpy(x)),
            "onnxruntime": lambda: runner.run(x),
        }
        benchmark(ways[where])


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("form", ["float", *FORMS])
def test_latency(
    benchmark: BenchmarkFixture,
    float_file: Path,
    int8_files: dict[str, Path],
    dataset: Dataset,
    form: str,
    batch: int,
) -> None:
    benchmark.group = f"onnxruntime, batch {batch}"
    x = next(dataset.batches(batch))
    with OrtRunner({"float": float_file, **int8_files}[form], threads=1) as runner:
        assert benchmark(lambda: runner.run(x))


STARTS = {
    "python": "pass",
    "python and click": "import click",
    "reptrt --help": "from reptrt.cli import main; main(['--help'])",
}


@pytest.mark.benchmark(group="start of the command line")
@pytest.mark.parametrize("program", STARTS)
def test_start(benchmark: BenchmarkFixture, program: str) -> None:
    command = [sys.executable, "-c", STARTS[program]]
    done = benchmark.pedantic(
        lambda: subprocess.run(command, check=True, capture_output=True), rounds=7, warmup_rounds=1
    )
    assert done.returncode == 0
