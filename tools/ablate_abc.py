"""Measure how much each part of learned calibration gains: SQNR of the logits on held-out images.

    python tools/ablate_abc.py --data ../shared/cifar10/calib NET.onnx [NET.onnx ...]

A random half of the images calibrates, the other half judges. Test images are not used, so this
table may be used to choose defaults. Each row adds one part:

    nearest          equalized, biases corrected, full range; nothing is learned
    rounding, MSE    learned rounding; loss: mean square error of each unit's output
    rounding, MAE    loss: mean absolute error instead
    + QPRep          also a gain and a shift for each channel
    + steps          also the steps of activations; this is the recipe accurate
    + stage          also the error of the stage's output in the loss, with the same weight
    + stage / 10     the same with a tenth of the weight

Nets are float ONNX files as `reptrt export` writes them. Each line has the mean over the seeds, and
the spread (largest minus smallest).
"""

import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from held_out import halves

from reptrt.core.choices import Rounding, SplitMode
from reptrt.judge.evaluate import evaluate
from reptrt.judge.options import EvaluateOptions
from reptrt.pipeline import CalibrateOptions, calibrate
from reptrt.quantize.reconstruct.options import LearnOptions

ALL = LearnOptions()
ROUNDING = replace(ALL, affine=False, steps=False)
ROWS: dict[str, LearnOptions | None] = {
    "nearest": None,
    "rounding, MSE": replace(ROUNDING, loss="mse"),
    "rounding, MAE": ROUNDING,
    "+ QPRep": replace(ROUNDING, affine=True),
    "+ steps": ALL,
    "+ stage": replace(ALL, stage_weight=1.0),
    "+ stage / 10": replace(ALL, stage_weight=0.1),
}


def judge(
    net: Path, data: Path, options: CalibrateOptions, learn: LearnOptions | None, seed: int
) -> tuple[float, float]:
    """Return SQNR in dB and agreement in percent on the half of the images that judges."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calibrating, judging = halves(net, data, folder, seed)
        learn = None if learn is None else replace(learn, seed=seed)
        images = len(np.load(calibrating)["x"])
        rounding: Rounding | None = "nearest" if learn is None else None
        options = replace(options, images=images, seed=seed, learn=learn, rounding=rounding)
        calibrate(net, calibrating, folder / "q.onnx", options)
        result = evaluate([folder / "q.onnx"], judging, EvaluateOptions(reference=net)).results[0]
        return result.sqnr_db or float("nan"), 100 * (result.agreement or float("nan"))


@click.command()
@click.argument("nets", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--bits", default="8,6", show_default=True, help="Bits of weights and activations.")
@click.option("--splits", default="none,auto", show_default=True, help="Split modes.")
@click.option("--rows", default=";".join(ROWS), help="Rows of the table, separated by ;.")
@click.option("--seeds", default=3, show_default=True, help="Number of random halves.")
@click.option(
    "--iterations",
    default=LearnOptions().iterations,
    show_default=True,
    help="Iterations per unit.",
)
def main(
    nets: tuple[Path, ...],
    data: Path,
    bits: str,
    splits: str,
    rows: str,
    seeds: int,
    iterations: int,
) -> None:
    """Print a line for every net, bit width, split mode and row."""
    names = rows.split(";")
    if unknown := set(names) - ROWS.keys():
        message = f"got {sorted(unknown)}, expected rows of {list(ROWS)}"
        raise click.BadParameter(message, param_hint="--rows")
    kinds: list[SplitMode] = [kind for kind in ("none", "auto") if kind in splits.split(",")]
    click.echo(
        f"{'net':12s} bits split {'learned':15s} {'SQNR dB':>8s} {'spread':>6s} {'agr. %':>7s}"
    )
    for net, width, kind, row in itertools.product(nets, map(int, bits.split(",")), kinds, names):
        learn = ROWS[row]
        learn = None if learn is None else replace(learn, iterations=iterations)
        options = CalibrateOptions(split=kind, weight_bits=width, activation_bits=width)
        results = np.array([judge(net, data, options, learn, seed) for seed in range(seeds)])
        (sqnr, agreed), spread = results.mean(axis=0), np.ptp(results[:, 0])
        cells = f"{row:15s} {sqnr:8.2f} {spread:6.2f} {agreed:7.2f}"
        click.echo(f"{net.stem:12s} {width:4d} {kind:5s} {cells}")


if __name__ == "__main__":
    main()
