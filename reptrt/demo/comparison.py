"""Compare four ways to INT8, build an engine, and measure what each step changes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from reptrt import pipeline
from reptrt.core.errors import MissingDependencyError
from reptrt.demo import digits
from reptrt.judge.bench import bench
from reptrt.judge.evaluate import evaluate
from reptrt.judge.options import BenchOptions, EvaluateOptions
from reptrt.judge.rungs import Ladder
from reptrt.runs.ladder import Forms, climb
from reptrt.runs.options import RunOptions
from reptrt.trt.build import EngineSummary, build_engine
from reptrt.trt.options import BuildOptions

FLOAT, OURS, FOR_CPU = "float", "reptrt INT8", "reptrt INT8 for CPUs"
SOURCE = pipeline.Source("repvgg", digits.WEIGHTS, digits.ARCHITECTURE)
EXPORT = pipeline.ExportOptions(digits.INPUT_SIZE, digits.MEAN, digits.STD)
CALIBRATIONS = {
    "plain INT8": pipeline.PLAIN_INT8,
    "reptrt INT8, no split": pipeline.CalibrateOptions(split="none"),  # no more nodes than plain
    OURS: pipeline.CalibrateOptions(),
    FOR_CPU: pipeline.CalibrateOptions(target="onnxruntime"),
}
_FILES = {
    FLOAT: "digits.onnx",
    "plain INT8": "digits.plain.onnx",
    "reptrt INT8, no split": "digits.nosplit.onnx",
    OURS: "digits.int8.onnx",
    FOR_CPU: "digits.cpu.onnx",
}
_BENCH_SECONDS = 1.0  # for each file
_KIB = 1 << 10


@dataclass(frozen=True, slots=True)
class Row:
    """The measurements of one file."""

    name: str
    file: Path
    top1: float  # fraction 0..1 of the held-out images
    agreement: float  # fraction of images with the float net's arg max
    sqnr_db: float | None  # of the logits against the float net; None for the float net
    median_ms: float  # batch 1 in onnxruntime on one CPU thread
    ratio: float  # to the float net's time
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """All files, the engine or why there is none, and the ladder of the last file."""

    rows: tuple[Row, ...]
    images: int
    cpu: str
    engine: EngineSummary | None
    no_engine: str | None
    ladder: Ladder

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        rows = [asdict(row) | {"file": str(row.file)} for row in self.rows]
        engine = None if self.engine is None else self.engine.to_dict()
        return {
            "rows": rows,
            "images": self.images,
            "cpu": self.cpu,
            "engine": engine,
            "no_engine": self.no_engine,
            "ladder": self.ladder.to_dict(),
        }

    def to_table(self) -> Table:
        """Return the measurements as a table."""
        table = Table(box=None, pad_edge=False, caption=self._caption(), caption_justify="left")
        table.add_column("")
        for title in ("top-1", "agreement", "SQNR dB", "median ms", "ratio", "KiB"):
            table.add_column(title, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(
                row.name,
                f"{100 * row.top1:.2f} %",
                f"{100 * row.agreement:.2f} %",
                "-" if row.sqnr_db is None else f"{row.sqnr_db:.2f}",
                f"{row.median_ms:.3f}",
                f"{row.ratio:.2f}",
                f"{row.size_bytes / _KIB:.0f}",
            )
        return table

    def engine_line(self) -> str:
        """Return one line about the engine."""
        if self.engine is None:
            return f"no engine: {self.no_engine}"
        details = self.engine.details
        return (
            f"engine {self.engine.path}: {details.backend} {details.backend_version}, "
            f"{details.size_bytes / _KIB:.0f} KiB, built in {self.engine.seconds:.1f} s"
        )

    def _caption(self) -> str:
        return (
            f"{self.images} held-out images; onnxruntime, batch 1, 1 thread, {self.cpu}; "
            "the INT8 files but the last are made for TensorRT"
        )


def compare(folder: Path) -> Comparison:
    """Export, calibrate in four ways, evaluate, time, build an engine; all files in ``folder``.

    Raises:
        ReptrtError: a stage failed; its file was not written.
    """
    data = digits.write_arrays(folder)
    files = write_files(folder, data["train"])
    reference = files[FLOAT]
    judged = evaluate(list(files.values()), data["held_out"], EvaluateOptions(reference=reference))
    timed = bench(
        list(files.values()),
        BenchOptions(baseline=reference, threads=1, min_seconds=_BENCH_SECONDS),
    )
    rows = tuple(
        Row(
            name=name,
            file=path,
            top1=result.top1 or 0.0,
            agreement=result.agreement or 0.0,
            sqnr_db=None if path == reference else result.sqnr_db,
            median_ms=timing.median_ms,
            ratio=timing.ratio or 1.0,
            size_bytes=path.stat().st_size,
        )
        for (name, path), result, timing in zip(
            files.items(), judged.results, timed.results, strict=True
        )
    )
    engine, no_engine = try_engine(files[OURS], folder / "digits.engine")
    ladder = climb(
        SOURCE,
        Forms(reference, files[OURS], None if engine is None else engine.path),
        data["held_out"],
        data["train"],
        RunOptions(export=EXPORT, calibrate=CALIBRATIONS[OURS]),
    )
    return Comparison(rows, judged.results[0].images, timed.cpu, engine, no_engine, ladder)


def write_files(folder: Path, images: Path) -> Mapping[str, Path]:
    """Export the net and quantize it in four ways; return the files by the name of their row."""
    files = {name: folder / file for name, file in _FILES.items()}
    pipeline.export(SOURCE, files[FLOAT], EXPORT)
    for name, calibration in CALIBRATIONS.items():
        pipeline.calibrate(files[FLOAT], images, files[name], calibration)
    return files


def try_engine(model: Path, output: Path) -> tuple[EngineSummary | None, str | None]:
    """Return an engine built without a GPU, or None and what is missing."""
    try:
        return build_engine(model, output, BuildOptions(backend="tensorrt-rtx")), None
    except MissingDependencyError as err:
        return None, str(err)
