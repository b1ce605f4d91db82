"""What only a machine with a GPU can show, in one go.

    python tools/gpu_check.py run M.onnx --data IMAGES -o OUT

M.onnx is a float net as `reptrt export` writes it. The check calibrates it on the CPU and with CUDA
(seconds, largest difference of a scale), builds FP32, FP16 and INT8 engines (INT8 with an FP32 and
an FP16 rest) with every TensorRT that can be imported, compares each engine with onnxruntime output
by output, audits it, and times all engines of one TensorRT side by side, ratios to its FP16 one.

Every step is a process of its own: what fails, or crashes, says why, and the rest goes on.
OUT/gpu_check.json holds everything; a table goes to stdout. Exit 1 with --strict if a step failed.
"""

import json
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np

from reptrt import _tensorrt
from reptrt._tensorrt import Backend, Gpu
from reptrt.artifacts import package_versions, sidecar_path, write_artifact, write_json
from reptrt.data import open_dataset
from reptrt.errors import MissingDependencyError, ReptrtError
from reptrt.graph import bytes_from_model, model_from_net, net_from_model, read_model
from reptrt.metrics import agreement, sqnr_db
from reptrt.preprocess import read_preprocess
from reptrt.rewrite.to_fp16 import to_fp16
from reptrt.runner import open_runner

NETS = ("fp32", "fp16", "int8", "int8-fp16")
BACKENDS: tuple[Literal["tensorrt", "tensorrt-rtx"], ...] = ("tensorrt", "tensorrt-rtx")
_TIMEOUT_S = 1800.0

# Runs a command line; returns exit status (negative: signal) and what it said on stderr.
Execute = Callable[[Sequence[str]], tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that was tried."""

    name: str
    state: Literal["done", "failed", "skipped"]
    why: str = ""  # not done: the reason, one line
    seconds: float = 0.0
    result: Mapping[str, Any] = field(default_factory=dict)


class StepError(Exception):
    """A step that failed, and why."""


class SkipStep(Exception):  # noqa: N818  # no error: there is nothing to do
    """A step that cannot run here, and why."""


class Check:
    """The steps in order; each is kept whatever becomes of it."""

    def __init__(self, model: Path, data: Path, out: Path, execute: Execute) -> None:
        self.model, self.data, self.out = model, data, out
        self.steps: list[Step] = []
        self._execute = execute

    def step(self, name: str, work: Callable[[], Mapping[str, Any]]) -> None:
        """Run one step and keep what it found, or why it found nothing."""
        started = time.perf_counter()
        try:
            result, state, why = work(), "done", ""
        except SkipStep as err:
            result, state, why = {}, "skipped", str(err)
        except Exception as err:  # whatever it is, the rest goes on
            result, state, why = {}, "failed", " ".join(f"{err}".split()) or repr(err)
        seconds = time.perf_counter() - started
        self.steps.append(Step(name, state, why, seconds, result))  # type: ignore[arg-type]
        print(f"{name:32s} {state:8s} {seconds:7.1f} s  {why}", file=sys.stderr)

    def reptrt(self, *args: str | Path) -> dict[str, Any]:
        """Run a command of reptrt in a process of its own; return its JSON."""
        return self.process([sys.executable, "-m", "reptrt.cli", *map(str, args)])

    def process(self, command: Sequence[str]) -> dict[str, Any]:
        """Run a command that takes --json; return what it wrote."""
        answer = self.out / "answer.json"
        answer.unlink(missing_ok=True)
        status, said = self._execute([*command, "--json", str(answer)])
        if status != 0:
            raise StepError(reason(status, said))
        content: dict[str, Any] = json.loads(answer.read_text())
        answer.unlink()
        return content

    def net(self, name: str) -> Path:
        """Return the ONNX file of a net; FP32 is the model itself."""
        return self.model if name == "fp32" else self.out / f"{name}.onnx"

    def engine(self, backend: str, net: str) -> Path:
        """Return where an engine is."""
        return self.out / f"{net}.{backend}.engine"

    def made(self) -> list[Path]:
        """Return the files that a check may write.

        Raises:
            UsageError: the model is one of them.
        """
        files = [self.net(name) for name in (*NETS[1:], "int8-cuda")]
        files += [self.engine(backend, net) for backend in BACKENDS for net in NETS]
        if self.model in files:
            raise click.UsageError(f"{self.model.name} in {self.out} would be replaced; other -o")
        return [*files, *(sidecar_path(file) for file in files)]


def reason(status: int, said: str) -> str:
    """Return in one line why a process failed."""
    if status < 0:
        try:
            return f"crashed: {signal.Signals(-status).name}"
        except ValueError:
            return f"crashed: signal {-status}"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    stated = [line for line in lines if line.startswith("error: ")]
    return (stated or lines or [f"exit status {status}"])[-1].removeprefix("error: ")


def needed(path: Path) -> Path:
    """Return a file that an earlier step was to make; skip if it did not."""
    if not path.exists():
        raise SkipStep(f"{path.name} was not made")
    return path


def environment() -> dict[str, Any]:
    """Return what the numbers depend on."""
    gpu = _tensorrt.find_gpu()
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
    found = _load(name)
    return found if isinstance(found, str) else ".".join(map(str, found.version))


def _load(name: Literal["tensorrt", "tensorrt-rtx"]) -> Backend | str:
    try:
        return _tensorrt.load(name)
    except MissingDependencyError as err:
        return str(err).partition("): ")[0].removeprefix("no TensorRT (")


def write_fp16(model: Path, output: Path) -> dict[str, Any]:
    """Write the FP16 form of a float net, the baseline of all ratios."""
    net = net_from_model(read_model(model))
    report = to_fp16(net)
    content = bytes_from_model(model_from_net(net))
    write_artifact(output, content, artifact="fp16-onnx", parents={}, options={})
    return {"left_fp32": [asdict(skip) for skip in report.skipped]}


def compare_calibrations(cpu: Mapping[str, Any], cuda: Mapping[str, Any]) -> dict[str, Any]:
    """Return seconds of both, and by how much of itself a scale differs at most."""
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


def calibrations(check: Check, images: int) -> None:
    """Calibrate with an FP32 and an FP16 rest, and on both devices."""
    reports: dict[str, dict[str, Any]] = {}

    def calibrate(output: Path, device: str, rest: str) -> dict[str, Any]:
        what = ("--data", check.data, "-n", str(images), "--device", device)
        return check.reptrt("calibrate", check.model, *what, "--high-precision", rest, "-o", output)

    def on(device: str) -> dict[str, Any]:
        name = "int8" if device == "cpu" else "int8-cuda"
        reports[device] = calibrate(check.out / f"{name}.onnx", device, "fp32")
        return {"seconds": reports[device]["seconds"], "images": reports[device]["images"]}

    def both() -> dict[str, Any]:
        if len(reports) < 2:
            raise SkipStep("needs calibration on the CPU and with CUDA")
        return compare_calibrations(reports["cpu"], reports["cuda"])

    check.step("fp16 net", lambda: write_fp16(check.model, check.net("fp16")))
    check.step("calibrate cpu", lambda: on("cpu"))
    check.step("calibrate cuda", lambda: on("cuda"))
    check.step("calibrate cpu against cuda", both)
    check.step(
        "calibrate, fp16 rest",
        lambda: {"seconds": calibrate(check.net("int8-fp16"), "cpu", "fp16")["seconds"]},
    )


def engines(
    check: Check, backend: str, nets: Sequence[str], batches: Sequence[int], images: int
) -> None:
    """Build, compare, audit and time the engines of one TensorRT."""
    found = _load(backend)  # type: ignore[arg-type]
    if isinstance(found, str):
        why = found

        def absent() -> Mapping[str, Any]:
            raise SkipStep(why)

        check.step(backend, absent)
        return
    shapes = f"1:{min(8, max(batches))}:{max(64, *batches)}"

    def build(net: str) -> dict[str, Any]:
        source, target = needed(check.net(net)), check.engine(backend, net)
        options = ["--backend", backend, "--shapes", shapes]
        return check.reptrt("build-engine", source, "-o", target, *options)

    def parity(net: str) -> dict[str, Any]:
        files = [needed(check.engine(backend, net)), needed(check.net(net))]
        command = [sys.executable, __file__, "parity", *map(str, files)]
        return check.process([*command, "--data", str(check.data), "--images", str(images)])

    def audit(net: str) -> dict[str, Any]:
        found = check.reptrt("inspect", needed(check.engine(backend, net)), "--audit")
        return {"precisions": found["precisions"], **found["audit"]}

    def bench() -> dict[str, Any]:
        made = [check.engine(backend, net) for net in nets if check.engine(backend, net).exists()]
        if not made:
            raise SkipStep("no engine was built")
        baseline = check.engine(backend, "fp16")
        options = ["--baseline", str(baseline)] if baseline in made else []
        return check.reptrt("bench", *made, "--batch", ",".join(map(str, batches)), *options)

    for net in nets:
        check.step(f"{backend} build {net}", lambda net=net: build(net))  # type: ignore[misc]
    for net in nets:
        check.step(f"{backend} parity {net}", lambda net=net: parity(net))  # type: ignore[misc]
    for net in (net for net in nets if "int8" in net):
        check.step(f"{backend} audit {net}", lambda net=net: audit(net))  # type: ignore[misc]
    check.step(f"{backend} bench", bench)


def table(steps: Sequence[Step]) -> list[str]:
    """Return the results in short: one row an engine and batch size, then what was not done."""
    done = {step.name: step.result for step in steps if step.state == "done"}
    lines = ["| engine | batch | median ms | images/s | of FP16 | SQNR dB | INT8 layers |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|")
    for backend in BACKENDS:
        for row in done.get(f"{backend} bench", {}).get("results", ()):
            net = Path(row["file"]).name.removesuffix(f".{backend}.engine")
            outputs = done.get(f"{backend} parity {net}", {}).get("outputs", {})
            sqnr = min((out["sqnr_db"] for out in outputs.values()), default=None)
            audit = done.get(f"{backend} audit {net}")
            cells = [
                f"{backend} {net}",
                str(row["batch"]),
                f"{row['median_ms']:.3f}",
                f"{row['throughput_ips']:.0f}",
                "" if row.get("ratio") is None else f"{row['ratio']:.2f}",
                "" if sqnr is None else f"{sqnr:.1f}",
                "" if audit is None else f"{audit['built']} of {len(audit['planned'])}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    calibration = done.get("calibrate cpu against cuda")
    if calibration is not None:
        lines.append(
            f"calibration: CPU {calibration['cpu_seconds']:.1f} s, CUDA "
            f"{calibration['cuda_seconds']:.1f} s, scales differ by "
            f"{calibration['max_relative_difference']:.1e} at most"
        )
    lines += [f"{step.name}: {step.state}: {step.why}" for step in steps if step.state != "done"]
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
    reference: Mapping[str, Sequence[Any]], found: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    """Return how close each output is: lists of batches by output name.

    Raises:
        StepError: an output is missing.
    """
    missing = set(reference) - set(found)
    if missing:
        raise StepError(f"the engine lacks the outputs {', '.join(sorted(missing))}")
    outputs = {}
    for name, batches in reference.items():
        expected, got = (np.concatenate(list(part)) for part in (batches, found[name]))
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
    check: Check, nets: Sequence[str], batches: Sequence[int], images: int
) -> Sequence[Step]:
    """Run every step and write the report."""
    for old in check.made():
        old.unlink(missing_ok=True)  # a file of an earlier check must not pass for one of this
    check.step("environment", environment)
    calibrations(check, images)
    for backend in BACKENDS:
        engines(check, backend, nets, batches, images)
    report = {"model": check.model.name, "steps": [asdict(step) for step in check.steps]}
    write_json(check.out / "gpu_check.json", report)
    return check.steps


@click.group()
def main() -> None:
    """Check on a GPU what a machine without one cannot."""


@main.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("-n", "--images", type=click.IntRange(1), default=512, show_default=True)
@click.option("--batch", default="1,8,32", show_default=True)
@click.option("--nets", default=",".join(NETS), show_default=True)
@click.option("--strict", is_flag=True, help="Exit 1 if a step failed.")
def run(
    model: Path, data: Path, output: Path, images: int, batch: str, nets: str, strict: bool
) -> None:
    """Run every step on the float net MODEL."""
    wanted, batches = nets.split(","), [int(size) for size in batch.split(",")]
    if not set(wanted) <= set(NETS) or min(batches) < 1:
        raise click.UsageError(f"--nets: any of {','.join(NETS)}; --batch: positive sizes")
    output.mkdir(parents=True, exist_ok=True)
    check = Check(model.resolve(), data.resolve(), output.resolve(), run_process)
    steps = check_all(check, wanted, batches, images)
    click.echo("\n".join(table(steps)))
    if strict and any(step.state == "failed" for step in steps):
        click.get_current_context().exit(1)


@main.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--images", type=int, default=256, show_default=True)
@click.option("--json", "answer", type=click.Path(path_type=Path), required=True)
def parity(engine: Path, model: Path, data: Path, images: int, answer: Path) -> None:
    """Compare an engine with its ONNX file in onnxruntime, output by output."""
    try:
        preprocess = read_preprocess(net_from_model(read_model(model)))
        dataset = open_dataset(data, preprocess, limit=images, seed=0)
        collected: list[dict[str, list[Any]]] = []
        for path in (model, engine):
            outputs: dict[str, list[Any]] = {}
            with open_runner(path) as runner:
                for batch in dataset.batches(32):
                    for name, value in runner.run(batch).items():
                        outputs.setdefault(name, []).append(value)
            collected.append(outputs)
        write_json(answer, compare_outputs(*collected))
    except (ReptrtError, StepError) as err:
        click.echo(f"error: {' '.join(str(err).split())}", err=True)
        click.get_current_context().exit(1)


if __name__ == "__main__":
    main()
