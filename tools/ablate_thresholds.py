"""Compare the threshold rules: SQNR of the logits on images that no rule has seen.

    python tools/ablate_thresholds.py --data ../shared/cifar10/calib NET.onnx [NET.onnx ...]

Half of the images (sampled by --seed) calibrate, the other half judge; test images are not touched,
so a default may be chosen by this table. Nets are float ONNX files as `reptrt export` writes them.
"""

import itertools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import get_args

import click
import numpy as np
from held_out import halves

from reptrt.calib.thresholds import ThresholdOptions
from reptrt.choices import Rule
from reptrt.evaluate import evaluate
from reptrt.pipeline import CalibrateOptions, calibrate


@click.command()
@click.argument("nets", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--bits", default="8,6", show_default=True, help="Of weights and activations.")
@click.option("--seed", default=0, show_default=True)
def main(nets: tuple[Path, ...], data: Path, bits: str, seed: int) -> None:
    """Print SQNR in dB for every net, bit width, preparation and rule, and each rule's mean."""
    rules = get_args(Rule)
    click.echo("  ".join([f"{'net':16s} bits equalize", *(f"{rule:>10s}" for rule in rules)]))
    table = []
    for net, width, equal in itertools.product(nets, map(int, bits.split(",")), (False, True)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            calibrating, judging = halves(net, data, folder, seed)
            base = CalibrateOptions(
                images=len(np.load(calibrating)["x"]),
                equalize=equal,
                weight_bits=width,
                activation_bits=width,
            )
            row = []
            for rule in rules:
                options = replace(base, threshold=ThresholdOptions(rule))
                calibrate(net, calibrating, folder / "q.onnx", options)
                report = evaluate([folder / "q.onnx"], judging, reference=net)
                row.append(report.results[0].sqnr_db or float("nan"))
        table.append(row)
        cells = "  ".join(f"{value:10.2f}" for value in row)
        click.echo(f"{net.stem:16s} {width:4d} {'yes' if equal else 'no':>8s}  {cells}")
    means = np.mean(table, axis=0)
    click.echo(f"{'mean':30s}  " + "  ".join(f"{value:10.2f}" for value in means))


if __name__ == "__main__":
    main()
