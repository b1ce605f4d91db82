"""Does the error at a detector's raw heads rank INT8 files as their mAP does?

    python tools/rank_measures.py NET.onnx --data images/ --annotations instances.json

Some of the images calibrate many files, from nearly lossless ones to ones with 5 bits; others judge
them by mAP and, without the annotations, by errors: of the outputs, each in units of its power, and
at the raw heads, as `reptrt.quantize.calib.measure` says. The result is Spearman's rank correlation
of each error with the mAP, over all files and over the better half, where the choices of a
calibration are made. Give images for calibration: those that judge a result choose no measure.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch

from reptrt.core.arrays import Float64Array
from reptrt.data.dataset import open_dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import net_from_model, read_model
from reptrt.graph.preprocess import read_preprocess
from reptrt.judge.evaluate import evaluate
from reptrt.judge.options import EvaluateOptions
from reptrt.pipeline import PLAIN_INT8, CalibrateOptions, calibrate
from reptrt.quantize.calib.measure import Measure, Sums, added, relative
from reptrt.quantize.calib.options import ThresholdOptions

_BATCH = 16
_FAST = CalibrateOptions()


def _bits(base: CalibrateOptions, weights: int, activations: int) -> CalibrateOptions:
    return replace(base, weight_bits=weights, activation_bits=activations)


def _rule(base: CalibrateOptions, name: str) -> CalibrateOptions:
    return replace(base, threshold=ThresholdOptions(name))  # type: ignore[arg-type]


_W6A6 = _bits(_FAST, 6, 6)
FILES: Mapping[str, CalibrateOptions] = {
    **{f"plain {rule}": _rule(PLAIN_INT8, rule) for rule in ("max", "percentile", "mse", "kl")},
    "plain mae": _rule(PLAIN_INT8, "mae"),
    "fast": _FAST,
    **{f"fast {rule}": _rule(_FAST, rule) for rule in ("max", "kl")},
    "fast, no split": replace(_FAST, split="none"),
    "fast, not equalized": replace(_FAST, equalize=False),
    **{f"fast W{w}A{a}": _bits(_FAST, w, a) for w, a in ((7, 7), (6, 8), (8, 6), (6, 6), (5, 8))},
    "fast W8A5": _bits(_FAST, 8, 5),
    **{f"plain W{w}A{a}": _bits(PLAIN_INT8, w, a) for w, a in ((7, 7), (6, 8), (8, 6), (6, 6))},
    **{f"fast W6A6 {rule}": _rule(_W6A6, rule) for rule in ("max", "kl")},
    "fast W6A6, no split": replace(_W6A6, split="none"),
    "fast W6A6, biases as they are": replace(_W6A6, correct_bias=False),
}


@click.command()
@click.argument("net", type=click.Path(path_type=Path, exists=True))
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--annotations", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--images", default=64, show_default=True, help="Images that calibrate.")
@click.option("--judges", default=96, show_default=True, help="Other images that judge.")
@click.option("--seed", default=0, show_default=True, help="Draws both.")
@click.option("-o", "output", type=click.Path(path_type=Path), help="JSON with all numbers.")
def main(
    net: Path, data: Path, annotations: Path, images: int, judges: int, seed: int, output: Path
) -> None:
    """Print the mAP and the errors of every file, and the rank correlations."""
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folders = _divided(data, Path(name), (images, judges), seed)
        for label, options in FILES.items():
            path = Path(name) / "int8.onnx"
            calibrate(net, folders[0], path, replace(options, images=images, seed=seed))
            rows[label] = {"map": _map(path, net, folders[1], annotations)}
            rows[label] |= _errors(net, path, folders[1])
            texts = (f"{key} {value:.4g}" for key, value in rows[label].items())
            click.echo(f"{label:30s}  " + "  ".join(texts))
            if output is not None:
                output.write_text(json.dumps(rows, indent=1))
    for key in ("outputs", "heads"):
        click.echo(f"{key:8s} " + "  ".join(f"{k} {v:.3f}" for k, v in _ranks(rows, key).items()))


def _divided(data: Path, folder: Path, counts: Sequence[int], seed: int) -> list[Path]:
    """Return two folders with links to different images of a folder."""
    files = sorted(path for path in data.iterdir() if path.is_file())
    order = np.random.default_rng(seed).permutation(len(files))
    folders, start = [], 0
    for label, count in zip(("calibrate", "judge"), counts, strict=True):
        (folder / label).mkdir()
        for index in order[start : start + count]:
            (folder / label / files[index].name).symlink_to(files[index].resolve())
        folders.append(folder / label)
        start += count
    return folders


def _map(path: Path, net: Path, images: Path, annotations: Path) -> float:
    options = EvaluateOptions(task="detect", annotations=annotations)
    return float(evaluate([path], images, options).results[0].measures["map"])


def _errors(net: Path, int8: Path, images: Path) -> dict[str, float]:
    """Return the errors of an INT8 file: of its outputs, at its heads, and each part of these."""
    nets = [net_from_model(read_model(path)) for path in (net, int8)]
    exact, rounded = (TorchGraph(one) for one in nets)
    measure = Measure(exact)
    names = [*measure.names, *exact.output_names]
    outputs: dict[str, Float64Array] = {}
    heads: Sums = {}
    with torch.inference_mode():
        for x in open_dataset(images, read_preprocess(nets[0])).batches(_BATCH):
            one, two = (
                graph.run({graph.input_names[0]: torch.from_numpy(x)}, names)
                for graph in (exact, rounded)
            )
            heads = added(
                heads, measure.sums(*({n: v[n] for n in measure.names} for v in (one, two)))
            )
            for name in exact.output_names:
                powers = np.array([float((one[name]).square().sum()),
                                   float((one[name] - two[name]).square().sum())])  # fmt: skip
                outputs[name] = outputs.get(name, np.zeros(2)) + powers
    parts = {group: float(relative(*pair)) for group, pair in heads.items()}
    total = sum(error / signal for signal, error in outputs.values())
    return {"outputs": float(total), "heads": sum(parts.values()), **parts}


def _ranks(rows: Mapping[str, Mapping[str, float]], key: str) -> dict[str, float]:
    """Return how far mAP falls as an error grows, over all files and over the better half."""
    best = sorted(rows.values(), key=lambda row: -row["map"])
    parts = {"all": best, "better half": best[: len(best) // 2]}
    return {
        name: spearman([row["map"] for row in part], [-row[key] for row in part])
        for name, part in parts.items()
    }


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the correlation of ranks; equal values share the mean of their ranks."""
    ranks = [
        [np.mean(np.flatnonzero(np.sort(values) == value)) for value in values]
        for values in (np.asarray(first), np.asarray(second))
    ]
    return float(np.corrcoef(ranks)[0, 1])


if __name__ == "__main__":
    main()
