"""Compare `reptrt tune` with other searches for an INT8 file that meets a bound on top-1.

    python tools/compare_tuners.py NET.onnx --calib IMAGES --eval-data LABELLED -o OUT

All get the same float ONNX file, the same preprocessed images to calibrate on, and the same half of
the labelled images to tune on. Files are judged on the other half by `reptrt eval`, and timed side
by side in onnxruntime with one thread, as the ratio to plain INT8. Rivals run in environments of
their own, as in `tools/compare_rivals.py`. OUT/tuners.json has all numbers. A search that is done
is not repeated; one that fails has its reason as its row.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from rivals import measure
from rivals.measure import Bench
from rivals.rows import Row, tuners

from reptrt.core.artifacts import write_json
from reptrt.core.choices import TargetName
from reptrt.core.errors import ReptrtError
from reptrt.data.dataset import open_dataset
from reptrt.graph.net import net_from_model, read_model
from reptrt.graph.preprocess import read_preprocess
from reptrt.judge.bench import bench
from reptrt.judge.evaluate import evaluate
from reptrt.judge.options import BenchOptions, EvaluateOptions
from reptrt.search.judging import parts
from reptrt.search.options import TuneOptions
from reptrt.search.tuning import tune

SEED = 0
_FOLDER = click.Path(path_type=Path, exists=True)


def write_tuning(at: Bench, data: Path, taken: list[int]) -> dict[str, str]:
    """Write the images to tune on and their labels for the rivals; return the options."""
    preprocess = read_preprocess(net_from_model(read_model(at.net)))
    dataset = open_dataset(data, preprocess, taken=taken)
    images, labels = at.folder / "tuning.npy", at.folder / "tuning.labels.npy"
    if not labels.exists():
        np.save(images, np.concatenate(list(dataset.batches(64))))
        np.save(labels, dataset.labels)
    return {"images": str(images.resolve()), "labels": str(labels.resolve())}


def search(at: Bench, row: Row) -> dict[str, Any]:
    """Let a rival search; return what it took, or why it failed."""
    try:
        measure.quantize(at, row)
    except ReptrtError as err:
        return {"why": " ".join(str(err).split())[:300]}
    took: dict[str, Any] = json.loads((at.folder / f"{row.name}.quantize.json").read_text())
    return dict(took["value"])


def search_ourselves(
    at: Bench, calib: Path, data: Path, options: TuneOptions, folder: Path
) -> dict[str, Any]:
    """Search with `reptrt tune`; return what it took by its record."""
    tuned = tune(at.net, calib, data, folder, options)
    made = [row for row in tuned.rows if row.seconds is not None]
    return {
        "seconds": sum(row.seconds or 0.0 for row in made),
        "evaluations": sum(row.judged is not None for row in made),
        "chosen": tuned.chosen,
        "met": tuned.met,
    }


@click.command()
@click.argument("net", type=_FOLDER)
@click.option("--calib", required=True, type=_FOLDER, help="Images that calibrate.")
@click.option("--eval-data", "data", required=True, type=_FOLDER, help="Labelled images.")
@click.option("-n", "--images", default=512, show_default=True, help="Number of --calib images.")
@click.option("--max-drop", default=0.1, show_default=True, help="Points of top-1.")
@click.option("--target", default="onnxruntime", show_default=True)
@click.option("--tune-folder", type=click.Path(path_type=Path), help="Of an earlier `tune`.")
@click.option("--rows", "names", default="tune,nncf-control,modelopt-auto", show_default=True)
@click.option("--environments", "home", type=click.Path(path_type=Path))
@click.option("--timeout", default=7200.0, show_default=True, help="Seconds for one search.")
@click.option("-o", "--output", default=Path("build/tuners"), type=click.Path(path_type=Path))
def main(
    net: Path,
    calib: Path,
    data: Path,
    images: int,
    max_drop: float,
    target: TargetName,
    tune_folder: Path | None,
    names: str,
    home: Path | None,
    timeout: float,
    output: Path,
) -> None:
    """Search with each tool, judge and time the files, write OUT/tuners.json."""
    output.mkdir(parents=True, exist_ok=True)
    at = Bench(net, output, home or output / "environments", timeout)
    preprocess = read_preprocess(net_from_model(read_model(net)))
    tuning, confirming = parts(open_dataset(data, preprocess).length, None, SEED)
    measure.write_images(at, calib, images)
    options = {**write_tuning(at, data, tuning), "max_drop": max_drop / 100}
    results: dict[str, dict[str, Any]] = {}
    files: dict[str, Path] = {}
    for row in tuners(options):
        if row.name in names.split(","):
            results[row.name] = {"title": row.title, **search(at, row)}
            files[row.name] = output / f"{row.name}.onnx"
    if "tune" in names.split(","):
        folder = tune_folder or output / "tune"
        asked = TuneOptions(max_drop=max_drop, target=target, images=images, threads=1, seed=SEED)
        found = search_ourselves(at, calib, data, asked, folder)
        results["tune"] = {"title": "reptrt tune", **found}
        files |= {"plain": folder / "trials/plain/int8.onnx", "tune": folder / "best.onnx"}
    files = {name: path for name, path in files.items() if path.exists()}
    judged: dict[str, Any] = {}
    for part, taken in (("tuning", tuning), ("confirming", confirming)):
        judge = EvaluateOptions(reference=net, threads=1)
        report = evaluate([net, *files.values()], data, judge, taken=taken)
        judged[part] = dict(zip(["float", *files], report.to_dict()["results"], strict=True))
    timed = bench(
        [net, *files.values()],
        BenchOptions(
            batches=(1, 32), threads=1, baseline=files.get("plain", net), min_seconds=2.0, seed=SEED
        ),
    )
    write_json(
        output / "tuners.json",
        {
            "options": {**asdict(at), "net": str(net), "folder": None, "environments": None}
            | {"sources": None, "max_drop": max_drop, "images": images},
            "results": results,
            "judged": judged,
            "bench": timed.to_dict(),
        },
    )
    for part, rows in judged.items():
        for name, row in rows.items():
            click.echo(f"{part:10s} {name:14s} {100 * row['top1']:.2f} % {row['sqnr_db']}")
    click.echo(str(timed))


if __name__ == "__main__":
    main()
