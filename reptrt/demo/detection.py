"""Take the small YOLOv6 to INT8 in two ways, and compare the mAP on held-out pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table

from reptrt import pipeline
from reptrt.demo import detector, scenes
from reptrt.judge.bench import bench
from reptrt.judge.evaluate import evaluate
from reptrt.judge.options import BenchOptions, EvaluateOptions
from reptrt.judge.predict.options import PredictOptions
from reptrt.judge.predict.predicting import predict

FLOAT, PLAIN, OURS = "float", "plain INT8", "reptrt INT8"
PICTURES = {"train": 128, "held_out": 200}  # to calibrate with, and to judge by
DRAWN = 4  # pictures that are drawn with boxes
CONFIDENCE = 0.4  # score above which a box is drawn
SOURCE = pipeline.Source("yolov6", detector.WEIGHTS, detector.ARCHITECTURE)
EXPORT = pipeline.ExportOptions(detector.INPUT_SIZE)
CALIBRATIONS = {
    PLAIN: replace(pipeline.PLAIN_INT8, images=PICTURES["train"]),
    OURS: pipeline.CalibrateOptions(images=PICTURES["train"]),
}
FILES = {FLOAT: "detector.onnx", PLAIN: "detector.plain.onnx", OURS: "detector.int8.onnx"}
_BENCH_SECONDS = 0.5  # for each file
_KIB = 1 << 10


@dataclass(frozen=True, slots=True)
class Row:
    """The measurements of one file."""

    name: str
    file: Path
    map: float  # mAP at IoU 0.50 to 0.95, fraction 0..1
    map50: float  # at IoU 0.50
    change: Mapping[str, float] | None  # of the mAP: value, low and high; None for the float net
    median_ms: float  # batch 1 in onnxruntime on one CPU thread
    ratio: float  # to the float net's time
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Detection:
    """All files, measured."""

    rows: tuple[Row, ...]
    pictures: int
    cpu: str
    drawn: Path  # some pictures with the boxes of the float net above, of the last file below

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        rows = [asdict(row) | {"file": str(row.file)} for row in self.rows]
        return {
            "rows": rows,
            "pictures": self.pictures,
            "cpu": self.cpu,
            "drawn": str(self.drawn),
        }

    def to_table(self) -> Table:
        """Return the measurements as a table."""
        table = Table(box=None, pad_edge=False, caption=self._caption(), caption_justify="left")
        table.add_column("")
        for title in ("mAP", "AP50", "change of mAP (95 %)", "median ms", "ratio", "KiB"):
            table.add_column(title, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(
                row.name,
                f"{100 * row.map:.2f}",
                f"{100 * row.map50:.2f}",
                "-" if row.change is None else _change_text(row.change),
                f"{row.median_ms:.3f}",
                f"{row.ratio:.2f}",
                f"{row.size_bytes / _KIB:.0f}",
            )
        return table

    def _caption(self) -> str:
        return f"{self.pictures} held-out pictures; onnxruntime, batch 1, 1 thread, {self.cpu}"


def detect(folder: Path) -> Detection:
    """Draw pictures, export, calibrate in two ways, evaluate, time; all files in ``folder``.

    Raises:
        ReptrtError: a stage failed; its file was not written.
    """
    pictures = scenes.write_sets(folder, PICTURES)
    files = write_files(folder, pictures["train"])
    judged = evaluate(
        list(files.values()),
        pictures["held_out"],
        EvaluateOptions(task="detect", reference=files[FLOAT]),
    )
    timed = bench(
        list(files.values()),
        BenchOptions(baseline=files[FLOAT], threads=1, min_seconds=_BENCH_SECONDS),
    )
    rows = tuple(
        Row(
            name=name,
            file=path,
            map=result.measures["map"],
            map50=result.measures["map50"],
            change=result.measures["map_change"],
            median_ms=timing.median_ms,
            ratio=timing.ratio or 1.0,
            size_bytes=path.stat().st_size,
        )
        for (name, path), result, timing in zip(
            files.items(), judged.results, timed.results, strict=True
        )
    )
    drawn = folder / "detections.png"
    draw_side_by_side([files[FLOAT], files[OURS]], pictures["held_out"], drawn)
    return Detection(rows, judged.results[0].images, timed.cpu, drawn)


def write_files(folder: Path, pictures: Path) -> Mapping[str, Path]:
    """Export the detector and quantize it in two ways; return the files by the name of their row.

    Args:
        folder: for the files.
        pictures: a folder of pictures to calibrate with.
    """
    files = {name: folder / file for name, file in FILES.items()}
    pipeline.export(SOURCE, files[FLOAT], EXPORT)
    for name, calibration in CALIBRATIONS.items():
        pipeline.calibrate(files[FLOAT], pictures, files[name], calibration)
    return files


def draw_side_by_side(files: Sequence[Path], pictures: Path, output: Path) -> None:
    """Draw the boxes that each file finds in the first pictures: a row for each file."""
    chosen = sorted(pictures.iterdir())[:DRAWN]
    options = PredictOptions(
        labels=scenes.annotations_of(pictures), confidence=CONFIDENCE, threads=1
    )
    rows: list[list[Image.Image]] = []
    for file in files:
        drawn = predict(file, chosen, output.with_name(f"drawn_{file.stem}"), options).images
        rows.append([Image.open(each.drawn) for each in drawn if each.drawn is not None])
    widths = [max(image.width for image in column) for column in zip(*rows, strict=True)]
    heights = [max(image.height for image in row) for row in rows]
    sheet = Image.new("RGB", (sum(widths), sum(heights)), "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            sheet.paste(image, (sum(widths[:j]), sum(heights[:i])))
    sheet.save(output)


def _change_text(change: Mapping[str, float]) -> str:
    value, low, high = (100 * change[key] for key in ("value", "low", "high"))
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"
