"""Compare the threshold rules by the SQNR of the logits on held-out images.

    python tools/ablate_thresholds.py --data ../shared/cifar10/calib NET.onnx [NET.onnx ...]

For each seed, a random half of the images calibrates and the other half judges. Test images are not
used, so this table may be used to choose defaults. Nets are float ONNX files as `reptrt export`
writes them.
"""

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import click
import numpy as np
import numpy.typing as npt
from held_out import halves

from reptrt.core.choices import Threshold
from reptrt.judge.evaluate import evaluate
from reptrt.judge.options import EvaluateOptions
from reptrt.pipeline import CalibrateOptions, calibrate
from reptrt.quantize.calib.options import ThresholdOptions

Row = npt.NDArray[np.float64]  # one value for each rule


@click.command()
@click.argument("nets", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--bits", default="8,6", show_default=True, help="Bits of weights and activations.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Seeds of the random halves.")
@click.option(
    "--rules",
    "names",
    default=",".join(get_args(Threshold)),
    show_default=True,
    help="Rules to compare.",
)
def main(nets: tuple[Path, ...], data: Path, bits: str, seeds: str, names: str) -> None:
    """Print SQNR in dB for every net, bit width, equalization and rule, and each rule's means."""
    rules = [ThresholdOptions(name) for name in names.split(",")]  # type: ignore[arg-type]
    head = [f"{'net':16s} bits equalize", *(f"{options.rule:>10s}" for options in rules)]
    click.echo("  ".join(head))
    table: dict[bool, list[Row]] = {True: [], False: []}
    for net, width, equal in itertools.product(nets, map(int, bits.split(",")), table):
        options = CalibrateOptions(equalize=equal, weight_bits=width, activation_bits=width)
        samples = [_row(net, data, options, rules, int(seed)) for seed in seeds.split(",")]
        row = np.mean(samples, axis=0)
        table[equal].append(row)
        _print(f"{net.stem:16s} {width:4d} {'yes' if equal else 'no':>8s}", row)
    _print(f"{'mean, equalized':30s}", np.mean(table[True], axis=0))
    _print(f"{'mean':30s}", np.mean([*table[True], *table[False]], axis=0))


def _row(
    net: Path, data: Path, base: CalibrateOptions, rules: Sequence[ThresholdOptions], seed: int
) -> Row:
    """Return the SQNR of every rule for one seed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calibrating, judging = halves(net, data, folder, seed)
        sqnrs = []
        for rule in rules:
            images = len(np.load(calibrating)["x"])
            options = replace(base, images=images, threshold=rule)
            calibrate(net, calibrating, folder / "q.onnx", options)
            report = evaluate([folder / "q.onnx"], judging, EvaluateOptions(reference=net))
            sqnrs.append(report.results[0].sqnr_db or float("nan"))
    return np.array(sqnrs)


def _print(label: str, row: Row) -> None:
    click.echo(f"{label}  " + "  ".join(f"{value:10.2f}" for value in row))


if __name__ == "__main__":
    main()
