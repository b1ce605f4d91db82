"""Other people's nets through all stages: one row for each, which works or says why not.

    python tools/sweep_models.py -o OUT.json [--only REGEX] [--again] [--no-engine]
    python tools/sweep_models.py -o OUT.json --page docs/models.md --only '^$'

Nets of timm and look-alikes of detectors and segmentation nets (tools/sweep/) are exported,
calibrated with the default options on noise images, checked by lint and built as engines (where
TensorRT is installed). Weights are random, with the batch norms' statistics measured on noise:
what is fused, what runs in INT8 and what lint says are those of the architecture; the SQNR shows
that nothing is broken, not what a trained net loses.

OUT.json is written after every net; nets that are in it are not measured again, except those that
failed and with --again all that --only names. --page writes the table.
"""

import json
import logging
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from sweep.measure import measure
from sweep.rows import rows
from sweep.table import page

from reptrt.core.artifacts import package_versions, write_bytes, write_json


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--only", default="", help="Regular expression for names of nets.")
@click.option("--again", is_flag=True, help="Measure nets that are in the output already.")
@click.option("--engine/--no-engine", default=True, help="Build engines.")
@click.option("--page", "page_path", type=click.Path(path_type=Path), help="Write the table here.")
def main(output: Path, only: str, again: bool, engine: bool, page_path: Path | None) -> None:
    """Measure nets and keep the results in a JSON file."""
    logging.disable(logging.WARNING)
    results: dict[str, Any] = json.loads(output.read_text())["nets"] if output.exists() else {}
    nets = [row for row in rows() if re.search(only, row.name)]
    with tempfile.TemporaryDirectory() as folder:
        for row in nets:
            known = results.get(row.name)
            if known is not None and not known["failed"] and not again:
                continue
            result = asdict(measure(row, Path(folder), engine=engine))
            results[row.name] = result
            write_json(output, {"nets": results, "versions": package_versions()})
            click.echo(f"{row.name:24s} {_said(result)}", err=True)
    if page_path is not None:
        names = [row.name for row in rows()]
        missing = [name for name in names if name not in results]
        measured = [results[name] for name in names if name in results]
        versions = json.loads(output.read_text())["versions"]
        write_bytes(page_path, page(measured, versions, missing).encode())


def _said(result: dict[str, Any]) -> str:
    """Return one line on a result."""
    reasons = [f"{step}: {reason}" for step, reason in result["failed"].items()]
    return "; ".join(reasons) or f"{sum(result['seconds'].values()):.1f} s"


if __name__ == "__main__":
    main()
