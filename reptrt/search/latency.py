"""What files cost where they will run, as ratios to plain INT8.

For onnxruntime, files are timed here in interleaved rounds (`reptrt.judge.bench`). For TensorRT the
cost is computed from shapes with the roofline model (`reptrt.judge.cost`):

    sum over layers of max(multiply-accumulates / R, bytes) + bytes of the passes that add splits

R is the number of multiply-accumulates that the processor computes while it moves one byte; a layer
in float runs in half precision, at half the rate and with two bytes for each value.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from reptrt.core.choices import TargetName
from reptrt.graph.net import net_from_model, read_model
from reptrt.graph.splits import read_splits
from reptrt.judge.bench import bench
from reptrt.judge.cost import LayerCost, layer_costs
from reptrt.judge.options import BenchOptions
from reptrt.search.options import TuneOptions


@dataclass(frozen=True, slots=True)
class Machine:
    """What the model has to know of a target."""

    macs_per_byte: float  # of INT8
    float_rate: float  # of a layer in float, as a share of that of INT8
    float_bytes: float  # of a value in float, as a share of what the file says
    source: str


MACHINES: Mapping[TargetName, Machine] = {
    "tensorrt": Machine(
        *(200.0, 0.5, 0.5),
        "data sheet of the A100: 312e12 multiply-accumulates in INT8 and 1.56e12 bytes a second",
    ),
    "onnxruntime": Machine(
        *(8.0, 0.25, 1.0),
        "assumed, for the order of trials alone: latencies are measured",
    ),
}
MEASURED: tuple[TargetName, ...] = ("onnxruntime",)  # that run where the search does


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a file as a ratio to that of plain INT8."""

    ratio: float
    low: float | None = None  # 95 % interval; None: by the model
    high: float | None = None
    median_ms: float | None = None  # None: by the model


def model_time(path: Path, target: TargetName, batch: int) -> float:
    """Return the time of a file by the model, in units of the time to move one byte."""
    model, machine = read_model(path), MACHINES[target]
    layers = sum(_layer_time(cost, machine) for cost in layer_costs(model, batch))
    return layers + batch * _split_bytes(model)


def measure(
    files: Sequence[Path], plain: Path, of_float: Path, options: TuneOptions
) -> tuple[dict[Path, Cost], Cost]:
    """Time files in interleaved rounds; return the cost of each, and that of the float net."""
    every = list(dict.fromkeys([plain, of_float, *files]))
    report = bench(
        every,
        BenchOptions(
            batches=(options.batch,),
            threads=options.threads,
            baseline=plain,
            min_seconds=options.bench_seconds,
            warmup_seconds=options.bench_seconds / 4,
            seed=options.seed,
        ),
    )
    costs = {
        path: Cost(float(row.ratio or 1.0), row.ratio_low, row.ratio_high, row.median_ms)
        for path, row in zip(every, report.results, strict=True)
    }
    return costs, costs[of_float]


def _layer_time(cost: LayerCost, machine: Machine) -> float:
    if cost.is_int8:
        return cost.time(machine.macs_per_byte)
    work = cost.macs / (machine.macs_per_byte * machine.float_rate)
    return max(work, cost.bytes_moved * machine.float_bytes)


def _split_bytes(model: onnx.ModelProto) -> float:
    """Return the bytes of one more operand for each sum of a split, for one image."""
    net = net_from_model(onnx.shape_inference.infer_shapes(model))
    nodes = {node.name: node for node in net.graph.nodes}
    total = 0
    for split in read_splits(net):
        node = nodes.get(split.sum)
        shape = node.outputs[0].shape if node is not None else None
        sizes = [size for size in (shape or ())[1:] if isinstance(size, int)]
        total += math.prod(sizes) if sizes else 0
    return float(total)
