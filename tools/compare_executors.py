"""How far the ways to run one INT8 file lie apart: torch, and onnxruntime in three ways.

    python tools/compare_executors.py --data test NET.int8.onnx [...]

"As written" is the Q/DQ graph as the file has it: without optimization node by node in float, with
optimization in onnxruntime's INT8 kernels. "Lowered" is what `reptrt eval` runs. Agreement of top-1
and SQNR against `reptrt.torchgraph` on the same images.
"""

from pathlib import Path

import click
import numpy as np
import torch
from compare_rests import logits

from reptrt.data import open_dataset
from reptrt.graph import net_from_model, read_model
from reptrt.metrics import agreement, sqnr_db
from reptrt.ort_lowering import lower
from reptrt.preprocess import read_preprocess
from reptrt.torch_runner import graph_runner

_BATCH = 100


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
            "as written": logits(model, dataset),
            "as written, optimized": logits(model, dataset, optimized=True),
            "lowered": logits(lower(model), dataset, optimized=True),
        }
        for way, found in ways.items():
            same, distance = 100 * agreement(expected, found), sqnr_db(expected, found)
            click.echo(f"{path.name}  {way}: agreement {same:.2f} %, {distance:.1f} dB")


if __name__ == "__main__":
    main()
