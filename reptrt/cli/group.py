"""The command line: thin calls to `reptrt.pipeline`.

Results go to stdout, progress and logs to stderr. Exit 0 done, 1 a stated failure (one line), 2
usage, 130 Ctrl-C. Nothing heavy is imported before a command runs.
"""

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from click.core import ParameterSource

from reptrt import __version__
from reptrt.core import choices
from reptrt.core.errors import ConfigError, ReptrtError, flag_of

T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., Any])

_OUTPUT = click.Path(path_type=Path)
_INTERRUPTED = 130  # what a shell gives for a process that SIGINT ended


class NumberList(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """Numbers separated by commas (or by x, for sizes)."""

    def __init__(self, kind: Callable[[str], float], separator: str = ",", count: int = 0) -> None:
        self.kind, self.separator, self.count = kind, separator, count
        self.name = "CxHxW" if separator == "x" else "n,n,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Return the numbers, or a usage error."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self.kind(item) for item in str(value).lower().split(self.separator))
        except ValueError:
            self.fail(f"{value!r}: expected {self.name}", param, ctx)
        if self.count and (len(numbers) != self.count or min(numbers) <= 0):
            self.fail(f"{value!r}: expected {self.count} positive numbers", param, ctx)
        return numbers


INTS, FLOATS, SIZE = NumberList(int), NumberList(float), NumberList(int, "x", 3)


class Cli(click.Group):
    """A group that prints a stated failure, or that it was stopped, as one line."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except ReptrtError as err:
            click.echo(f"error: {' '.join(err.on_cli(_flag_in(ctx)).split())}", err=True)
            ctx.exit(1)
        except MemoryError as err:
            click.echo(f"error: not enough memory ({' '.join(str(err).split())})", err=True)
            ctx.exit(1)
        except RuntimeError as err:
            if type(err).__name__ != "OutOfMemoryError":  # torch's, which may not be loaded
                raise
            click.echo(
                "error: the memory of the device is used up; end what else runs there, or use "
                "--device cpu",
                err=True,
            )
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("Aborted! No file is half-written.", err=True)
            ctx.exit(_INTERRUPTED)


def _flag_in(ctx: click.Context) -> Callable[[str], str]:
    """Return a function from a parameter's name to its flag in the command that was called."""
    called = main.commands.get(ctx.invoked_subcommand or "")
    options = [p for p in called.params if isinstance(p, click.Option)] if called else []
    flags = {option.name: max(option.opts, key=len) for option in options}
    return lambda name: flags.get(name) or flag_of(name)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help="Log what happens, to stderr.")
def main(verbose: bool) -> None:
    """Re-parameterized CNNs from a PyTorch checkpoint to an accurate INT8 TensorRT engine.

    One verb a stage: export -> calibrate -> build-engine -> eval, bench. `reptrt run` does it all.
    """
    # Threads that spin while they wait multiply the time on cores that are shared with other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("reptrt")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    # What learning will cost is said before it starts; what became of each unit, with -v.
    logging.getLogger("reptrt.quantize.reconstruct").setLevel(
        logging.DEBUG if verbose else logging.INFO
    )


def _choice(literal: Any) -> click.Choice[str]:
    return click.Choice(list(get_args(literal)))


def _json_option(command: Command) -> Command:
    return click.option(
        "--json",
        "json_path",
        metavar="F",
        callback=_json_target,
        help="Write the result as JSON; - is stdout.",
    )(command)


def _json_target(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Refuse, before any work, a JSON file that cannot be written or that has another meaning."""
    if value is None or value == "-":
        return value
    from reptrt.core.artifacts import require_folder

    path = Path(value)
    require_folder(path)
    if path.suffix == ".json" and Path(path.stem).suffix in (".onnx", ".engine"):
        raise ConfigError(f"--json {path}: is the sidecar of {path.stem}; give another name")
    return value


def _emit(text: str, content: Any, json_path: str | None) -> None:
    """Print the result for people, and write or print it as JSON."""
    if json_path == "-":
        click.echo(json.dumps(content, indent=2))
        return
    if json_path is not None:
        from reptrt.core.artifacts import write_json

        write_json(Path(json_path), content)
    click.echo(text)


def source_options(command: Command) -> Command:
    """Add the options that say what to export."""
    options = [
        click.option(
            "--weights",
            type=click.Path(path_type=Path),
            metavar="CKPT",
            help="State dict, read as data: .pt, .pth, .safetensors.",
        ),
        click.option("--input-size", type=SIZE, help="Image size, e.g. 3x224x224."),
        click.option("--num-classes", type=int, help="Default: what the weights have, or 1000."),
        click.option("--widths", type=INTS, help="Channels per stage, stem first."),
        click.option("--blocks", type=INTS, help="Blocks per stage, without the stem."),
        click.option("--strides", type=INTS, help="Stride of each stage, stem first."),
        click.option("--groups", type=int, help="RepVGG: groups of every second layer."),
        click.option("--branches", type=int, help="MobileOne: k x k branches per block."),
        click.option("--mean", type=FLOATS, help="Per channel, of x / 255."),
        click.option("--std", type=FLOATS, help="Per channel, of x / 255."),
        click.option("--resize", type=_choice(choices.Resize), help="For images of other sizes."),
        click.option(
            "--opset",
            type=click.IntRange(13, 20),
            default=19,
            show_default=True,
            help="Of the ONNX file; FP16 scales need 19.",
        ),
        click.option(
            "--tolerance",
            type=float,
            default=1e-4,
            show_default=True,
            help="Largest difference allowed after fusion, of the largest value.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _source_and_options(source: str, values: dict[str, Any]) -> tuple[Any, Any]:
    from reptrt.pipeline import ExportOptions
    from reptrt.sources.options import ArchitectureOptions
    from reptrt.sources.source import Source

    names = ("widths", "blocks", "strides", "groups", "branches", "num_classes")
    architecture = ArchitectureOptions(**{name: values[name] for name in names})
    kept = ("input_size", "mean", "std", "resize", "opset", "tolerance")
    options = ExportOptions(**{name: values[name] for name in kept})
    return Source(source, values["weights"], architecture), options


@main.command()
@click.argument("source")
@click.option("-o", "--output", type=_OUTPUT, required=True, help="Float ONNX file to write.")
@source_options
@_json_option
def export(source: str, output: Path, json_path: str | None, **values: Any) -> None:
    """Write SOURCE as one fused float ONNX file, proved equal to the original.

    SOURCE is a zoo name (repvgg, mobileone, repvgg_a0, ...), FILE.py:FACTORY, MODULE:FACTORY or
    an .onnx file, train-form or fused. Rep blocks are found by algebra, not by name.
    """
    from reptrt import pipeline

    what, options = _source_and_options(source, values)
    report = pipeline.export(what, output, options)
    overall = report.proof.overall
    lines = [
        f"{block.name:32s} max difference {block.max_difference:.2e}"
        for block in report.proof.blocks
    ]
    lines += [f"{skip.node:32s} left alone: {skip.reason}" for skip in report.skipped]
    lines.append(
        f"export  {report.path}  {len(report.proof.blocks)} blocks fused  "
        f"{report.num_parameters / 1e6:.2f} M parameters  "
        f"max |original - fused| {overall.max_difference:.2e} of {overall.max_value:.3g}  "
        f"{report.seconds:.1f} s"
    )
    _emit("\n".join(lines), report.to_dict(), json_path)


def calibrate_options(command: Command) -> Command:
    """Add the options that say how to quantize."""
    rules, devices = _choice(choices.Threshold), _choice(choices.TorchDevice)
    options = [
        click.option(
            "-n",
            "--images",
            type=int,
            default=512,
            show_default=True,
            help="Sampled by --seed from the data.",
        ),
        click.option(
            "--recipe",
            type=_choice(choices.Recipe),
            default="fast",
            show_default=True,
            help="How much is done for accuracy.",
        ),
        click.option(
            "--threshold",
            type=rules,
            default="auto",
            show_default=True,
            help="Rule that clips activations; auto: of max, percentile, mse and kl the one that "
            "keeps the outputs nearest on images not seen, with a margin.",
        ),
        click.option(
            "--percentile",
            type=click.FloatRange(50, 100),
            default=99.99,
            show_default=True,
            help="Of |x|, for --threshold percentile.",
        ),
        click.option(
            "--equalize/--no-equalize",
            default=True,
            show_default=True,
            help="Give all channels of an activation the same range; costs nothing.",
        ),
        click.option(
            "--split",
            type=_choice(choices.SplitMode),
            default="auto",
            show_default=True,
            help="Form of every layer that can be split; auto chooses layer by layer.",
        ),
        click.option(
            "--split-precision",
            type=_choice(choices.SplitPrecision),
            default="float",
            show_default=True,
            help="Of the two summands of a split layer.",
        ),
        click.option(
            "--max-overhead",
            type=float,
            default=0.10,
            show_default=True,
            help="Extra work that --split auto may spend; 0: no extra node.",
        ),
        click.option(
            "--full-range/--no-full-range",
            default=True,
            show_default=True,
            help="Let activations after a ReLU take all 256 codes, where that pays.",
        ),
        click.option(
            "--correct-bias/--no-correct-bias",
            default=True,
            show_default=True,
            help="Take the mean error of quantized weights out of the biases.",
        ),
        click.option(
            "--rounding",
            type=_choice(choices.Rounding),
            help="Of weights; default: what the recipe says.",
        ),
        click.option(
            "--qprep/--no-qprep",
            default=None,
            help="Learn a gain and a shift of each channel; default: what the recipe says.",
        ),
        click.option(
            "--keep-affine",
            is_flag=True,
            help="Leave the learned gains and shifts in the graph, to look at.",
        ),
        click.option(
            "--iterations",
            type=click.IntRange(min=1),
            help="Learning steps of each unit; default: what the recipe says.",
        ),
        click.option(
            "--memory-budget",
            type=float,
            default=4.0,
            show_default=True,
            help="GiB of a process that learns; what does not fit is halved, or goes to disk.",
        ),
        click.option(
            "--weight-bits",
            type=int,
            default=8,
            show_default=True,
            help="2 to 8; fewer than 8 are a simulation.",
        ),
        click.option(
            "--activation-bits",
            type=int,
            default=8,
            show_default=True,
            help="2 to 8; fewer than 8 are a simulation.",
        ),
        click.option("--exclude", multiple=True, metavar="REGEX", help="Layers left in float."),
        click.option(
            "--high-precision",
            type=_choice(choices.HighPrecision),
            default="fp32",
            show_default=True,
            help="Type of what is not INT8 in the file; build-engine makes it fp16 by itself.",
        ),
        click.option(
            "--device", type=devices, default="cpu", show_default=True, help="Where images are run."
        ),
        click.option(
            "--seed", type=int, default=0, show_default=True, help="Of the sample of images."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _calibrate_options(values: dict[str, Any]) -> Any:
    from reptrt.pipeline import CalibrateOptions
    from reptrt.quantize.calib.options import ThresholdOptions

    threshold = ThresholdOptions(values["threshold"], values["percentile"])
    named = {field.name for field in fields(CalibrateOptions)} - {"threshold"}
    kept = {name: value for name, value in values.items() if name in named}
    return CalibrateOptions(threshold=threshold, **kept)


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Folder, .npz, .npy.")
@click.option("-o", "--output", type=_OUTPUT, required=True, help="INT8 ONNX file to write.")
@click.option("--diagnose", is_flag=True, help="Say where the net loses accuracy, and why.")
@calibrate_options
@_json_option
def calibrate(
    model: Path, data: Path, output: Path, diagnose: bool, json_path: str | None, **values: Any
) -> None:
    """Quantize the float ONNX file MODEL to INT8 with scales found on images."""
    from reptrt import pipeline

    options = _calibrate_options(values)
    report = pipeline.calibrate(model, data, output, options)
    margin = f" x {report.margin:.2f}" if report.margin > 1 else ""
    text = (
        f"calibrate  {report.path}  {options.recipe}  {report.threshold}{margin}  "
        f"{report.images} images  {report.layers} layers  {len(report.tensors)} tensors  "
        f"{sum(report.seconds.values()):.1f} s"
    )
    forms = Counter(split.form for split in report.splits)
    split = ", ".join(f"{count} {form}" for form, count in forms.items()) or "none"
    text += f"\n           {report.equalized} tensors equalized, splits: {split}"
    text += f", full range: {len(report.full_range)} of {len(report.tensors)} tensors"
    if report.decisions or report.full_range:
        text += f", overhead {100 * report.overhead:.1f} %"
    if report.learned is not None:
        units = report.learned.units
        better = sum(unit.kept == "learned" for unit in units)
        text += f"\n           learned: {better} of {len(units)} units better on held-out images"
    if report.simulation:
        text += f"\nsimulation only, no engine can run it: {report.simulation}"
    content = report.to_dict()
    if diagnose:
        from reptrt.judge.diagnose import diagnose as look

        found = look(model, data, options, report)
        tables = [_text(table) + "\n" for table in found.to_tables()]
        text = "\n".join([text, "", *tables, *found.to_lines()])
        content |= {"diagnosis": found.to_dict()}
    _emit(text, content, json_path)


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@_json_option
def lint(model: Path, json_path: str | None) -> None:
    """Check the Q/DQ ONNX file MODEL against what TensorRT takes and what it runs fast.

    Needs neither TensorRT nor a GPU. Exit 1 on errors.
    """
    from reptrt.linter import lint as check

    report = check(model)
    lines = [_text(report.to_table()), *report.to_lines()] if report.findings else report.to_lines()
    _emit("\n".join(lines), report.to_dict(), json_path)
    if report.has_errors:
        click.get_current_context().exit(1)


@main.command("build-engine")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=_OUTPUT, required=True, help="Engine to write.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]),
    default="auto",
    show_default=True,
    help="auto: tensorrt where there is a GPU, else tensorrt-rtx.",
)
@click.option("--target", default=None, help="Compute capabilities, e.g. sm80,sm89; or current.")
@click.option("--shapes", default=None, help="MIN:OPT:MAX batch sizes, or full shapes.")
@click.option(
    "--high-precision",
    type=_choice(choices.HighPrecision),
    default="fp16",
    show_default=True,
    help="Type of what is not INT8; a file that is FP16 already keeps its types.",
)
@click.option("--workspace", "workspace_mib", type=int, help="Scratch memory in MiB.")
@click.option("--timing-cache", type=click.Path(path_type=Path), help="Read, then extended.")
@click.option("--pinned-tactics", is_flag=True, help="Only tactics from the timing cache.")
@click.option(
    "--version-compatible", is_flag=True, help="Runs on later TensorRT of the same major version."
)
@click.option(
    "--hardware-compatible",
    type=click.Choice(["none", "ampere+", "same-compute-capability"]),
    default="none",
    show_default=True,
    help="Other GPUs that the engine is to run on.",
)
@click.option("--refit", is_flag=True, help="Weights can be replaced later.")
@click.option("--strip-plan", is_flag=True, help="Leave the weights out of the file.")
@click.option(
    "--optimization-level",
    type=int,
    default=3,
    show_default=True,
    help="0: fastest build, 5: fastest engine.",
)
@_json_option
def build_engine(
    model: Path,
    output: Path,
    target: str | None,
    shapes: str | None,
    json_path: str | None,
    **values: Any,
) -> None:
    """Build a TensorRT engine from the ONNX file MODEL.

    With tensorrt-rtx this needs neither a GPU nor a driver.
    """
    from reptrt.trt.build import build_engine as build
    from reptrt.trt.options import BuildOptions, parse_shapes, parse_targets

    options = BuildOptions(
        targets=parse_targets(target) if target else (),
        shapes=parse_shapes(shapes) if shapes else None,
        **values,
    )
    summary = build(model, output, options)
    _emit(str(summary), summary.to_dict(), json_path)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--audit", is_flag=True, help="Of an engine: what was planned INT8 and is not.")
@click.option("--plan", type=click.Path(path_type=Path), help="Q/DQ file; default: the sidecar.")
@click.option("--strict", is_flag=True, help="Audit, and exit 1 if a planned layer is not INT8.")
@_json_option
def inspect(
    file: Path, audit: bool, plan: Path | None, strict: bool, json_path: str | None
) -> None:
    """Show the layers of an engine or an ONNX file and what they compute in.

    An engine of tensorrt-rtx is read without a GPU, one of tensorrt on the GPU it was built for.
    """
    from reptrt.trt.audit import audit as check
    from reptrt.trt.inspect import inspect as look

    found = check(file, plan) if audit or strict or plan is not None else None
    inspection = look(file)
    counts = "  ".join(f"{kind} {n}" for kind, n in inspection.precisions.items())
    lines = [_text(inspection.to_table()), f"inspect  {file}  {counts}"]
    lines += found.to_lines() if found is not None else []
    content = inspection.to_dict() | ({} if found is None else {"audit": found.to_dict()})
    _emit("\n".join(lines), content, json_path)
    if strict and found is not None and found.misses:
        click.get_current_context().exit(1)


@main.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=_OUTPUT, required=True, help="The repository, may exist.")
@click.option("--name", help="Of the model; default: that of the file.")
@click.option("--labels", type=click.Path(path_type=Path), help="Text file, one class a line.")
@click.option("--instances", type=int, default=1, show_default=True, help="Per GPU.")
@click.option(
    "--max-queue-delay",
    "max_queue_delay_us",
    type=int,
    default=100,
    show_default=True,
    help="Microseconds that a request may wait for others to share its batch.",
)
@_json_option
def package(engine: Path, output: Path, json_path: str | None, **values: Any) -> None:
    """Write ENGINE into a model repository of Triton Inference Server."""
    from reptrt.trt.options import PackageOptions
    from reptrt.trt.triton import package as pack

    report = pack(engine, output, PackageOptions(**values))
    if report.warning is not None:
        click.echo(f"warning: {report.warning}", err=True)
    text = f"package  {report.path}  batch {report.max_batch_size or 'fixed'}"
    _emit(text, report.to_dict(), json_path)


def _runner_options(command: Command) -> Command:
    options = [
        click.option(
            "--runner",
            type=click.Choice(["auto", "ort", "tensorrt"]),
            default="auto",
            show_default=True,
            help="auto: by the suffix of the file.",
        ),
        click.option(
            "--device",
            type=click.Choice(["cpu", "cuda", "tensorrt"]),
            default="cpu",
            show_default=True,
            help="Of onnxruntime.",
        ),
        click.option("--threads", type=int, help="CPU threads of onnxruntime."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@main.command("eval")
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="Images to judge on: folder, .npz, .npy.",
)
@click.option("--reference", type=click.Path(path_type=Path), help="Float file to compare with.")
@click.option("--limit", type=int, help="Take a sample of this many images.")
@click.option("--batch-size", type=int, default=64, show_default=True, help="Images run at a time.")
@_runner_options
@_json_option
def evaluate(
    files: Sequence[Path], data: Path, reference: Path | None, json_path: str | None, **values: Any
) -> None:
    """Judge FILES on the same images: top-1, top-5, agreement and SQNR with a reference."""
    from reptrt.judge.evaluate import evaluate as judge

    report = judge(list(files), data, reference=reference, **values)
    _emit(_text(report.to_table()), report.to_dict(), json_path)


@main.command()
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--batch", "batches", type=INTS, default="1", show_default=True, help="Batch sizes to time."
)
@click.option("--baseline", type=click.Path(path_type=Path), help="Print ratios to this file.")
@click.option(
    "--min-seconds",
    type=float,
    default=2.0,
    show_default=True,
    help="Of measuring, for each file and batch size.",
)
@click.option(
    "--warmup-seconds",
    type=float,
    default=0.5,
    show_default=True,
    help="Before, for each file and batch size.",
)
@click.option(
    "--host-copies/--no-host-copies",
    default=True,
    show_default=True,
    help="Count the copies from and to the host; without, those of engines are left out.",
)
@_runner_options
@_json_option
def bench(files: Sequence[Path], json_path: str | None, **values: Any) -> None:
    """Time FILES side by side: interleaved rounds, median and percentiles.

    With a baseline it says of every file that is not clearly faster why not.
    """
    from reptrt.judge.bench import bench as measure
    from reptrt.judge.explain import explain_all

    report = measure(list(files), **values)
    explanations = explain_all(report)
    lines = [line for explanation in explanations for line in explanation.to_lines()]
    content = report.to_dict() | {"explanations": [found.to_dict() for found in explanations]}
    _emit("\n".join([_text(report.to_table()), *lines]), content, json_path)


@main.command()
@click.argument("source")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Calibration images.")
@click.option("--eval-data", type=click.Path(path_type=Path), help="Images to judge on.")
@click.option("-o", "--output", type=_OUTPUT, required=True, help="Folder of the run.")
@click.option("--eval-limit", type=int, help="Judge on a sample of this many images.")
@click.option(
    "--batch", "batches", type=INTS, default="1,8", show_default=True, help="Batch sizes to time."
)
@click.option(
    "--bench-seconds",
    type=float,
    default=2.0,
    show_default=True,
    help="Time spent on each file and batch size.",
)
@click.option(
    "--diagnose/--no-diagnose",
    default=True,
    show_default=True,
    help="Measure what quantization does to every layer, for the report.",
)
@click.option("--threads", type=int, help="CPU threads of onnxruntime.")
@click.option("--target", default=None, help="Compute capabilities, e.g. sm80,sm89.")
@source_options
@calibrate_options
@_json_option
def run(
    source: str,
    data: Path,
    eval_data: Path | None,
    output: Path,
    json_path: str | None,
    **values: Any,
) -> None:
    """Take SOURCE the whole way into one folder; a run that was stopped continues."""
    from reptrt.runs.run import run as run_all

    what, options = _run_options(source, values)
    kept = {name: values[name] for name in ("batches", "bench_seconds", "diagnose")}
    options = replace(options, **kept)
    report = run_all(what, data, output, options, eval_data)
    lines = [f"{stage.name:12s}  {stage.file:14s}  {stage.state}" for stage in report.stages]
    for result in report.results["eval"]["results"]:
        top1, sqnr = result["top1"], result["sqnr_db"]
        accuracy = "no labels" if top1 is None else f"top-1 {100 * top1:.2f} %"
        fidelity = "the reference" if sqnr is None else f"SQNR {sqnr:.2f} dB"
        lines.append(f"{Path(result['file']).name:12s}  {accuracy}  {fidelity}")
    lines.append(f"run  {output / 'report.json'}  {output / 'report.html'}")
    _emit("\n".join(lines), report.to_dict(), json_path)


def _run_options(source: str, values: dict[str, Any]) -> tuple[Any, Any]:
    """Return the source, and the options of all stages that several commands take."""
    from reptrt.runs.run import RunOptions
    from reptrt.trt.options import BuildOptions, parse_targets

    what, exporting = _source_and_options(source, values)
    target = values["target"]
    return what, RunOptions(
        export=exporting,
        calibrate=_calibrate_options(values),
        build=BuildOptions(targets=parse_targets(target) if target else ()),
        eval_limit=values["eval_limit"],
        threads=values["threads"],
    )


@main.command()
@click.argument("folder", metavar="RUN_DIR", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=_OUTPUT, help="Default: report.html in RUN_DIR.")
@_json_option
def report(folder: Path, output: Path | None, json_path: str | None) -> None:
    """Write what the run in RUN_DIR found as one HTML file that loads nothing.

    Only files in RUN_DIR are read. A part that is not there is named, with the reason.
    """
    from reptrt.runs.report import write_report

    written = write_report(folder, output)
    lines = [f"{s.title}: not here: {s.absent}" for s in written.sections if s.absent is not None]
    lines.append(f"report  {written.path}  {written.size_bytes / 2**10:.0f} KiB")
    _emit("\n".join(lines), written.to_dict(), json_path)


@main.command()
@click.argument("source", metavar="SOURCE|RUN_DIR")
@click.option("--data", type=click.Path(path_type=Path), help="Images to judge on.")
@click.option("--calib-data", type=click.Path(path_type=Path), help="Calibration images.")
@click.option("--limit", "eval_limit", type=int, help="Judge on a sample of this many images.")
@click.option("--threads", type=int, help="CPU threads of onnxruntime.")
@click.option("--target", default=None, help="Compute capabilities, e.g. sm80,sm89.")
@source_options
@calibrate_options
@_json_option
def ladder(
    source: str,
    data: Path | None,
    calib_data: Path | None,
    json_path: str | None,
    **values: Any,
) -> None:
    """Judge every form of a net between checkpoint and engine on the same images.

    Each rung is compared with the first (what was lost so far) and with the rung before it (what
    this step alone loses). SOURCE is what `export` takes, and needs --data and --calib-data.
    RUN_DIR is the folder of a finished `run`, with its options, images and files; only --data and
    --limit may be given.
    """
    from reptrt.runs import ladder as rungs

    if Path(source).is_dir():
        _refuse_given(("source", "data", "eval_limit", "json_path"), f"{source} is a run")
        found = rungs.ladder_of_run(Path(source), data, values["eval_limit"])
    elif data is None or calib_data is None:
        raise click.UsageError("SOURCE needs --data and --calib-data")
    else:
        what, options = _run_options(source, values)
        found = rungs.ladder(what, data, calib_data, options)
    _emit("\n".join([_text(found.to_table()), *found.to_lines()]), found.to_dict(), json_path)


def _refuse_given(allowed: Sequence[str], why: str) -> None:
    """Refuse options that were given on the command line and would have no effect."""
    ctx = click.get_current_context()
    for parameter in ctx.command.params:
        name = parameter.name or ""
        given = ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and name not in allowed:
            raise click.UsageError(f"{parameter.opts[0]}: {why}, its options are recorded")


@main.command()
@click.argument("folder", metavar="RUN_DIR", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=_OUTPUT, help="Folder of the replay; default: not kept.")
@click.option("--data", type=click.Path(path_type=Path), help="Where the calibration images are.")
@click.option("--eval-data", type=click.Path(path_type=Path), help="Where the other images are.")
@click.option("--weights", type=click.Path(path_type=Path), help="Where the checkpoint is.")
@click.option("--source", help="Where the ONNX file or the factory is.")
@_json_option
def replay(folder: Path, output: Path | None, json_path: str | None, **values: Any) -> None:
    """Do the run in RUN_DIR again from its record and compare the files by sha256.

    Inputs must be what they were; they may have moved. Exit 1 if a file that must be equal is not.
    """
    from reptrt.runs.replay import Moved
    from reptrt.runs.replay import replay as repeat

    report = repeat(folder, output, Moved(**values))
    lines = [_text(report.to_table()), *report.to_lines()]
    _emit("\n".join(lines), report.to_dict(), json_path)
    if not report.reproduced:
        click.get_current_context().exit(1)


@main.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@_json_option
def diff(a: Path, b: Path, json_path: str | None) -> None:
    """Compare two folders of finished runs, or two ONNX files.

    Options, inputs, versions and files that differ; scales and weight codes layer by layer; the
    results of both.
    """
    from reptrt.runs.diff import diff as compare

    report = compare(a, b)
    lines = [*(_text(table) for table in report.to_tables()), *report.to_lines()]
    _emit("\n".join(lines), report.to_dict(), json_path)


def _text(table: Any) -> str:
    """Render a rich table: as wide as the terminal, or 160 columns into a file."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")
