"""Does the error at a detector's raw heads rank INT8 files as their mAP does?

    python tools/rank_measures.py NET.onnx --data images/ --annotations instances.json

Some of the images calibrate many files, from nearly lossless ones to ones with 5 bits; others judge
them by mAP and, without the annotations, by errors: of the outputs, each in units of its power, and
at the raw heads, as `reptrt.quantize.calib.measure` says. The result is Spearman's rank correlation
of each error with the mAP, over all files and over the better half, where the choices of a
calibration are made. Give images for calibration: those that judge a result choose no measure.

With -o every row is kept as soon as it is there; a run of the same arguments that was stopped goes
on behind the last one.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from reptrt.core.artifacts import sha256_of, write_json
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
    **{f"fast W{w}A{a}": _bits(_FAST, w, a) for w, a in ((8, 5), (5, 5), (4, 8))},
    **{f"plain W{w}A{a}": _bits(PLAIN_INT8, w, a) for w, a in ((7, 7), (6, 8), (8, 6), (6, 6))},
    **{f"plain W{w}A{a}": _bits(PLAIN_INT8, w, a) for w, a in ((5, 8), (8, 5))},
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
    asked = {"net": sha256_of(net), "images": images, "judges": judges, "seed": seed}
    rows = _kept(output, asked)
    with tempfile.TemporaryDirectory() as name:
        folders = _divided(data, Path(name), (images, judges), seed)
        judge = _Judge(net, folders[1])
        _part_of(annotations, folders[1])
        for label, options in FILES.items():
            if label in rows:
                continue
            path = Path(name) / "int8.onnx"
            calibrate(net, folders[0], path, replace(options, images=images, seed=seed))
            rows[label] = {"map": _map(path, folders[1])}
            rows[label] |= judge.errors(path)
            texts = (f"{key} {value:.4g}" for key, value in rows[label].items())
            click.echo(f"{label:30s}  " + "  ".join(texts))
            if output is not None:
                write_json(output, {**asked, "rows": rows})
    click.echo("\n".join(table(rows)))


def _kept(output: Path | None, asked: Mapping[str, object]) -> dict[str, dict[str, float]]:
    """Return the rows of an earlier run of the same arguments."""
    stored = json.loads(output.read_text()) if output is not None and output.exists() else {}
    return dict(stored["rows"]) if asked.items() <= stored.items() else {}


def table(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the lines of two Markdown tables: the files by mAP, and the rank correlations."""
    lines = ["| file | mAP | outputs, 1e-5 | raw heads, 1e-3 |", "|---|---|---|---|"]
    for label, row in sorted(rows.items(), key=lambda item: -item[1]["map"]):
        errors = f"{1e5 * row['outputs']:.1f} | {1e3 * row['heads']:.2f}"
        lines.append(f"| {label} | {100 * row['map']:.1f} | {errors} |")
    ranks = {key: _ranks(rows, key) for key in ("outputs", "heads")}
    lines += ["", "| Spearman with mAP | outputs | raw heads |", "|---|---|---|"]
    for part in ranks["heads"]:
        lines.append(f"| {part} | {ranks['outputs'][part]:.2f} | {ranks['heads'][part]:.2f} |")
    return lines


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


def _part_of(annotations: Path, folder: Path) -> None:
    """Write the annotations of the images in a folder where `evaluate` finds them, in it."""
    coco = json.loads(annotations.read_text())
    names = {path.name for path in folder.iterdir()}
    coco["images"] = [image for image in coco["images"] if image["file_name"] in names]
    kept = {image["id"] for image in coco["images"]}
    coco["annotations"] = [one for one in coco["annotations"] if one["image_id"] in kept]
    (folder / "annotations.json").write_text(json.dumps(coco))


def _map(path: Path, images: Path) -> float:
    return float(
        evaluate([path], images, EvaluateOptions(task="detect")).results[0].measures["map"]
    )


class _Judge:
    """The float net's values on the judging images, to compare those of INT8 files with."""

    def __init__(self, net: Path, images: Path) -> None:
        float_net = net_from_model(read_model(net))
        graph = TorchGraph(float_net)
        self._measure = Measure(graph)
        self._outputs, self._input = graph.output_names, graph.input_names[0]
        batches = open_dataset(images, read_preprocess(float_net)).batches(_BATCH)
        self._exact = [(x, self._run(graph, x)) for x in map(torch.from_numpy, batches)]

    def errors(self, int8: Path) -> dict[str, float]:
        """Return the errors of an INT8 file: of its outputs, at its heads, and each part of these.

        The outputs count each in units of its power.
        """
        graph = TorchGraph(net_from_model(read_model(int8)))
        sums: Sums = {}
        powers = {name: np.zeros(2) for name in self._outputs}
        for x, exact in self._exact:
            values = self._run(graph, x)
            heads = ({name: v[name] for name in self._measure.names} for v in (exact, values))
            sums = added(sums, self._measure.sums(*heads))
            for name in self._outputs:
                parts = (exact[name], exact[name] - values[name])
                powers[name] += [float(part.square().sum()) for part in parts]
        parts = {group: float(relative(*pair)) for group, pair in sums.items()}
        outputs = float(sum(error / signal for signal, error in powers.values()))
        return {"outputs": outputs, "heads": sum(parts.values()), **parts}

    def _run(self, graph: TorchGraph, x: Tensor) -> dict[str, Tensor]:
        with torch.inference_mode():
            return graph.run({self._input: x}, [*self._measure.names, *self._outputs])


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
