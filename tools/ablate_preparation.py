"""Measure what equalization, full range and splits gain: SQNR of the logits on held-out images.

    python tools/ablate_preparation.py --data ../shared/cifar10/calib NET.onnx [NET.onnx ...]

A random half of the images calibrates, the other half judges. Test images are not used, so this
table may be used to choose defaults. Nothing is learned. Rows:

    nothing          thresholds and biases only
    equalized        channels scaled against both noises, no extra node
    full range       all 256 codes behind ReLUs, as far as the budget goes, without equalization
    both             the two together: the policy "whole"
    identity         and every layer split in this form that can be
    coarse-fine      likewise
    auto             the default: the candidate whose outputs are nearest
    auto, not equal  likewise, without equalization

Each line has the mean over the seeds, the spread (largest minus smallest), and the extra work.
"""

import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from held_out import halves

from reptrt.judge.evaluate import evaluate
from reptrt.judge.options import EvaluateOptions
from reptrt.pipeline import CalibrateOptions, calibrate

AUTO = CalibrateOptions()
WHOLE = replace(AUTO, split="none")
ROWS: dict[str, CalibrateOptions] = {
    "nothing": replace(WHOLE, equalize=False, full_range=False),
    "equalized": replace(WHOLE, full_range=False),
    "full range": replace(WHOLE, equalize=False),
    "both": WHOLE,
    "identity": replace(AUTO, split="identity"),
    "coarse-fine": replace(AUTO, split="coarse-fine"),
    "auto": AUTO,
    "auto, not equal": replace(AUTO, equalize=False),
}


def judge(net: Path, data: Path, options: CalibrateOptions, seed: int) -> tuple[float, float]:
    """Return SQNR in dB on the half of the images that judges, and the extra work in percent."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calibrating, judging = halves(net, data, folder, seed)
        options = replace(options, images=len(np.load(calibrating)["x"]))
        report = calibrate(net, calibrating, folder / "q.onnx", options)
        result = evaluate([folder / "q.onnx"], judging, EvaluateOptions(reference=net)).results[0]
        return result.sqnr_db or float("nan"), 100 * report.overhead


@click.command()
@click.argument("nets", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--bits", default="8,6", show_default=True, help="Bits of weights and activations.")
@click.option("--seeds", default=3, show_default=True, help="Number of random halves.")
@click.option("--rows", default=";".join(ROWS), help="Rows of the table, separated by ;.")
def main(nets: tuple[Path, ...], data: Path, bits: str, seeds: int, rows: str) -> None:
    """Print a line for every net, bit width and row."""
    names = rows.split(";")
    if unknown := set(names) - ROWS.keys():
        message = f"got {sorted(unknown)}, expected rows of {list(ROWS)}"
        raise click.BadParameter(message, param_hint="--rows")
    click.echo(f"{'net':12s} bits {'':15s} {'SQNR dB':>8s} {'spread':>6s} {'work %':>7s}")
    for net, width, row in itertools.product(nets, map(int, bits.split(",")), names):
        options = replace(ROWS[row], weight_bits=width, activation_bits=width)
        results = np.array([judge(net, data, options, seed) for seed in range(seeds)])
        (sqnr, work), spread = results.mean(axis=0), np.ptp(results[:, 0])
        click.echo(f"{net.stem:12s} {width:4d} {row:15s} {sqnr:8.2f} {spread:6.2f} {work:7.1f}")


if __name__ == "__main__":
    main()
