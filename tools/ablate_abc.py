"""What each part of learned calibration brings: SQNR of the logits on images nobody learned from.

    python tools/ablate_abc.py --data ../shared/cifar10/calib NET.onnx [NET.onnx ...]

Half of the images (sampled by the seed) calibrate, the other half judge; test images are not
touched, so a default may be chosen by this table. Rows add one part after the other:

    nearest          equalized, biases corrected, full range; nothing learned
    rounding, MSE    learned rounding, mean square error of each unit's output
    rounding, MAE    mean absolute error in its place
    + QPRep          gain and shift of each channel
    + steps          of activations: what recipe accurate does
    + stage          and the error of the stage's output, with the same weight as the unit's
    + stage / 10     with a tenth of it

Nets are float ONNX files as `reptrt export` writes them. One line a setting, mean and spread
(largest minus smallest) over the seeds.
"""

import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from held_out import halves

from reptrt.core.choices import SplitMode
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
    """Return SQNR in dB and agreement in percent on the half that judges."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calibrating, judging = halves(net, data, folder, seed)
        learn = None if learn is None else replace(learn, seed=seed)
        images = len(np.load(calibrating)["x"])
        chosen = replace(options, images=images, seed=seed, learn=learn)
        calibrate(net, calibrating, folder / "q.onnx", chosen)
        result = evaluate([folder / "q.onnx"], judging, EvaluateOptions(reference=net)).results[0]
        return result.sqnr_db or float("nan"), 100 * (result.agreement or float("nan"))


@click.command()
@click.argument("nets", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--bits", default="8,6", show_default=True, help="Of weights and activations.")
@click.option("--splits", default="none,auto", show_default=True)
@click.option("--rows", default=";".join(ROWS), help="Of the table, separated by ;.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--iterations", default=LearnOptions().iterations, show_default=True)
def main(
    nets: tuple[Path, ...],
    data: Path,
    bits: str,
    splits: str,
    rows: str,
    seeds: int,
    iterations: int,
) -> None:
    """Print a line for every net, bit width, split and row."""
    wanted = rows.split(";")
    if unknown := set(wanted) - ROWS.keys():
        raise click.BadParameter(f"{unknown}: expected of {list(ROWS)}", param_hint="--rows")
    kinds: list[SplitMode] = [kind for kind in ("none", "auto") if kind in splits.split(",")]
    click.echo(
        f"{'net':12s} bits split {'learned':15s} {'SQNR dB':>8s} {'spread':>6s} {'agr. %':>7s}"
    )
    for net, width, kind, row in itertools.product(nets, map(int, bits.split(",")), kinds, wanted):
        learn = ROWS[row]
        learn = None if learn is None else replace(learn, iterations=iterations)
        options = CalibrateOptions(split=kind, weight_bits=width, activation_bits=width)
        found = np.array([judge(net, data, options, learn, seed) for seed in range(seeds)])
        (sqnr, agreed), spread = found.mean(axis=0), np.ptp(found[:, 0])
        cells = f"{row:15s} {sqnr:8.2f} {spread:6.2f} {agreed:7.2f}"
        click.echo(f"{net.stem:12s} {width:4d} {kind:5s} {cells}")


if __name__ == "__main__":
    main()
