"""python -m reptrt.demo: all stages on two small nets, and the tables of their results."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from reptrt.core.errors import ReptrtError

if TYPE_CHECKING:
    from reptrt.demo.comparison import Comparison
    from reptrt.demo.detection import Detection


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
    """Take two small trained nets from their checkpoints to INT8; print what it costs.

    A RepVGG classifies scikit-learn's handwritten digits, and becomes an engine. A YOLOv6 finds
    such digits in pictures. Calibration uses training images only; the tables are measured on
    images that were held out from training and calibration.
    """
    from reptrt.core.artifacts import make_folder, write_json
    from reptrt.demo.comparison import compare
    from reptrt.demo.detection import detect

    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        make_folder(output)
        comparison = compare(output)
        _print_comparison(console, comparison)
        detection = detect(output)
        _print_detection(console, detection)
        if json_path is not None:
            write_json(json_path, comparison.to_dict() | {"detection": detection.to_dict()})
    except ReptrtError as err:
        click.echo(f"error: {' '.join(str(err).split())}", err=True)
        sys.exit(1)


def _print_comparison(console: Console, comparison: "Comparison") -> None:
    console.print("A RepVGG that classifies digits:")
    console.print(comparison.to_table())
    console.print(comparison.engine_line(), soft_wrap=True, highlight=False)
    console.print("\nWhat each step to the last file changes:")
    console.print(comparison.ladder.to_table())
    for line in comparison.ladder.to_lines():
        console.print(line, soft_wrap=True, highlight=False)


def _print_detection(console: Console, detection: "Detection") -> None:
    console.print("\nA YOLOv6 that finds digits in pictures:")
    console.print(detection.to_table())
    console.print(
        f"{detection.drawn}: boxes of the float net above, of reptrt INT8 below",
        soft_wrap=True,
        highlight=False,
    )


if __name__ == "__main__":
    main()
