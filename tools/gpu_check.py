r"""Check in one run what can only be checked on a machine with a GPU.

    PYTHONPATH=. python tools/gpu_check.py run M.onnx --data IMAGES -o OUT

M.onnx is a float net as `reptrt export` writes it, IMAGES a few hundred images of its kind. The
check does this:

- It calibrates the net with each recipe on the CPU and with CUDA, and reports seconds and the
  largest difference of a scale.
- It compares the simulation in torch, on both devices, with onnxruntime, to the bit.
- It builds engines with every TensorRT that can be imported: FP32, FP16, INT8 with an FP32 and with
  an FP16 rest, INT8 without splits.
- It compares the outputs of each engine with onnxruntime, and audits the engine.
- It times all engines of a TensorRT side by side, as ratios to the FP16 engine, with and without
  host copies.

Every step runs in a process of its own: a step that fails or crashes says why, and the others go
on. OUT/gpu_check.json holds everything, and a table goes to stdout. With --strict, a failed step
makes the exit status 1.

The check uses the packages of `pip install 'reptrt[gpu,rtx]'`; steps whose packages are missing are
skipped. For a machine without a package index, download the packages for its Python first:

    pip download -d wheels --no-deps --only-binary=:all: --python-version 3.12 \
        --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 onnx-graphsurgeon \
        tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings pytools mako platformdirs siphash24
    pip download -d wheels --no-deps pycuda tensorrt-rtx tensorrt-rtx-cu13

Then install them there; CUDA's compiler builds pycuda in a few minutes:

    pip install --no-index --no-deps --no-build-isolation wheels/*
"""

import contextlib
import importlib.util
import json
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

_NEEDED = ("click", "google.protobuf", "numpy", "onnx", "onnx_graphsurgeon", "PIL")


def lacking(names: Sequence[str]) -> list[str]:
    """Return the packages that cannot be found."""
    missing = []
    for name in names:
        try:
            installed = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # its parent package is missing
            installed = False
        missing += [] if installed else [name]
    return missing


if lacking(_NEEDED):  # before anything imports them
    sys.exit(f"error: cannot be imported: {', '.join(lacking(_NEEDED))}; install them first")

import click  # noqa: E402
import numpy as np  # noqa: E402

from reptrt.cli import main as reptrt  # noqa: E402
from reptrt.core import choices  # noqa: E402
from reptrt.core.artifacts import (  # noqa: E402
    package_versions,
    sha256_of,
    sidecar_path,
    write_artifact,
    write_json,
)
from reptrt.core.errors import MissingDependencyError, ReptrtError  # noqa: E402
from reptrt.core.metrics import agreement, sqnr_db  # noqa: E402
from reptrt.data.dataset import Dataset, open_dataset  # noqa: E402
from reptrt.execute.runner import Runner, open_runner  # noqa: E402
from reptrt.graph.net import bytes_from_model, net_from_model, read_model  # noqa: E402
from reptrt.graph.preprocess import read_preprocess  # noqa: E402
from reptrt.trt import binding, driver  # noqa: E402
from reptrt.trt.driver import Gpu  # noqa: E402
from reptrt.trt.input import with_rest  # noqa: E402
from reptrt.trt.versions import Backend  # noqa: E402

# Each net with the net that it is converted from to get an FP16 rest; None: its rest is FP32.
NETS = {
    "fp32": None,
    "fp16": "fp32",
    "int8": None,
    "int8-fp16": "int8",
    "int8-nosplit-fp16": "int8-nosplit",
}
RECIPES: tuple[str, ...] = get_args(choices.Effort)
DEFAULT_RECIPE = next(p.default for p in reptrt.commands["calibrate"].params if p.name == "recipe")
BACKENDS: tuple[Literal["tensorrt", "tensorrt-rtx"], ...] = ("tensorrt", "tensorrt-rtx")
_TIMEOUT_S = 1800.0

# Runs a command line; returns the exit status (negative: signal) and the text on stderr.
Execute = Callable[[Sequence[str]], tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Step:
    """A step of the check and its result."""

    name: str
    state: Literal["done", "failed", "skipped"]
    why: str = ""  # not done: the reason, one line
    seconds: float = 0.0
    result: Mapping[str, Any] = field(default_factory=dict)


class StepError(Exception):
    """A step that failed, and why."""


class SkipStep(Exception):  # noqa: N818  # not an error: there is nothing to do
    """A step that cannot run here, and why."""


class Check:
    """The steps in their order, with results or reasons."""

    def __init__(self, model: Path, data: Path, out: Path, execute: Execute) -> None:
        self.model, self.data, self.out = model, data, out
        self.steps: list[Step] = []
        self._execute = execute

    def step(self, name: str, work: Callable[[], Mapping[str, Any]]) -> None:
        """Run a step and record its result, or the reason why it has none."""
        started = time.perf_counter()
        try:
            result, state, why = work(), "done", ""
        except SkipStep as err:
            result, state, why = {}, "skipped", str(err)
        except Exception as err:  # the other steps run whatever fails here
            result, state, why = {}, "failed", " ".join(f"{err}".split()) or repr(err)
        seconds = time.perf_counter() - started
        self.steps.append(Step(name, state, why, seconds, result))  # type: ignore[arg-type]
        print(f"{name:38s} {state:8s} {seconds:7.1f} s  {why}", file=sys.stderr)

    def reptrt(self, *args: str | Path) -> dict[str, Any]:
        """Run a command of reptrt in a process of its own; return its JSON."""
        return self.process([sys.executable, "-m", "reptrt", *map(str, args)])

    def compare(self, name: str, *args: str | Path, images: int) -> dict[str, Any]:
        """Run a command of this file in a process of its own; return its JSON."""
        command = [sys.executable, __file__, name, *map(str, args)]
        return self.process([*command, "--data", str(self.data), "--images", str(images)])

    def process(self, command: Sequence[str]) -> dict[str, Any]:
        """Run a command that takes --json; return what it wrote."""
        answer = self.out / "answer.json"
        answer.unlink(missing_ok=True)
        status, stderr = self._execute([*command, "--json", str(answer)])
        if status != 0:
            raise StepError(reason(status, stderr))
        content: dict[str, Any] = json.loads(answer.read_text())
        answer.unlink()
        return content

    def net(self, name: str) -> Path:
        """Return the ONNX file of a net; FP32 is the model itself."""
        return self.model if name == "fp32" else self.out / f"{name}.onnx"

    def engine(self, backend: str, net: str) -> Path:
        """Return the path of an engine."""
        return self.out / f"{net}.{backend}.engine"

    def made(self) -> list[Path]:
        """Return the files that a check may write.

        Raises:
            UsageError: the model is one of them.
        """
        names = [*list(NETS)[1:], "int8-nosplit", *(f"int8-{recipe}" for recipe in RECIPES)]
        names += [f"int8-{recipe}-cuda" for recipe in RECIPES]
        files = [self.net(name) for name in names]
        files += [self.engine(backend, net) for backend in BACKENDS for net in NETS]
        if self.model in files:
            raise click.UsageError(f"{self.model.name} in {self.out} would be replaced; other -o")
        return [*files, *(sidecar_path(file) for file in files)]


def reason(status: int, stderr: str) -> str:
    """Return a line that says why a process failed."""
    if status < 0:
        try:
            return f"crashed: {signal.Signals(-status).name}"
        except ValueError:
            return f"crashed: signal {-status}"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    stated = [line for line in lines if line.startswith("error: ")]
    return (stated or lines or [f"exit status {status}"])[-1].removeprefix("error: ")


def needed(path: Path) -> Path:
    """Return a file of an earlier step; skip this step if that one did not make it."""
    if not path.exists():
        raise SkipStep(f"{path.name} was not made")
    return path


def environment() -> dict[str, Any]:
    """Return the hardware and the versions that the numbers depend on."""
    gpu = driver.find_gpu()
    return {
        "gpu": gpu.name if isinstance(gpu, Gpu) else None,
        "target": gpu.target if isinstance(gpu, Gpu) else None,
        "driver": ".".join(map(str, gpu.driver)) if isinstance(gpu, Gpu) else None,
        "no_gpu": None if isinstance(gpu, Gpu) else gpu,
        "tensorrt": {name: _version(name) for name in BACKENDS},
        "packages": package_versions(),
        "python": platform.python_version(),
        "machine": platform.platform(),
    }


def _version(name: Literal["tensorrt", "tensorrt-rtx"]) -> str:
    backend = _load(name)
    return backend if isinstance(backend, str) else ".".join(map(str, backend.version))


def _load(name: Literal["tensorrt", "tensorrt-rtx"]) -> Backend | str:
    try:
        return binding.load(name)
    except MissingDependencyError as err:
        return str(err).partition("): ")[0].removeprefix("no TensorRT (")


def write_half(source: Path, output: Path) -> dict[str, Any]:
    """Write a net with the FP16 rest that build-engine would give it."""
    model, rest = with_rest(read_model(source), "fp16")
    parents = {source.name: sha256_of(source)}
    content = bytes_from_model(model)
    write_artifact(output, content, artifact="fp16-onnx", parents=parents, options={})
    return asdict(rest)


def compare_calibrations(cpu: Mapping[str, Any], cuda: Mapping[str, Any]) -> dict[str, Any]:
    """Return the seconds of both, and the largest relative difference of a scale."""
    scales = [{t["tensor"]: t["scale"] for t in report["tensors"]} for report in (cpu, cuda)]
    if scales[0].keys() != scales[1].keys():
        raise StepError("CPU and CUDA calibrated different tensors")
    worst = max(scales[0], key=lambda name: abs(scales[1][name] / scales[0][name] - 1))
    return {
        "cpu_seconds": sum(cpu["seconds"].values()),
        "cuda_seconds": sum(cuda["seconds"].values()),
        "tensors": len(scales[0]),
        "max_relative_difference": abs(scales[1][worst] / scales[0][worst] - 1),
        "worst_tensor": worst,
    }


def calibrations(check: Check, recipes: Sequence[str], images: int) -> None:
    """Calibrate by each recipe on both devices, and once without splits; make the FP16 rests.

    The default recipe, or the first if that is left out, makes the nets of the engines.
    """
    chosen = DEFAULT_RECIPE if DEFAULT_RECIPE in recipes else recipes[0]
    reports: dict[tuple[str, str], dict[str, Any]] = {}

    def calibrate(name: str, *options: str) -> dict[str, Any]:
        arguments = ("--data", check.data, "-n", str(images), *options)
        return check.reptrt("calibrate", check.model, *arguments, "-o", check.net(name))

    def on(recipe: str, device: str) -> dict[str, Any]:
        name = "int8" if recipe == chosen else f"int8-{recipe}"
        name += "-cuda" if device == "cuda" else ""
        report = calibrate(name, "--recipe", recipe, "--device", device)
        reports[recipe, device] = report
        return {name: report[name] for name in ("seconds", "images", "overhead")}

    def both(recipe: str) -> dict[str, Any]:
        pair = [reports.get((recipe, device)) for device in ("cpu", "cuda")]
        if pair[0] is None or pair[1] is None:
            raise SkipStep("needs calibration on the CPU and with CUDA")
        return compare_calibrations(pair[0], pair[1])

    for recipe in recipes:
        for device in ("cpu", "cuda"):
            check.step(f"calibrate {recipe} {device}", lambda r=recipe, d=device: on(r, d))  # type: ignore[misc]
        check.step(f"calibrate {recipe} cpu against cuda", lambda r=recipe: both(r))  # type: ignore[misc]

    def whole() -> dict[str, Any]:
        report = calibrate("int8-nosplit", "--recipe", chosen, "--split", "none")
        return {name: report[name] for name in ("seconds", "overhead")}

    check.step("calibrate without splits", whole)
    for net, source in NETS.items():
        if source is not None:
            check.step(
                f"fp16 rest {net}",
                lambda n=net, s=source: write_half(needed(check.net(s)), check.net(n)),  # type: ignore[misc]
            )


def simulations(check: Check, images: int) -> None:
    """Compare torch's simulation of the calibrated net with onnxruntime on both devices."""

    def compare(device: str) -> dict[str, Any]:
        net = needed(check.net("int8"))
        return check.compare("simulation", net, "--device", device, images=images)

    for device in ("cpu", "cuda"):
        check.step(f"simulation {device}", lambda device=device: compare(device))  # type: ignore[misc]


def engines(
    check: Check, backend: str, nets: Sequence[str], batches: Sequence[int], images: int
) -> None:
    """Build, compare, audit and time the engines of one TensorRT."""
    loaded = _load(backend)  # type: ignore[arg-type]
    if isinstance(loaded, str):
        why = loaded

        def absent() -> Mapping[str, Any]:
            raise SkipStep(why)

        check.step(backend, absent)
        return
    shapes = f"1:{min(8, max(batches))}:{max(64, *batches)}"

    def build(net: str) -> dict[str, Any]:
        source, target = needed(check.net(net)), check.engine(backend, net)
        options = ["--backend", backend, "--shapes", shapes, "--high-precision"]
        options.append("fp32" if NETS[net] is None else "fp16")
        if backend == "tensorrt-rtx" and isinstance(driver.find_gpu(), Gpu):
            try:
                return check.reptrt(
                    "build-engine", source, "-o", target, *options, "--target", "current"
                )
            except StepError as err:
                portable = check.reptrt("build-engine", source, "-o", target, *options)
                return portable | {"not_for_the_current_gpu": str(err)}
        return check.reptrt("build-engine", source, "-o", target, *options)

    def parity(net: str) -> dict[str, Any]:
        engine, model = needed(check.engine(backend, net)), needed(check.net(net))
        return check.compare("parity", engine, model, images=images)

    def audit(net: str) -> dict[str, Any]:
        answer = check.reptrt("inspect", needed(check.engine(backend, net)), "--audit")
        return {"precisions": answer["precisions"], **answer["audit"]}

    def bench(*copies: str) -> dict[str, Any]:
        ran = {step.name for step in check.steps if step.state == "done"}
        made = [net for net in nets if check.engine(backend, net).exists()]
        if not made:
            raise SkipStep("no engine was built")
        running = [net for net in made if f"{backend} parity {net}" in ran] or made
        files = [check.engine(backend, net) for net in running]
        baseline = check.engine(backend, "fp16")
        options = ["--baseline", str(baseline)] if baseline in files else []
        sizes = ",".join(map(str, batches))
        return check.reptrt("bench", *files, "--batch", sizes, *options, *copies)

    for net in nets:
        check.step(f"{backend} build {net}", lambda net=net: build(net))  # type: ignore[misc]
    for net in nets:
        check.step(f"{backend} parity {net}", lambda net=net: parity(net))  # type: ignore[misc]
    for net in (net for net in nets if "int8" in net):
        check.step(f"{backend} audit {net}", lambda net=net: audit(net))  # type: ignore[misc]
    check.step(f"{backend} bench", bench)
    check.step(f"{backend} bench, no host copies", lambda: bench("--no-host-copies"))


COLUMNS = (
    *("engine", "batch", "median ms", "on the GPU", "images/s", "of FP16", "SQNR dB"),
    "INT8 layers",
)


def table(steps: Sequence[Step]) -> list[str]:
    """Return a row for each engine and batch size, then remarks, then the steps that failed."""
    done = {step.name: step.result for step in steps if step.state == "done"}
    lines = markdown(COLUMNS, engine_rows(done))
    lines += [line for name, result in done.items() for line in _remarks(name, result)]
    lines += [f"{step.name}: {step.state}: {step.why}" for step in steps if step.state != "done"]
    return lines


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table; all columns but the first are flush right."""
    ruler = ["---"] + ["--:"] * (len(columns) - 1)
    return [f"| {' | '.join(columns)} |", f"|{'|'.join(ruler)}|"] + [
        f"| {' | '.join(row)} |" for row in rows
    ]


def engine_rows(done: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return the cells of each engine at each batch size, in the order of `COLUMNS`.

    Args:
        done: step -> result, of the steps that were done.
    """
    rows = []
    for backend in BACKENDS:
        on_gpu = {
            (row["file"], row["batch"]): row["median_ms"]
            for row in done.get(f"{backend} bench, no host copies", {}).get("results", ())
        }
        for row in done.get(f"{backend} bench", {}).get("results", ()):
            net = Path(row["file"]).name.removesuffix(f".{backend}.engine")
            outputs = done.get(f"{backend} parity {net}", {}).get("outputs", {})
            sqnr = min((out["sqnr_db"] for out in outputs.values()), default=None)
            audit = done.get(f"{backend} audit {net}")
            alone = on_gpu.get((row["file"], row["batch"]))
            cells = [
                f"{backend} {net}",
                str(row["batch"]),
                f"{row['median_ms']:.3f}",
                "" if alone is None else f"{alone:.3f}",
                f"{row['throughput_ips']:.0f}",
                "" if row.get("ratio") is None else f"{row['ratio']:.2f}",
                "" if sqnr is None else f"{sqnr:.1f}",
                "" if audit is None else f"{audit['built']} of {len(audit['planned'])}",
            ]
            rows.append(cells)
    return rows


def _remarks(name: str, result: Mapping[str, Any]) -> list[str]:
    """Return the remarks on a step that was done."""
    lines = [f"{name}: {remark}" for remark in result.get("remarks", ())]
    for explanation in result.get("explanations", ()):
        where = f"{Path(explanation['file']).name}, batch {explanation['batch']}"
        lines += [f"{where}: {line}" for line in explanation["lines"]]
    if "max_relative_difference" in result:
        lines.append(
            f"{name}: CPU {result['cpu_seconds']:.1f} s, CUDA {result['cuda_seconds']:.1f} s, "
            f"scales differ by {result['max_relative_difference']:.1e} at most"
        )
    if name.startswith("simulation"):
        lines += [
            f"{name}: {output}: differs from onnxruntime by {errors['max_difference']:.1e} at most"
            if errors["max_difference"]
            else f"{name}: {output}: the same bits as onnxruntime"
            for output, errors in result["outputs"].items()
        ]
    if "not_for_the_current_gpu" in result:
        lines.append(f"{name}: portable engine: {result['not_for_the_current_gpu']}")
    return lines


def run_process(command: Sequence[str]) -> tuple[int, str]:
    """Run a command; return its exit status and stderr."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 1, f"error: no answer within {_TIMEOUT_S:.0f} s"
    return done.returncode, done.stderr


def compare_outputs(
    reference: Mapping[str, Sequence[Any]], engine: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    """Return how close each output is: lists of batches by output name.

    Raises:
        StepError: an output is missing.
    """
    missing = set(reference) - set(engine)
    if missing:
        raise StepError(f"the engine lacks the outputs {', '.join(sorted(missing))}")
    outputs = {}
    for name, batches in reference.items():
        expected, got = (np.concatenate(list(part)) for part in (batches, engine[name]))
        expected, got = (part.astype(np.float64) for part in (expected, got))
        difference = float(np.abs(expected - got).max())
        outputs[name] = {
            "sqnr_db": min(sqnr_db(expected, got), 999.0),  # JSON has no infinity
            "max_difference": difference,
            "max_value": float(np.abs(expected).max()),
            "agreement": agreement(expected, got) if expected.ndim == 2 else None,
        }
    return {"outputs": outputs}


def check_all(
    check: Check,
    nets: Sequence[str],
    recipes: Sequence[str],
    batches: Sequence[int],
    images: int,
) -> Sequence[Step]:
    """Run every step and write the report."""
    for old in check.made():
        old.unlink(missing_ok=True)  # files of an earlier check must not be taken for new ones
    check.step("environment", environment)
    calibrations(check, recipes, images)
    simulations(check, images)
    for backend in BACKENDS:
        engines(check, backend, nets, batches, images)
    report = {"model": check.model.name, "steps": [asdict(step) for step in check.steps]}
    write_json(check.out / "gpu_check.json", report)
    return check.steps


@click.group()
def main() -> None:
    """Check what can only be checked on a machine with a GPU."""


@main.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("-n", "--images", type=click.IntRange(1), default=512, show_default=True)
@click.option("--batch", default="1,8,32", show_default=True)
@click.option("--nets", default=",".join(NETS), show_default=True)
@click.option("--recipes", default=",".join(RECIPES), show_default=True)
@click.option("--strict", is_flag=True, help="Exit 1 if a step failed.")
def run(
    model: Path,
    data: Path,
    output: Path,
    images: int,
    batch: str,
    nets: str,
    recipes: str,
    strict: bool,
) -> None:
    """Run every step on the float net MODEL."""
    batches = [int(size) for size in batch.split(",")]
    for name, text, choice in (("nets", nets, NETS), ("recipes", recipes, RECIPES)):
        if not set(text.split(",")) <= set(choice):
            raise click.UsageError(f"--{name}: any of {','.join(choice)}")
    if min(batches) < 1:
        raise click.UsageError("--batch: positive sizes")
    output.mkdir(parents=True, exist_ok=True)
    check = Check(model.resolve(), data.resolve(), output.resolve(), run_process)
    steps = check_all(check, nets.split(","), recipes.split(","), batches, images)
    click.echo("\n".join(table(steps)))
    if strict and any(step.state == "failed" for step in steps):
        click.get_current_context().exit(1)


_data_option = click.option("--data", type=click.Path(path_type=Path), required=True)
_images_option = click.option("--images", type=int, default=256, show_default=True)
_json_option = click.option("--json", "answer", type=click.Path(path_type=Path), required=True)


@main.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.argument("model", type=click.Path(path_type=Path))
@_data_option
@_images_option
@_json_option
def parity(engine: Path, model: Path, data: Path, images: int, answer: Path) -> None:
    """Compare an engine with its ONNX file in onnxruntime, output by output."""
    with _one_line():
        dataset = _images_of(model, data, images)
        expected, outputs = (_outputs(open_runner(path), dataset) for path in (model, engine))
        write_json(answer, compare_outputs(expected, outputs))


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--device", type=click.Choice(["cpu", "cuda"]), required=True)
@_data_option
@_images_option
@_json_option
def simulation(model: Path, device: str, data: Path, images: int, answer: Path) -> None:
    """Compare the first output of an INT8 file in torch with onnxruntime."""
    from reptrt.execute.torch_runner import int8_runner
    from reptrt.pipeline import torch_device

    with _one_line():
        dataset = _images_of(model, data, images)
        (int8,) = _outputs(int8_runner(read_model(model), torch_device(device)), dataset).values()
        name, expected = next(iter(_outputs(open_runner(model), dataset).items()))
        write_json(answer, compare_outputs({name: expected}, {name: int8}))


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Report an expected error as one line on stderr, with exit status 1."""
    try:
        yield
    except (ReptrtError, StepError) as err:
        text = err.on_cli() if isinstance(err, ReptrtError) else str(err)
        click.echo(f"error: {' '.join(text.split())}", err=True)
        click.get_current_context().exit(1)


def _images_of(model: Path, data: Path, images: int) -> Dataset:
    preprocess = read_preprocess(net_from_model(read_model(model)))
    return open_dataset(data, preprocess, limit=images, seed=0)


def _outputs(runner: Runner, dataset: Dataset) -> dict[str, list[Any]]:
    """Return the batches of each output."""
    outputs: dict[str, list[Any]] = {}
    with runner:
        for batch in dataset.batches(32):
            for name, value in runner.run(batch).items():
                outputs.setdefault(name, []).append(value)
    return outputs


if __name__ == "__main__":
    main()
