"""python -m reptrt.demo: all stages on the digits, and the tables of their results."""

import sys
from pathlib import Path

import click
from rich.console import Console

from reptrt.core.errors import ArtifactError, ReptrtError


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder for all files; created if it does not exist.",
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the tables as JSON."
)
def main(output: Path, json_path: Path | None) -> None:
    """Take a small trained RepVGG from its checkpoint to INT8 and an engine; print the accuracy.

    The net classifies scikit-learn's handwritten digits. Calibration uses training images only; the
    tables are measured on images that were held out from training and calibration.
    """
    from reptrt.core.artifacts import write_json
    from reptrt.demo.comparison import compare

    try:
        _make_folder(output)
        comparison = compare(output)
        if json_path is not None:
            write_json(json_path, comparison.to_dict())
    except ReptrtError as err:
        click.echo(f"error: {' '.join(str(err).split())}", err=True)
        sys.exit(1)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(comparison.to_table())
    console.print(comparison.engine_line(), soft_wrap=True, highlight=False)
    console.print("\nWhat each step to the last file changes:")
    console.print(comparison.ladder.to_table())
    for line in comparison.ladder.to_lines():
        console.print(line, soft_wrap=True, highlight=False)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ArtifactError(
            f"{path}: cannot be created as a folder ({err.strerror or err})"
        ) from err


if __name__ == "__main__":
    main()
