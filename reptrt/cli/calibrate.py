"""``reptrt calibrate`` and ``reptrt lint``."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from reptrt.cli.command import Command, emit
from reptrt.cli.fields import PATH, FieldOptions

CALIBRATE = FieldOptions("reptrt.pipeline.options:CalibrateOptions")


@click.command(cls=Command, options=[CALIBRATE])
@click.argument("model", type=PATH)
@click.option(
    "--data", type=PATH, required=True, help="Calibration images: a folder, an .npz or an .npy."
)
@click.option("-o", "--output", type=PATH, required=True, help="INT8 ONNX file to write.")
@click.option(
    "--diagnose", is_flag=True, help="Also measure where the net loses accuracy, and say why."
)
def calibrate(
    model: Path, data: Path, output: Path, diagnose: bool, json_path: str | None, **values: Any
) -> None:
    """Quantize the float ONNX file MODEL to INT8.

    The scales of activations are measured on the images of --data.
    """
    from reptrt import pipeline

    options = with_fewer_images(CALIBRATE.value(values), data)
    diagnoses: list[Any] = []

    def measure(calibrated: Any) -> None:
        from reptrt.judge.diagnose import diagnose as measured

        diagnoses.append(measured(model, data, options, calibrated))

    report = pipeline.calibrate(model, data, output, options, measure if diagnose else None)
    text, content = str(report), report.to_dict()
    text += fewer_images_line(options, data)
    for diagnosis in diagnoses:
        from reptrt.core.result import text_of

        tables = [text_of(table) + "\n" for table in diagnosis.to_tables()]
        text = "\n".join([text, "", *tables, *diagnosis.to_lines()])
        content |= {"diagnosis": diagnosis.to_dict()}
    emit(text, content, json_path)


def with_fewer_images(options: Any, data: Path) -> Any:
    """Return options that take all images if the default asks for more than there are.

    Args:
        options: of calibration.
        data: calibration images.
    """
    from reptrt.pipeline import at_most_all

    return at_most_all(options, data) if _is_default_number() else options


def fewer_images_line(options: Any, data: Path) -> str:
    """Return a line that says so where `with_fewer_images` took fewer images, else nothing."""
    default = CALIBRATE.kind().images
    if not _is_default_number() or options.images == default:
        return ""
    return f"\n{data}: fewer images than the default {default}, all {options.images} were used"


def _is_default_number() -> bool:
    source = click.get_current_context().get_parameter_source("images")
    return source is ParameterSource.DEFAULT


@click.command(cls=Command)
@click.argument("model", type=PATH)
def lint(model: Path, json_path: str | None) -> None:
    """Check the Q/DQ ONNX file MODEL for TensorRT.

    Lists what TensorRT refuses, what makes the engine slow and what costs accuracy. Needs neither
    TensorRT nor a GPU. Exits with 1 if there are errors.
    """
    from reptrt.linter import lint as check

    report = check(model)
    emit(str(report), report.to_dict(), json_path)
    if report.has_errors:
        click.get_current_context().exit(1)
