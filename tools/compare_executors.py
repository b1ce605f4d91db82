"""Compare the ways to run one INT8 file: two in torch, three in onnxruntime.

    python tools/compare_executors.py --data test NET.int8.onnx [...]

"As written" is the Q/DQ graph of the file: without optimization it runs node by node in float, with
optimization in onnxruntime's INT8 kernels. "Lowered" is the graph that `reptrt eval` runs in
onnxruntime. Every other way is compared with it: agreement of top-1, SQNR, and the share of images
with the same output bits.
"""

from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from compare_rests import logits

from reptrt.core.metrics import agreement, sqnr_db
from reptrt.data.dataset import Dataset, open_dataset
from reptrt.execute.runner import OrtRunner, Runner
from reptrt.execute.torch_runner import graph_runner, int8_runner
from reptrt.graph.net import net_from_model, read_model
from reptrt.graph.preprocess import read_preprocess

_BATCH = 100


@click.command()
@click.argument("files", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--limit", type=int, help="Number of images; default: all.")
def main(files: tuple[Path, ...], data: Path, limit: int | None) -> None:
    """Run INT8 FILES in torch and in onnxruntime, and compare."""
    for path in files:
        model = read_model(path)
        dataset = open_dataset(data, read_preprocess(net_from_model(model)), limit=limit, seed=0)
        expected = outputs(OrtRunner(path), dataset)
        cpu = torch.device("cpu")
        ways = {
            "torch, lowered": outputs(int8_runner(model, cpu), dataset),
            "torch, as written": outputs(graph_runner(net_from_model(model), cpu), dataset),
            "onnxruntime, as written": logits(model, dataset),
            "onnxruntime, as written, optimized": logits(model, dataset, optimized=True),
        }
        for way, actual in ways.items():
            same, distance = (
                100 * agreement(expected, actual),
                sqnr_db(expected, actual),
            )
            equal = 100 * np.mean((actual == expected).all(axis=1))
            click.echo(
                f"{path.name}  {way}: agreement {same:.2f} %, {distance:.1f} dB, "
                f"the same bits {equal:.2f} %"
            )


def outputs(runner: Runner, dataset: Dataset) -> npt.NDArray[Any]:
    """Return the first output for all images."""
    with runner:
        name = runner.output_names[0]
        return np.concatenate([runner.run(x)[name] for x in dataset.batches(_BATCH)])


if __name__ == "__main__":
    main()
