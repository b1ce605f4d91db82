"""Compare reptrt with other quantizers: the same float ONNX file, images and judge for all.

    python tools/compare_rivals.py NET.onnx [NET.onnx ...] --calib IMAGES --test LABELLED -o OUT

Every rival runs in a virtual environment of its own, which pip makes under --environments and which
is reused the next time. It is set up as its documentation advises for TensorRT; the small script
for each rival in tools/rivals/ says how. All get the same --images preprocessed images as an .npy
file. `reptrt eval`, `lint` and `bench` judge the files that they write, in onnxruntime on a CPU;
the latency is measured in one thread, with all files of a net in turns, as the ratio to the float
net.

OUT/rivals.json and OUT/rivals.md contain the tables. A result for the same bytes, options and
versions is reused. The row of a rival that fails gives the reason. Without --test (for nets without
trained weights), accuracy is left out. Detectors are judged by mAP: --task detect.
"""

import os
import platform
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import click
from rivals import environments, measure
from rivals.measure import Bench, Result, Test
from rivals.rows import ADAROUND_ITERATIONS, Row, rows
from rivals.table import firsts, table

from reptrt.core.artifacts import package_versions, sha256_of, write_bytes, write_json
from reptrt.core.errors import ReptrtError
from reptrt.trt.machine import cpu_name

Batches = tuple[int, ...]


def one_row(at: Bench, row: Row) -> Result:
    """Let a row's tool write its file; if it fails, the result has the reason."""
    try:
        result = measure.quantize(at, row)
    except ReptrtError as err:
        result = Result(row.name, row.title, row.is_rival, row.mark, why=_short(str(err)))
    said = f"failed: {result.why}" if result.why else f"{result.seconds:.1f} s"
    click.echo(f"{at.net.stem:14s} {row.name:18s} {said}", err=True)
    return result


def float_row(at: Bench, test: Test | None) -> dict[str, Any]:
    """Return the size and the accuracy of the float net: its top-1 or mAP."""
    row: dict[str, Any] = {"kib": at.net.stat().st_size / 1024, "sha256": sha256_of(at.net)}
    if test is not None:
        row["accuracy"] = measure.cached(
            at.folder / "float.eval.json",
            [row["sha256"], *test.key],
            lambda: test.evaluate([at.net]).results[0].score,
        )
    return row


def compare(
    at: Bench, chosen: tuple[Row, ...], test: Test | None, batches: Batches
) -> dict[str, Any]:
    """Return all results for one net as JSON values."""
    results = [one_row(at, row) for row in chosen]
    if test is not None:
        results = measure.judge(at, results, test)
    timed, report = measure.time_all(at, results, batches)
    return {
        "net": at.net.name,
        "measure": "mAP" if test is not None and test.task == "detect" else "top-1",
        "float": float_row(at, test),
        "rows": [asdict(result) for result in timed],
        "firsts": firsts(timed, batches),
        "bench": {name: report[name] for name in ("cpu", "onnxruntime", "before", "remarks")},
        "table": table(timed, batches),
    }


def markdown(results: dict[str, Any]) -> list[str]:
    """Return the section for the results of one net."""
    accuracy = results["float"].get("accuracy")
    said = "" if accuracy is None else f", {results['measure']} {100 * accuracy:.2f} %"
    behind = [
        f"{first['column']}: {' '.join(first['rival'])} (reptrt: {' '.join(first['ours'])})"
        for first in results["firsts"]
        if first["rival_is_first"]
    ]
    lines = [f"## {results['net']}", "", f"Float: {results['float']['kib']:.0f} KiB{said}.", ""]
    lines += [*results["table"], "", "Columns that a rival leads, among files that TensorRT takes:"]
    return [*lines, "", *(f"- {line}" for line in behind or ["none"]), ""]


def _short(text: str, length: int = 300) -> str:
    line = " ".join(text.split()).replace("|", "/")
    return line if len(line) <= length else line[:length] + " ..."


def _numbers(_: click.Context, __: click.Parameter, text: str) -> Batches:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as err:
        raise click.BadParameter(f"got {text!r}, expected numbers such as 1,32") from err


_FOLDER = click.Path(path_type=Path, exists=True)


@click.command()
@click.argument("nets", nargs=-1, required=True, type=_FOLDER)
@click.option("--calib", required=True, type=_FOLDER, help="Images that calibrate.")
@click.option("--test", type=_FOLDER, help="Labelled images that judge.")
@click.option("--task", type=click.Choice(["classify", "detect"]), default="classify")
@click.option("--annotations", type=_FOLDER, help="COCO json of a detector's --test images.")
@click.option("-n", "--images", default=512, show_default=True, help="Number of --calib images.")
@click.option("--limit", type=int, help="Number of --test images; default: all.")
@click.option("-o", "--output", default=Path("build/rivals"), type=click.Path(path_type=Path))
@click.option(
    "--environments",
    "home",
    type=click.Path(path_type=Path),
    help="Folder of the rivals' environments; default: OUT/environments.",
)
@click.option("--rows", "pattern", default=".*", help="Regular expression over row names.")
@click.option("--batch", "batches", default="1,32", show_default=True, callback=_numbers)
@click.option("--adaround-iterations", default=ADAROUND_ITERATIONS, show_default=True)
@click.option("--timeout", default=7200.0, show_default=True, help="Seconds for one file.")
@click.option(
    "--bench-seconds",
    default=2.0,
    show_default=True,
    help="Seconds to time each file at each batch size.",
)
def main(
    nets: tuple[Path, ...],
    calib: Path,
    test: Path | None,
    task: Literal["classify", "detect"],
    annotations: Path | None,
    images: int,
    limit: int | None,
    output: Path,
    home: Path | None,
    pattern: str,
    batches: Batches,
    adaround_iterations: int,
    timeout: float,
    bench_seconds: float,
) -> None:
    """Compare reptrt with other quantizers on float NETS."""
    chosen = tuple(row for row in rows(adaround_iterations) if re.fullmatch(pattern, row.name))
    if not chosen:
        raise click.BadParameter(f"--rows {pattern}: no row has such a name")
    home = home or output / "environments"
    judge = None if test is None else Test(test, limit, task, annotations)
    sections = []
    for net in nets:
        at = Bench(net, output / net.stem, home, timeout, bench_seconds)
        at.folder.mkdir(parents=True, exist_ok=True)
        try:
            measure.write_images(at, calib, images)
            sections.append(compare(at, chosen, judge, batches))
        except ReptrtError as err:
            click.echo(f"error: {err}", err=True)
            sys.exit(1)
        used = {row.environment.name: row.environment for row in chosen if row.environment}
        write_json(
            output / "rivals.json",
            {
                "nets": sections,
                "images": images,
                "limit": limit,
                "threads": os.environ.get("OMP_NUM_THREADS"),
                "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "os": platform.platform()},
                "reptrt": package_versions(),
                "environments": {n: environments.versions(e, home) for n, e in used.items()},
            },
        )
        text = "\n".join(line for results in sections for line in markdown(results))
        write_bytes(output / "rivals.md", text.encode())
    click.echo((output / "rivals.md").read_text())


if __name__ == "__main__":
    main()
