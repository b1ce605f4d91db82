"""``reptrt eval``, ``predict``, ``diagnose`` and ``bench``."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from reptrt.cli.calibrate import fewer_images_line, with_fewer_images
from reptrt.cli.command import Command, emit
from reptrt.cli.fields import PATH, FieldOptions

_EVALUATE = FieldOptions("reptrt.judge.options:EvaluateOptions")
_SHARDS = FieldOptions("reptrt.sweeping.options:ShardOptions")
_PREDICT = FieldOptions("reptrt.judge.predict.options:PredictOptions")
_RANK = FieldOptions("reptrt.judge.options:RankOptions")
_BENCH = FieldOptions("reptrt.judge.options:BenchOptions")


@click.command("eval", cls=Command, options=[_EVALUATE, _SHARDS])
@click.argument("files", type=PATH, nargs=-1, required=True)
@click.option(
    "--data", type=PATH, required=True, help="Images to judge on: a folder, an .npz or an .npy."
)
def evaluate(files: Sequence[Path], data: Path, json_path: str | None, **values: Any) -> None:
    """Measure the accuracy of FILES on the same images.

    Prints top-1 and top-5 where the images have labels; agreement and SQNR with --reference.
    """
    options, shards = _EVALUATE.value(values), _SHARDS.value(values)
    if shards.shards is None:
        from reptrt.judge.evaluate import evaluate as judge

        report = judge(list(files), data, options)
    else:
        from reptrt.sweeping.sharded import evaluate_in_shards

        report = evaluate_in_shards(list(files), data, options, shards)
    emit(str(report), report.to_dict(), json_path)


@click.command(cls=Command, options=[_PREDICT])
@click.argument("file", type=PATH)
@click.argument("images", type=PATH, nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=PATH,
    help="Folder to draw into, or the picture of one image; default: nothing is drawn.",
)
def predict(
    file: Path, images: Sequence[Path], output: Path | None, json_path: str | None, **values: Any
) -> None:
    """Show what FILE finds in IMAGES, which are files or folders.

    A detector's boxes are drawn with the names of their classes and scores; a classifier's five
    best classes are listed below the image.
    """
    from reptrt.judge.predict.predicting import predict as find

    predictions = find(file, list(images), output, _PREDICT.value(values))
    emit(str(predictions), predictions.to_dict(), json_path)


@click.command(cls=Command, options=[_RANK])
@click.argument("model", type=PATH)
@click.option("--data", type=PATH, required=True, help="Calibration images.")
@click.option("--eval-data", type=PATH, help="Images to judge on; default: the calibration images.")
def diagnose(
    model: Path, data: Path, eval_data: Path | None, json_path: str | None, **values: Any
) -> None:
    """Rank the layers of the float ONNX file MODEL by what each costs alone in INT8.

    Nothing is written. All layers are compared by the error of the outputs; those with the largest
    are judged by the task: by mAP, by the agreement of classes, or by SQNR.
    """
    from reptrt.judge.diagnose.ranking import rank_layers

    options = _RANK.value(values)
    options = replace(options, calibrate=with_fewer_images(options.calibrate, data))
    report = rank_layers(model, eval_data or data, data, options)
    emit(str(report) + fewer_images_line(options.calibrate, data), report.to_dict(), json_path)


@click.command(cls=Command, options=[_BENCH])
@click.argument("files", type=PATH, nargs=-1, required=True)
def bench(files: Sequence[Path], json_path: str | None, **values: Any) -> None:
    """Time FILES side by side, in interleaved rounds.

    Prints the median and percentiles of the latency. With --baseline, explain each file that is not
    clearly faster than the baseline.
    """
    from reptrt.judge.bench import bench as measure
    from reptrt.judge.explain import explain_all

    report = measure(list(files), _BENCH.value(values))
    report = replace(report, explanations=explain_all(report))
    emit(str(report), report.to_dict(), json_path)
