"""Measure how much an FP16 rest changes the outputs of an INT8 net.

    python tools/compare_rests.py --data test --reference NET.onnx NET.int8.onnx

Each INT8 file with an FP32 rest is run in onnxruntime, and so is the form with an FP16 rest that
`reptrt build-engine` makes of it. Without graph optimization, every FP16 tensor is rounded to FP16,
as on a GPU. Prints the SQNR of the logits in dB: of the two forms against each other, and of each
form against the float net.
"""

from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime  # noqa: TID251  # OrtRunner would widen FP16, which hides its rounding

from reptrt.core.metrics import agreement, sqnr_db
from reptrt.data.dataset import Dataset, open_dataset
from reptrt.graph.net import net_from_model, read_model
from reptrt.graph.preprocess import read_preprocess
from reptrt.trt.input import with_rest

_BATCH = 50


def logits(
    model: onnx.ModelProto, dataset: Dataset, *, optimized: bool = False
) -> npt.NDArray[Any]:
    """Return the first output for all images; without optimization, node by node as written."""
    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    )
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: x})[0] for x in dataset.batches(_BATCH)])


@click.command()
@click.argument("files", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--reference", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--limit", type=int, default=2000, show_default=True)
def main(files: tuple[Path, ...], data: Path, reference: Path, limit: int) -> None:
    """Compare the FP32 and the FP16 rest of INT8 FILES."""
    model = read_model(reference)
    dataset = open_dataset(data, read_preprocess(net_from_model(model)), limit=limit, seed=0)
    expected = logits(model, dataset)
    click.echo("file  nodes in fp16  left in fp32  fp16 against fp32  fp32  fp16 (against float)")
    for path in files:
        full = read_model(path)
        half, rest = with_rest(full, "fp16")
        first, second = logits(full, dataset), logits(half, dataset)
        values = [sqnr_db(first, second), sqnr_db(expected, first), sqnr_db(expected, second)]
        click.echo(
            f"{path.name}  {rest.num_converted}  {len(rest.left_fp32)}  "
            + "  ".join(f"{value:.2f} dB" for value in values)
            + f"  agreement {100 * agreement(first, second):.2f} %"
        )


if __name__ == "__main__":
    main()
