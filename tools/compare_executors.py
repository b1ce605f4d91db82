"""How far the ways to run one INT8 file lie apart: torch, and onnxruntime in three ways.

    python tools/compare_executors.py --data test NET.int8.onnx [...]

"As written" is the Q/DQ graph as the file has it: without optimization node by node in float, with
optimization in onnxruntime's INT8 kernels. "Lowered" is what `reptrt eval` runs. Agreement of top-1
and SQNR against `reptrt.torchgraph` on the same images.
"""

from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime  # noqa: TID251  # OrtRunner would lower the graph
import torch

from reptrt.data import Dataset, open_dataset
from reptrt.graph import net_from_model, read_model
from reptrt.metrics import agreement, sqnr_db
from reptrt.ort_lowering import lower
from reptrt.preprocess import read_preprocess
from reptrt.torch_runner import graph_runner

_BATCH = 100
_LEVELS = onnxruntime.GraphOptimizationLevel


def logits(model: onnx.ModelProto, dataset: Dataset, level: Any) -> npt.NDArray[Any]:
    """Return the first output for all images, in one thread of onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.intra_op_num_threads = level, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: x})[0] for x in dataset.batches(_BATCH)])


@click.command()
@click.argument("files", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--limit", type=int, help="Images; all by default.")
def main(files: tuple[Path, ...], data: Path, limit: int | None) -> None:
    """Run INT8 FILES in torch and in onnxruntime, and compare."""
    for path in files:
        model = read_model(path)
        net = net_from_model(model)
        dataset = open_dataset(data, read_preprocess(net), limit=limit, seed=0)
        runner = graph_runner(net, torch.device("cpu"))
        expected = np.concatenate([runner.run(x)["output"] for x in dataset.batches(_BATCH)])
        ways = {
            "as written": logits(model, dataset, _LEVELS.ORT_DISABLE_ALL),
            "as written, optimized": logits(model, dataset, _LEVELS.ORT_ENABLE_ALL),
            "lowered": logits(lower(model), dataset, _LEVELS.ORT_ENABLE_ALL),
        }
        for way, found in ways.items():
            same, distance = 100 * agreement(expected, found), sqnr_db(expected, found)
            click.echo(f"{path.name}  {way}: agreement {same:.2f} %, {distance:.1f} dB")


if __name__ == "__main__":
    main()
