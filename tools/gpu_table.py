"""Several gpu_check.json files -> the tables of docs/results.md, on stdout.

    python tools/gpu_table.py rtx4090.json h100.json

The first table has a row for each engine and batch size, the second one for each calibration on
both devices, the third one for each step that failed. Files that are sent in are only read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from gpu_check import COLUMNS, engine_rows, markdown

CALIBRATION = ("GPU", "net", "recipe", "images", "CPU s", "CUDA s", "largest difference of a scale")
FAILED = ("GPU", "net", "step", "state", "why")


@dataclass(frozen=True, slots=True)
class Checked:
    """One gpu_check.json."""

    gpu: str
    model: str
    steps: Sequence[Mapping[str, Any]]

    @property
    def done(self) -> dict[str, Mapping[str, Any]]:
        """Step -> result, of the steps that were done."""
        return {step["name"]: step["result"] for step in self.steps if step["state"] == "done"}


def checked(path: Path) -> Checked:
    """Read a file.

    Raises:
        click.ClickException: it is not what gpu_check writes.
    """
    try:
        report = json.loads(path.read_text())
        steps = report["steps"]
        environment = next(step for step in steps if step["name"] == "environment")["result"]
        gpu = f"{environment['gpu'] or 'no GPU'}, driver {environment['driver'] or '-'}"
        return Checked(gpu, report["model"], steps)
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as err:
        raise click.ClickException(
            f"{path}: {type(err).__name__} {err}; expected gpu_check.json of tools/gpu_check.py"
        ) from err


def tables(files: Sequence[Checked]) -> list[str]:
    """Return the lines of the three tables; an empty one is left out."""
    engines = [[file.gpu, file.model, *row] for file in files for row in engine_rows(file.done)]
    failed = [
        [file.gpu, file.model, step["name"], step["state"], str(step["why"]).replace("|", r"\|")]
        for file in files
        for step in file.steps
        if step["state"] != "done"
    ]
    lines: list[str] = []
    for columns, rows in (
        (("GPU", "net", *COLUMNS), engines),
        (CALIBRATION, [row for file in files for row in _calibrations(file)]),
        (FAILED, failed),
    ):
        lines += [*markdown(columns, rows), ""] if rows else []
    return lines


def _calibrations(file: Checked) -> list[list[str]]:
    rows = []
    for name, both in file.done.items():
        words = name.split()
        if words[0] == "calibrate" and words[-3:] == ["cpu", "against", "cuda"]:
            images = file.done[f"calibrate {words[1]} cuda"]["images"]
            seconds = [f"{both['cpu_seconds']:.1f}", f"{both['cuda_seconds']:.1f}"]
            difference = f"{both['max_relative_difference']:.1e}"
            rows.append([file.gpu, file.model, words[1], str(images), *seconds, difference])
    return rows


@click.command(help=(__doc__ or "").splitlines()[0])
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
def main(files: tuple[Path, ...]) -> None:
    """Print the tables."""
    click.echo("\n".join(tables([checked(path) for path in files])))


if __name__ == "__main__":
    main()
