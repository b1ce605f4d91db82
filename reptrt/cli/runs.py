"""``reptrt run`` and what is done with finished runs: report, ladder, replay and diff."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from reptrt.cli.calibrate import CALIBRATE, fewer_images_line, with_fewer_images
from reptrt.cli.command import Command, emit
from reptrt.cli.export import ARCHITECTURE, EXPORT, source_of, weights_option
from reptrt.cli.fields import PATH, FieldOptions

_OPTIONS = "reptrt.runs.options:RunOptions"
_TASK = (
    *("task", "annotations", "layout", "boxes", "confidence", "iou", "max_boxes", "clip"),
    "subset",
    "eval_limit",
)
_RUN = FieldOptions(_OPTIONS, only=(*_TASK, "batches", "threads", "diagnose", "bench_seconds"))
_LADDER = FieldOptions(_OPTIONS, only=(*_TASK, "threads"), flags={"eval_limit": "--limit"})
_BUILD = FieldOptions(
    "reptrt.trt.options:BuildOptions", only=("targets",), flags={"targets": "--gpu-target"}
)
_STAGES = (_BUILD, ARCHITECTURE, EXPORT, CALIBRATE)


@click.command(cls=Command, options=(_RUN, *_STAGES))
@click.argument("source")
@click.option("--data", type=PATH, required=True, help="Calibration images.")
@click.option("--eval-data", type=PATH, help="Images to judge on; default: the calibration images.")
@click.option("-o", "--output", type=PATH, required=True, help="Folder of the run.")
@weights_option
def run(
    source: str,
    data: Path,
    eval_data: Path | None,
    output: Path,
    json_path: str | None,
    **values: Any,
) -> None:
    """Take SOURCE through all stages into one folder.

    A run that was stopped is continued when the same command is given again.
    """
    from reptrt.runs.run import run as run_all

    options = _with_stages(_RUN.value(values), values, data)
    report = run_all(source_of(source, values), data, output, options, eval_data)
    text = str(report) + fewer_images_line(options.calibrate, data)
    emit(text, report.to_dict(), json_path)


def _with_stages(options: Any, values: dict[str, Any], data: Path) -> Any:
    """Return options of a run with the options of its stages."""
    return replace(
        options,
        export=EXPORT.value(values),
        calibrate=with_fewer_images(CALIBRATE.value(values), data),
        build=_BUILD.value(values),
    )


@click.command(cls=Command)
@click.argument("folder", metavar="RUN_DIR", type=PATH)
@click.option("-o", "--output", type=PATH, help="File to write; default: report.html in RUN_DIR.")
def report(folder: Path, output: Path | None, json_path: str | None) -> None:
    """Write the run in RUN_DIR as one self-contained HTML file.

    Only files in RUN_DIR are read. Each part that is missing is named, with the reason.
    """
    from reptrt.runs.report import write_report

    written = write_report(folder, output)
    lines = [f"{s.title}: not here: {s.absent}" for s in written.sections if s.absent is not None]
    lines.append(f"report  {written.path}  {written.size_bytes / 2**10:.0f} KiB")
    emit("\n".join(lines), written.to_dict(), json_path)


@click.command(cls=Command, options=(_LADDER, *_STAGES))
@click.argument("source", metavar="SOURCE|RUN_DIR")
@click.option(
    "--data", type=PATH, help="Images to judge on; default for RUN_DIR: those of the run."
)
@click.option("--calib-data", type=PATH, help="Calibration images.")
@weights_option
def ladder(
    source: str,
    data: Path | None,
    calib_data: Path | None,
    json_path: str | None,
    **values: Any,
) -> None:
    """Judge every form of a net from checkpoint to engine.

    All forms run on the same images. Each rung is compared with the first (the loss so far) and
    with the rung before it (the loss of this step alone). SOURCE is what `export` takes; it needs
    --data and --calib-data. RUN_DIR is the folder of a finished `run`, whose options, images and
    files are used; only --data and --limit may be given.
    """
    from reptrt.runs import ladder as rungs

    line = ""
    if Path(source).is_dir():
        _refuse_given(("source", "data", "eval_limit", "json_path"), f"{source} is a run")
        climbed = rungs.ladder_of_run(Path(source), data, values["eval_limit"])
    elif data is None or calib_data is None:
        raise click.UsageError("SOURCE needs --data and --calib-data")
    else:
        options = _with_stages(_LADDER.value(values), values, calib_data)
        climbed = rungs.ladder(source_of(source, values), data, calib_data, options)
        line = fewer_images_line(options.calibrate, calib_data)
    emit(str(climbed) + line, climbed.to_dict(), json_path)


def _refuse_given(allowed: Sequence[str], why: str) -> None:
    """Refuse options that were given on the command line and would have no effect."""
    ctx = click.get_current_context()
    for parameter in ctx.command.params:
        name = parameter.name or ""
        is_given = ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if is_given and name not in allowed:
            raise click.UsageError(f"{parameter.opts[0]}: {why}, its options are recorded")


@click.command(cls=Command)
@click.argument("folder", metavar="RUN_DIR", type=PATH)
@click.option(
    "-o", "--output", type=PATH, help="Folder to keep the replay in; default: it is not kept."
)
@click.option("--data", type=PATH, help="Calibration images, if they have moved.")
@click.option("--eval-data", type=PATH, help="Images to judge on, if they have moved.")
@click.option("--weights", type=PATH, help="Checkpoint, if it has moved.")
@click.option("--source", help="ONNX file or factory, if it has moved.")
def replay(folder: Path, output: Path | None, json_path: str | None, **values: Any) -> None:
    """Repeat the run in RUN_DIR and compare the files.

    Everything is repeated from the record of the run; files are compared by sha256. The inputs must
    have the same content; they may have moved. Exits with 1 if a file differs that must be equal.
    """
    from reptrt.runs.replay import Moved
    from reptrt.runs.replay import replay as repeat

    report = repeat(folder, output, Moved(**values))
    emit(str(report), report.to_dict(), json_path)
    if not report.reproduced:
        click.get_current_context().exit(1)


@click.command(cls=Command)
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
def diff(a: Path, b: Path, json_path: str | None) -> None:
    """Compare two folders of finished runs, or two ONNX files.

    Shows options, inputs, versions and files that differ, scales and weight codes layer by layer,
    and the results of both.
    """
    from reptrt.runs.diff import diff as compare

    report = compare(a, b)
    emit(str(report), report.to_dict(), json_path)
