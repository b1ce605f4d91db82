"""Run one row on one net and judge the file that it wrote."""

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rivals import environments
from rivals.rows import Row

import reptrt
from reptrt.core.artifacts import package_versions, replacing, sha256_of, write_json
from reptrt.core.choices import TaskName
from reptrt.core.errors import ReptrtError
from reptrt.data.dataset import open_dataset
from reptrt.graph.net import net_from_model, read_model
from reptrt.graph.preprocess import read_preprocess
from reptrt.judge.bench import bench
from reptrt.judge.evaluate import EvalReport, evaluate
from reptrt.judge.options import BenchOptions, EvaluateOptions
from reptrt.linter import lint

HERE = Path(__file__).resolve().parent
_PREPROCESS = "reptrt.preprocess"


class RowError(ReptrtError):
    """A rival failed; the message says how."""


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one row; values are None if they are not known or if the row failed."""

    name: str
    title: str
    is_rival: bool
    mark: str
    why: str | None = None  # why the row failed; None: it did not
    seconds: float | None = None  # from float file and images to INT8 file, without imports
    peak_rss_mib: float | None = None  # of the process that wrote the file
    kib: float | None = None
    nodes: int | None = None
    layers: int | None = None  # convolutions and matrix products
    int8_layers: int | None = None
    lint_errors: int | None = None  # number of defects for which TensorRT refuses the file
    lint_rules: tuple[str, ...] = ()  # ids of the rules that they break
    images: int | None = None  # that judged
    top1: float | None = None  # fraction 0..1
    top1_change: Mapping[str, float] | None = None  # to the float net: value, low, high (paired)
    agreement: float | None = None  # fraction 0..1
    map: float | None = None  # of a detector, fraction 0..1
    map_change: Mapping[str, float] | None = None  # as top1_change
    sqnr_db: float | None = None
    ratios: Mapping[str, tuple[float, float, float]] | None = None  # batch -> ratio, low, high


@dataclass(frozen=True, slots=True)
class Bench:
    """The net that the rows run on, and the folders they use."""

    net: Path  # float ONNX
    folder: Path  # for everything that is written for this net
    environments: Path
    timeout: float  # seconds for one quantization
    bench_seconds: float = 2.0  # for each file and batch size
    sources: Path = HERE  # folder of the runners

    @property
    def images(self) -> Path:
        """Where the prepared images are."""
        return self.folder / "images.npy"


@dataclass(frozen=True, slots=True)
class Test:
    """What judges the files."""

    images: Path
    limit: int | None = None  # number of images; None: all
    task: TaskName = "classify"
    annotations: Path | None = None  # of a detector; None: beside the images

    @property
    def key(self) -> list[str | int | None]:
        """What a judgement depends on, beside the files."""
        asked = [self.limit, self.task, self.annotations and str(self.annotations.resolve())]
        return [str(self.images.resolve()), *asked]

    def evaluate(self, paths: Sequence[Path], reference: Path | None = None) -> EvalReport:
        """Return what `reptrt eval` says about files."""
        options = EvaluateOptions(
            reference=reference,
            limit=self.limit,
            task=self.task,
            annotations=self.annotations,
            threads=1,
        )
        return evaluate(paths, self.images, options)


def cached(path: Path, key: Sequence[Any], compute: Callable[[], Any]) -> Any:
    """Return the value that is stored under the same key, or compute and store it."""
    value = _stored(path, key)
    if value is None:
        value = compute()
        _store(path, key, value)
    return value


def _stored(path: Path, key: Sequence[Any]) -> Any | None:
    if not path.exists():
        return None
    stored = json.loads(path.read_text())
    return stored["value"] if stored["key"] == _digest(key) else None


def _store(path: Path, key: Sequence[Any], value: Any) -> None:
    write_json(path, {"key": _digest(key), "value": value})


def _digest(key: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def write_images(at: Bench, data: Path, number: int) -> None:
    """Write the preprocessed images that all rows get, float32 (N, C, H, W)."""
    preprocess = read_preprocess(net_from_model(read_model(at.net)))
    dataset = open_dataset(data, preprocess, limit=number)

    def write() -> str:
        with replacing(at.images) as part, open(part, "wb") as stream:
            np.save(stream, np.concatenate(list(dataset.batches(64))))
        return sha256_of(at.images)

    key = [sha256_of(at.net), dataset.digest()]
    if not at.images.exists():
        (at.folder / "images.json").unlink(missing_ok=True)
    cached(at.folder / "images.json", key, write)


def quantize(at: Bench, row: Row) -> Result:
    """Let a row's tool write its INT8 file, unless it exists; return time, memory and graph.

    Raises:
        RowError: the tool failed or took too long.
        ReptrtError: its environment could not be made, or its file cannot be read.
    """
    output = at.folder / f"{row.name}.onnx"
    python, installed = Path(sys.executable), package_versions() | {"reptrt": _own_digest()}
    if row.environment is not None:
        python = environments.make(row.environment, at.environments)
        installed = environments.versions(row.environment, at.environments)
    record = at.folder / f"{row.name}.quantize.json"
    if not output.exists():
        record.unlink(missing_ok=True)
    scripts = [sha256_of(at.sources / f"{name}.py") for name in ("job", row.runner)]
    key = [sha256_of(at.net), sha256_of(at.images), scripts, dict(row.options), installed]
    took = cached(record, key, lambda: _run(at, row, python, output))
    report = lint(output)
    return Result(
        name=row.name,
        title=row.title,
        is_rival=row.is_rival,
        mark=row.mark,
        seconds=took["seconds"],
        peak_rss_mib=took["peak_rss_mib"],
        kib=output.stat().st_size / 1024,
        nodes=len(read_model(output).graph.node),
        layers=report.layers,
        int8_layers=report.int8_layers,
        lint_errors=report.count("error"),
        lint_rules=tuple(sorted({f.rule for f in report.findings if f.severity == "error"})),
    )


def judge(at: Bench, results: Sequence[Result], test: Test) -> list[Result]:
    """Return results with the accuracy and the SQNR of their files over test images.

    All files that are not judged yet run side by side, so that the images are decoded only once and
    the float net runs only once. If that fails, each file runs alone, and the result of a file that
    fails has the reason.
    """
    shared = [sha256_of(at.net), *test.key]
    files = {result.name: at.folder / f"{result.name}.onnx" for result in results if not result.why}
    keys = {name: [sha256_of(path), *shared] for name, path in files.items()}
    new = [path for name, path in files.items() if _stored(_judged(path), keys[name]) is None]

    def judged(paths: Sequence[Path]) -> None:
        report = test.evaluate(paths, at.net)
        for path, judgement in zip(paths, report.results, strict=True):
            _store(_judged(path), keys[path.stem], judgement.to_dict())

    failed: dict[str, str] = {}
    try:
        judged(new)
    except ReptrtError:
        for path in new:
            try:
                judged([path])
            except ReptrtError as err:
                failed[path.stem] = str(err)
    return [_with_judgement(at, result, keys, failed) for result in results]


def _with_judgement(
    at: Bench, result: Result, keys: Mapping[str, Sequence[Any]], failed: Mapping[str, str]
) -> Result:
    if result.why is not None:
        return result
    if result.name in failed:
        return replace(result, why=failed[result.name])
    judgement = _stored(_judged(at.folder / f"{result.name}.onnx"), keys[result.name])
    names = ("images", "top1", "top1_change", "agreement", "map", "map_change", "sqnr_db")
    return replace(result, **{name: judgement[name] for name in names if name in judgement})


def _judged(path: Path) -> Path:
    return path.with_suffix(".eval.json")


def time_all(
    at: Bench, results: Sequence[Result], batches: tuple[int, ...]
) -> tuple[list[Result], Any]:
    """Time the float net and all files side by side; return the results and bench's report.

    A file that onnxruntime cannot run at some batch size has no ratios.
    """
    files = {result.name: at.folder / f"{result.name}.onnx" for result in results if not result.why}
    files = {name: path for name, path in files.items() if _runs(path, batches)}

    def compute() -> Any:
        paths = [at.net, *files.values()]
        report = bench(
            paths,
            BenchOptions(batches=batches, threads=1, baseline=at.net, min_seconds=at.bench_seconds),
        )
        return report.to_dict()

    key = [sha256_of(at.net), {name: sha256_of(path) for name, path in files.items()}]
    report = cached(at.folder / "bench.json", [*key, batches, at.bench_seconds], compute)
    ratios: dict[str, dict[str, tuple[float, float, float]]] = {}
    for timing in report["results"]:
        values = (timing["ratio"], timing["ratio_low"], timing["ratio_high"])
        ratios.setdefault(Path(timing["file"]).stem, {})[str(timing["batch"])] = values
    return [
        replace(result, ratios=ratios[result.name] if result.name in files else None)
        for result in results
    ], report


def _runs(path: Path, batches: tuple[int, ...]) -> bool:
    try:
        bench([path], BenchOptions(batches=batches, threads=1, min_seconds=0.0, warmup_seconds=0.0))
    except ReptrtError:
        return False
    return True


def _run(at: Bench, row: Row, python: Path, output: Path) -> dict[str, Any]:
    """Run a row's tool in a process of its own; return its last line with the file's sha256."""
    output.unlink(missing_ok=True)
    paths = [str(path.resolve()) for path in (at.net, at.images, output)]
    script = str(at.sources / f"{row.runner}.py")
    command = [str(python.absolute()), script, *paths, json.dumps(dict(row.options))]
    with tempfile.TemporaryDirectory() as folder:  # some tools leave files in the current folder
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=at.timeout, check=False
            )
        except subprocess.TimeoutExpired as err:
            raise RowError(f"took more than {at.timeout:.0f} s") from err
    (at.folder / f"{row.name}.log").write_text(done.stdout + done.stderr)
    if done.returncode != 0 or not output.exists():
        output.unlink(missing_ok=True)
        raise RowError(
            _last_line(done.stderr) or f"exit status {done.returncode}, but no file and no message"
        )
    _copy_preprocess(at.net, output)
    took: dict[str, Any] = json.loads(_last_line(done.stdout))
    return took


def _copy_preprocess(net: Path, output: Path) -> None:
    """Copy the preprocessing metadata of the float net into a file, for `evaluate`."""
    model = onnx.load(output)
    if any(prop.key == _PREPROCESS for prop in model.metadata_props):
        return
    for prop in read_model(net).metadata_props:
        if prop.key == _PREPROCESS:
            model.metadata_props.append(prop)
    with replacing(output) as part:
        onnx.save(model, part)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _own_digest() -> str:
    """Return the sha256 of this package's sources, so that a change of code is a new key."""
    digest = hashlib.sha256()
    for path in sorted(Path(reptrt.__path__[0]).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
