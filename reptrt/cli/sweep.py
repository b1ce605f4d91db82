"""``reptrt sweep``."""

from pathlib import Path
from typing import Any

import click

from reptrt.cli.command import Command, emit
from reptrt.cli.fields import PATH, FieldOptions

_SWEEP = FieldOptions("reptrt.sweeping.options:SweepOptions")


@click.command(cls=Command, options=[_SWEEP])
@click.argument("file", metavar="FILE.toml", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Folder of the table and report.")
def sweep(file: Path, output: Path, json_path: str | None, **values: Any) -> None:
    """Calibrate and judge many nets for many targets with many recipes.

    FILE.toml names them. Each trial is a row of one table; finished trials are kept, and a sweep
    that was stopped continues when the same command is given again. Exits with 1 if a trial or an
    engine failed.
    """
    from reptrt.sweeping.reading import read_sheet
    from reptrt.sweeping.sweeping import sweep as work

    swept = work(read_sheet(file), output, _SWEEP.value(values))
    emit(str(swept), swept.to_dict(), json_path)
    if not swept.is_complete:
        click.get_current_context().exit(1)
