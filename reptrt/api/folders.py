"""run, report and ladder, as a program calls them."""

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from reptrt.api.networks import path_from
from reptrt.api.stages import source_from
from reptrt.core.errors import ConfigError, option
from reptrt.core.keywords import options_from, parameters, takes, unknown
from reptrt.data.dataset import Images
from reptrt.data.from_user import images_from
from reptrt.judge.rungs import Ladder
from reptrt.pipeline import at_most_all
from reptrt.runs import ladder as ladders
from reptrt.runs import run as runs
from reptrt.runs.options import RunOptions
from reptrt.runs.report import ReportFile, write_report
from reptrt.runs.run import RunReport
from reptrt.sources.options import ArchitectureOptions
from reptrt.sources.source import Source

_ARCHITECTURE = tuple(item.name for item in fields(ArchitectureOptions))
_OF_RUNS_ONLY = ("batches", "diagnose", "bench_seconds")


@takes(RunOptions, ArchitectureOptions)
def run(
    source: Source | str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    eval_data: str | os.PathLike[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
    options: RunOptions | None = None,
    **changes: Any,
) -> RunReport:
    """Take a source through all stages into one folder; a run that was stopped continues.

    Everything that a run reads is a file, so that it can be repeated from its record.

    Args:
        source: the name of a network of the zoo, "file.py:factory", or an .onnx file.
        data: calibration images: a folder, an .npz or an .npy.
        output: the folder of the run; made if it does not exist.
        eval_data: images to judge on; None: the calibration images.
        weights: a checkpoint for a network of the zoo or a factory.
        options: the options as one value, in place of their defaults.
        **changes: single options of any stage.

    Raises:
        ReptrtError: a stage failed; what was finished stays.
    """
    running, architecture = _options(options, changes, ("source", "data", "output", "eval_data"))
    calibrated_on = path_from(data, "data")
    made_of = source_from(source, weights, architecture)
    if isinstance(made_of, nn.Module):
        raise ConfigError(
            f"{option('source')}: got a module in memory, expected what a later run can load again:"
            " a name, FILE.py:FACTORY or an .onnx file"
        )
    judged_on = None if eval_data is None else path_from(eval_data, "eval_data")
    folder = path_from(output, "output")
    if options is None and "images" not in changes:
        running = _with_fewer_images(running, calibrated_on)
    return runs.run(made_of, calibrated_on, folder, running, judged_on)


def report(
    folder: str | os.PathLike[str], output: str | os.PathLike[str] | None = None
) -> ReportFile:
    """Write the results of a run as one HTML file that loads nothing.

    Args:
        folder: of the run, finished or stopped.
        output: the file to write; None: ``report.html`` in the folder.

    Raises:
        ArtifactError: there is no record of a run, or the file cannot be written.
    """
    target = None if output is None else path_from(output, "output")
    return write_report(path_from(folder, "folder"), target)


@takes(RunOptions, ArchitectureOptions, without=_OF_RUNS_ONLY)
def ladder(
    source: nn.Module | Source | str | os.PathLike[str],
    data: Any = None,
    calib_data: Any = None,
    *,
    weights: str | os.PathLike[str] | None = None,
    options: RunOptions | None = None,
    **changes: Any,
) -> Ladder:
    """Judge every form of a network between its source and its engine on the same images.

    >>> reptrt.ladder(model, (images, labels), calib, input_size=(3, 32, 32), recipe="accurate")

    Args:
        source: what `export` takes; or the folder of a finished run, whose options, images and
            files are used.
        data: images to judge on, in the forms that `evaluate` takes; of a run None: its own.
        calib_data: calibration images, in the forms that `calibrate` takes; not for a run.
        weights: a checkpoint for a network of the zoo or a factory.
        options: the options as one value, in place of their defaults; not for a run.
        **changes: single options of export, calibration and build; of a run ``eval_limit`` only.

    Raises:
        ReptrtError: a stage failed, or a form other than the engine cannot be run.
    """
    others = ("source", "data", "calib_data")
    climbing, architecture = _options(options, changes, others, without=_OF_RUNS_ONLY)
    if isinstance(source, str | os.PathLike) and Path(source).is_dir():
        asked = [name for name in (*changes, *architecture) if name != "eval_limit"]
        asked += [
            name
            for name, value in (("calib_data", calib_data), ("options", options))
            if value is not None
        ]
        if asked:
            raise ConfigError(
                f"{option(asked[0])}: {source} is a run, its options are recorded; leave it out"
            )
        judged_on = None if data is None else path_from(data, "data")
        return ladders.ladder_of_run(Path(source), judged_on, climbing.eval_limit)
    for parameter, value in (("data", data), ("calib_data", calib_data)):
        if value is None:
            raise ConfigError(f"{option(parameter)}: got None, expected images")
    images = images_from(data, limit=climbing.eval_limit, parameter="data")
    calibrated_on = images_from(
        calib_data, limit=climbing.calibrate.images, labels=False, parameter="calib_data"
    )
    if options is None and "images" not in changes:
        climbing = _with_fewer_images(climbing, calibrated_on)
    made_of = source_from(source, weights, architecture)
    return ladders.ladder(made_of, images, calibrated_on, climbing)


def _with_fewer_images(options: RunOptions, data: Images) -> RunOptions:
    """Return options that calibrate on all images if there are fewer than the default."""
    return replace(options, calibrate=at_most_all(options.calibrate, data))


def _options(
    options: RunOptions | None,
    changes: dict[str, Any],
    others: tuple[str, ...],
    without: tuple[str, ...] = (),
) -> tuple[RunOptions, dict[str, Any]]:
    """Return the options of a run, and what the changes say of the architecture.

    Args:
        options: the value of the parameter ``options``.
        changes: the keyword arguments.
        others: names of the caller's own parameters.
        without: names of options that the caller does not take.
    """
    architecture = {name: changes[name] for name in _ARCHITECTURE if name in changes}
    rest = {name: value for name, value in changes.items() if name not in architecture}
    names = (*others, "weights", *_ARCHITECTURE)
    for name in rest:
        if name in without:
            raise unknown(name, [n for n in (*parameters(RunOptions), *names) if n not in without])
    return options_from(RunOptions, options, rest, names), architecture
