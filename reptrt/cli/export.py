"""``reptrt export``, and the options that say what to export, which `run` and `ladder` take too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from reptrt.cli.command import Command, emit
from reptrt.cli.fields import PATH, FieldOptions

F = TypeVar("F", bound=Callable[..., Any])

ARCHITECTURE = FieldOptions("reptrt.sources.options:ArchitectureOptions")
EXPORT = FieldOptions("reptrt.pipeline.options:ExportOptions")


def weights_option(command: F) -> F:
    """Add --weights."""
    return click.option(
        "--weights",
        type=PATH,
        metavar="CKPT",
        help="Checkpoint (.pt, .pth or .safetensors), read as data: no code in it is run.",
    )(command)


def source_of(name: str, values: dict[str, Any]) -> Any:
    """Return the `Source` that SOURCE, --weights and the options of the architecture describe."""
    from reptrt.sources.source import Source

    return Source(name, values["weights"], ARCHITECTURE.value(values))


@click.command(cls=Command, options=(ARCHITECTURE, EXPORT))
@click.argument("source")
@click.option("-o", "--output", type=PATH, required=True, help="Float ONNX file to write.")
@weights_option
def export(source: str, output: Path, json_path: str | None, **values: Any) -> None:
    """Write SOURCE as one fused float ONNX file.

    The file is proved equal to the original on noise images. SOURCE is a zoo name (repvgg_a0,
    mobileone_s0, yolov6n, ...), timm:NAME, FILE.py:FACTORY, MODULE:FACTORY or an .onnx file, in
    train form or fused. Rep blocks are recognised by algebra, not by name.
    """
    from reptrt import pipeline

    report = pipeline.export(source_of(source, values), output, EXPORT.value(values))
    emit(str(report), report.to_dict(), json_path)
