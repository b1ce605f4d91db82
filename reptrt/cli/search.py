"""``reptrt tune``."""

from pathlib import Path
from typing import Any

import click

from reptrt.cli.command import Command, emit
from reptrt.cli.fields import PATH, FieldOptions

_TUNE = FieldOptions("reptrt.search.options:TuneOptions")


@click.command(cls=Command, options=[_TUNE])
@click.argument("model", type=PATH)
@click.option("--data", type=PATH, required=True, help="Calibration images.")
@click.option(
    "--eval-data",
    type=PATH,
    required=True,
    help="Images to judge on: one half to tune on, the other to confirm the choice on.",
)
@click.option("-o", "--output", type=PATH, required=True, help="Folder of the search.")
def tune(
    model: Path, data: Path, eval_data: Path, output: Path, json_path: str | None, **values: Any
) -> None:
    """Search for the cheapest INT8 file of the float ONNX file MODEL that meets a bound.

    Tries plain INT8 first, then recipes, splits and layers in float, on more and more images, and
    writes best.onnx. A search that was stopped continues when the same command is given again.
    Exits with 1 if nothing meets the bound; best.onnx is then the most accurate file.
    """
    from reptrt.search.tuning import tune as search

    tuned = search(model, data, eval_data, output, _TUNE.value(values))
    emit(str(tuned), tuned.to_dict(), json_path)
    if not tuned.met:
        click.get_current_context().exit(1)
