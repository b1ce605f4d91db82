"""python -m reptrt.demo: the whole way on the digits, and the table that comes out."""

import sys
from pathlib import Path

import click
from rich.console import Console

from reptrt.errors import ArtifactError, ReptrtError


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder for all files; made if it does not exist.",
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the table as JSON."
)
def main(output: Path, json_path: Path | None) -> None:
    """Take a small trained RepVGG from its checkpoint to INT8 and an engine; print what it costs.

    The net reads scikit-learn's handwritten digits. Calibration sees training images only, the
    table is about images held out from both.
    """
    from reptrt.artifacts import write_json
    from reptrt.demo.ladder import climb

    try:
        _make_folder(output)
        ladder = climb(output)
        if json_path is not None:
            write_json(json_path, ladder.to_json())
    except ReptrtError as err:
        click.echo(f"error: {' '.join(str(err).split())}", err=True)
        sys.exit(1)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(ladder.to_table())
    console.print(ladder.engine_line(), soft_wrap=True, highlight=False)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ArtifactError(f"{path}: cannot be made a folder ({err.strerror or err})") from err


if __name__ == "__main__":
    main()
