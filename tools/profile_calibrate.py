"""Where the seconds of `reptrt calibrate` go, beside the passes that it cannot do without.

    python tools/profile_calibrate.py NET.onnx --data calib [--recipe accurate] [--device cuda]

All is measured in one run: onnxruntime's forward pass over the images that calibrate (on the CPU,
in batches of 32), the same in torch on the device, and, where the recipe learns, forward and
backward passes of the float net in torch over as many images as all steps take. The column
"passes" is seconds over those of onnxruntime's forward pass. The column "needed" says what the
stage needs by its data flow, in seconds of torch's passes:

    prepare      one pass: no channel is scaled before the ranges of all are known
    collect      nothing where the values of that pass fit into half of --memory-budget, else one
                 pass: a histogram needs the scaled channels
    thresholds   four rules on the images that judge
    rounding     one pass: covariances of the inputs of layers; rounding itself is algebra
    biases       the net with and without corrections on the images that judge
    learn        each unit is computed once in both nets; its steps go forward and backward

On a machine with other work give --cpu-time: one thread, and seconds of the processor.
"""

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest import mock

_START = time.perf_counter(), time.process_time()

import click  # noqa: E402
import torch  # noqa: E402

from reptrt.data.dataset import Dataset  # noqa: E402
from reptrt.execute.runner import OrtRunner  # noqa: E402
from reptrt.execute.torchgraph import TorchGraph, exact_math  # noqa: E402
from reptrt.pipeline import CalibrateOptions, calibrate  # noqa: E402
from reptrt.pipeline.calibrating import at_most_all, calibration_images, float_model  # noqa: E402
from reptrt.quantize.calib.outputs import stride_of  # noqa: E402
from reptrt.quantize.reconstruct.options import LearnOptions  # noqa: E402

_IMPORTED = time.perf_counter(), time.process_time()
_BATCH = 32
_SAMPLED = 4  # steps of learning that are timed
_RULES = 4  # of --threshold auto


@click.command()
@click.argument("net", type=click.Path(path_type=Path, exists=True))
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--recipe", default="fast", type=click.Choice(["fast", "balanced", "accurate"]))
@click.option("--device", default="cpu", type=click.Choice(["cpu", "cuda"]))
@click.option("--images", "-n", default=512, show_default=True, help="Calibration images.")
@click.option("--cpu-time", is_flag=True, help="One thread, and seconds of the processor.")
def main(net: Path, data: Path, recipe: str, device: str, images: int, cpu_time: bool) -> None:
    """Calibrate NET and print the seconds of each stage and of the passes it needs."""
    options = at_most_all(CalibrateOptions(images=images, recipe=recipe, device=device), data)  # type: ignore[arg-type]
    with _cpu_seconds() if cpu_time else contextlib.nullcontext():
        before = passes(net, data, options, threads=1 if cpu_time else None)
        with tempfile.TemporaryDirectory() as folder:
            report = calibrate(net, data, Path(folder) / "q.onnx", options)
        after = passes(net, data, options, threads=1 if cpu_time else None)
    measured = {name: min(seconds, after[name]) for name, seconds in before.items()}
    imported = _IMPORTED[cpu_time] - _START[cpu_time]
    threads = f"{torch.get_num_threads()} threads, {'CPU' if cpu_time else 'wall'} time"
    click.echo(f"{net.stem}, {recipe}, {options.images} images, {device}, {threads}")
    for line in table({"import": imported} | dict(report.seconds), measured, needed(options)):
        click.echo(line)


def passes(
    path: Path, data: Path, options: CalibrateOptions, threads: int | None
) -> dict[str, float]:
    """Return the seconds of onnxruntime's forward pass, torch's, and all steps of learning."""
    model = float_model(path)
    dataset = calibration_images(model, data, options)
    _ = list(dataset.batches(_BATCH))  # decode
    found = {}
    with OrtRunner(path, threads=threads) as runner:
        runner.run(next(dataset.batches(_BATCH)))  # the first run allocates
        found["onnxruntime"] = _seconds(lambda: _ort_forward(runner, dataset))
    graph = TorchGraph(model.to_net(), options.device)
    found["torch"] = _seconds(lambda: _torch_forward(graph, dataset))
    if (learning := options.learning) is not None:
        steps = _seconds(lambda: _torch_steps(graph, dataset, learning))
        sampled = min(_SAMPLED, dataset.length // learning.batch)
        found["steps"] = steps / sampled * learning.iterations
    return found


def needed(options: CalibrateOptions) -> dict[str, Callable[[Mapping[str, float]], float]]:
    """Return, for each stage, the seconds that it needs as a function of those of the passes."""
    judges = 1 / stride_of(options.images)  # share of the images that judge
    return {
        "prepare": lambda p: p["torch"],
        "collect": lambda _: 0.0,
        "thresholds": lambda p: _RULES * judges * p["torch"],
        "rounding": lambda p: p["torch"],
        "biases": lambda p: 2 * judges * p["torch"],
        "learn": lambda p: 2 * p["torch"] + p["steps"],
    }


def table(
    stages: Mapping[str, float],
    measured: Mapping[str, float],
    need: Mapping[str, Callable[[Mapping[str, float]], float]],
) -> Iterator[str]:
    """Yield the lines of the table; stages and passes in seconds."""
    unit = measured["onnxruntime"]
    yield f"{'':22s} {'seconds':>8s} {'passes':>7s} {'needed':>8s}"
    for name, seconds in measured.items():
        label = "forward and backward" if name == "steps" else f"forward, {name}"
        yield f"{label:22s} {seconds:8.2f} {seconds / unit:7.2f}"
    least = {name: need[name](measured) for name in stages if name in need}
    for name, seconds in stages.items():
        bound = f"{least[name]:8.2f}" if name in least else ""
        yield f"{name:22s} {seconds:8.2f} {seconds / unit:7.2f} {bound}".rstrip()
    total = math.fsum(seconds for name, seconds in stages.items() if name != "import")
    yield f"{'all but import':22s} {total:8.2f} {total / unit:7.2f} {sum(least.values()):8.2f}"


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _ort_forward(runner: OrtRunner, dataset: Dataset) -> None:
    for batch in dataset.batches(_BATCH):
        runner.run(batch)


def _torch_forward(graph: TorchGraph, dataset: Dataset) -> None:
    with torch.inference_mode():
        for batch in dataset.batches(_BATCH):
            graph.run({graph.input_names[0]: torch.from_numpy(batch)}, graph.comparable_names)


def _torch_steps(graph: TorchGraph, dataset: Dataset, learning: LearnOptions) -> None:
    """Run steps of the whole float net with gradients for all weights and all their inputs."""
    device = graph.placement.device
    weights = {
        step.inputs[1]: graph.constants[step.inputs[1]].detach().clone().requires_grad_()
        for step in graph.steps
        if step.op in ("Conv", "Gemm") and step.inputs[1] in graph.constants
    }
    batches = dataset.batches(learning.batch)
    for _ in range(min(_SAMPLED, dataset.length // learning.batch)):
        x = torch.from_numpy(next(batches)).to(device).requires_grad_()
        with exact_math(device):
            values = graph.run({graph.input_names[0]: x, **weights}, graph.comparable_names)
            torch.stack([value.float().abs().mean() for value in values.values()]).sum().backward()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _cpu_seconds() -> Iterator[None]:
    """Let all clocks of this process count the processor's seconds, and torch use one thread."""
    torch.set_num_threads(1)
    with mock.patch("time.perf_counter", time.process_time):
        yield


if __name__ == "__main__":
    main()
