"""Build the release and try it as a stranger would: installed from the wheel, in an empty folder.

    python tools/check_release.py -o build/release
    python tools/check_release.py -o build/release --python python3.10 --python python3.13
    python tools/check_release.py -o build/release --oldest python3.10

- The source distribution and, from it, the wheel are built by `python -m build`; the wheel must
  hold the package's data and nothing else than the package.
- For each Python the wheel is installed into a fresh environment with the extras cpu and demo.
  There the whole way is run: the demo, a zoo net exported, calibrated, linted and judged by the
  command line, and the same in a Python program, which mypy --strict accepts (py.typed).
- With --oldest, an environment more is made, of a Python that is as old, with every dependency at
  the lower bound that pyproject.toml names.

A row says what was run, where, and in how many seconds. The exit status is 1 if anything failed.
"""

import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path

import click
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
EXTRAS = ("cpu", "demo")
DATA = ("reptrt/py.typed", ".pt", ".css", ".j2")  # endings that the wheel must hold
PROGRAM = '''"""What a user writes: export, calibrate and judge a net, all in memory."""

import numpy as np

import reptrt

rng = np.random.default_rng(0)
images = rng.integers(0, 256, (32, 3, 32, 32), dtype=np.uint8)
net = reptrt.export(
    "repvgg",
    widths=(8, 8, 16, 16, 32), blocks=(1, 1, 1, 1), strides=(1, 2, 2, 2, 2),
    num_classes=10, input_size=(3, 32, 32),
)  # fmt: skip
int8 = reptrt.calibrate(net, images)
report = reptrt.evaluate([net, int8], images)
sqnr: float | None = report.results[1].sqnr_db
assert sqnr is not None and sqnr > 10, report
int8.save("program.int8.onnx")
'''
COMMANDS = (
    "reptrt --version",
    "python -m reptrt.demo -o demo",
    "reptrt lint demo/digits.int8.onnx",
    "reptrt calibrate demo/digits.onnx --data demo/train.npz -o again.int8.onnx",
    "reptrt eval demo/digits.onnx again.int8.onnx --data demo/held_out.npz",
    "reptrt bench demo/digits.onnx again.int8.onnx --min-seconds 0.2",
    "python program.py",
    "mypy --strict program.py",
)


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that was tried."""

    where: str
    what: str
    seconds: float
    problem: str | None  # the end of its output; None: it worked


def attempt(where: str, what: str, command: Sequence[str | Path], folder: Path) -> Step:
    """Run a command; its output counts only if it fails."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    problem = (done.stdout + done.stderr)[-2000:] if done.returncode else None
    step = Step(where, what, seconds, problem)
    click.echo(f"{'FAILED' if problem else 'ok':6}  {where:14}  {seconds:6.1f} s  {what}")
    if problem:
        click.echo(problem)
    return step


def built(out: Path, *isolation: str) -> Path:
    """Build source distribution and wheel, by default in an environment of its own."""
    shutil.rmtree(out / "dist", ignore_errors=True)
    command = [sys.executable, "-m", "build", "--outdir", out / "dist", *isolation, ROOT]
    if attempt("build", "python -m build", command, ROOT).problem:
        sys.exit(1)
    (wheel,) = (out / "dist").glob("*.whl")
    return wheel


def defects_of(wheel: Path) -> list[str]:
    """Return what a wheel lacks or has too much."""
    names = zipfile.ZipFile(wheel).namelist()
    found = [f"no file {end}" for end in DATA if not any(name.endswith(end) for name in names)]
    meta = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info/"
    return found + [
        f"{name} is not part of the package"
        for name in names
        if not name.startswith(("reptrt/", meta))
    ]


def lower_bounds(requirements: Iterable[str], extras: Sequence[str], python: str) -> list[str]:
    """Return name==version for the lower bound of each requirement that applies with the extras.

    Args:
        requirements: of the wheel.
        extras: that are installed with it.
        python: version of the interpreter: 3.10.13.
    """
    at = {"python_version": ".".join(python.split(".")[:2]), "python_full_version": python}
    bounds = []
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra, **at}) for extra in extras):
            lower = [s.version for s in requirement.specifier if s.operator == ">="]
            bounds += [f"{requirement.name}=={version}" for version in lower]
    return bounds


def tried(where: str, python: str, wheel: Path, out: Path, pins: Sequence[str]) -> list[Step]:
    """Install the wheel into a fresh environment and run `COMMANDS` beside it."""
    folder = out / where
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "program.py").write_text(PROGRAM)
    steps = [attempt(where, "venv", [python, "-m", "venv", "env"], folder)]
    scripts = folder / "env" / ("Scripts" if sys.platform == "win32" else "bin")
    pip = [scripts / "python", "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    wanted = [f"{wheel}[{','.join(EXTRAS)}]", "mypy", *pins]
    bounds = ["-c", ROOT / "constraints-dev.txt"]
    steps.append(attempt(where, "pip install", [*pip, *bounds, *wanted], folder))
    for command in COMMANDS:
        if steps[-1].problem:
            break
        program, *arguments = command.split()
        steps.append(attempt(where, command, [scripts / program, *arguments], folder))
    return steps


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder.")
@click.option("--python", "pythons", multiple=True, help="Interpreter; default: this one.")
@click.option("--oldest", help="Interpreter to try the oldest dependencies with.")
@click.option("--keep", is_flag=True, help="Keep the environments.")
def main(output: Path, pythons: tuple[str, ...], oldest: str | None, keep: bool) -> None:
    """Build, install and try."""
    out = output.resolve()
    wheel = built(out)
    defects = defects_of(wheel)
    for defect in defects:
        click.echo(f"FAILED  wheel: {defect}")
    pythons = pythons or (sys.executable,)
    runs: list[tuple[str, str, list[str]]] = [(_version(p), p, []) for p in pythons]
    if oldest is not None:
        requires = Distribution.at(_metadata(wheel, out)).requires or []
        runs.append(("oldest", oldest, lower_bounds(requires, EXTRAS, _version(oldest).split()[1])))
    steps: list[Step] = []
    for where, python, pins in runs:
        steps += tried(where, python, wheel, out, pins)
        if not keep:
            shutil.rmtree(out / where / "env", ignore_errors=True)
    sys.exit(bool(defects) or any(step.problem for step in steps))


def _version(python: str) -> str:
    """Return what an interpreter calls itself: Python 3.13.0."""
    done = subprocess.run([python, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _metadata(wheel: Path, out: Path) -> Path:
    """Unpack the wheel's metadata; return their folder."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" in name]
        archive.extractall(out / "metadata", names)
    return out / "metadata" / names[0].split("/")[0]


if __name__ == "__main__":
    main()
