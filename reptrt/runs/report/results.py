"""Sections about the net as a whole: the summary, accuracy, latency."""

from collections.abc import Mapping
from typing import Any

from reptrt.runs.report.charts import Scale, bar, interval, scale_of
from reptrt.runs.report.content import JsonObject, RunContent
from reptrt.runs.report.page import (
    Block,
    Cell,
    Column,
    Legend,
    Section,
    Table,
    Text,
    Tile,
    decibels,
    number,
    percent,
    size,
)

_AS_HUNDREDTHS = {
    "map": "mAP",
    "map50": "AP50",
    "map75": "AP75",
    "map_small": "small",
    "map_medium": "medium",
    "map_large": "large",
    "miou": "mIoU",
}
_MEASURES = {
    **_AS_HUNDREDTHS,
    "pixel_accuracy": "pixels right",
    "pixel_agreement": "pixels agreeing",
    "top1": "top-1",
    "top5": "top-5",
    "agreement": "agreement",
}


def tiles(run: RunContent) -> tuple[Tile, ...]:
    """Return the numbers at the top of the page: accuracy, SQNR, agreement, latency, size."""
    summary: list[Tile] = []
    if run.eval.value is not None:
        results = run.eval.value["results"]
        summary += _accuracy_tiles(results[0], results[-1])
    if run.bench.value is not None:
        summary += [_latency_tile(row) for row in run.bench.value["results"] if _is_int8(row)]
    sizes = {file.stage: file.size_bytes for file in run.files}
    before, after = sizes.get("export"), sizes.get("calibrate")
    if before and after:
        detail = f"{size(before)} float, {size(after)} INT8"
        summary.append(Tile("Size of the ONNX file", f"{after / before:.2f} x", detail))
    return tuple(summary)


def accuracy(run: RunContent) -> Section:
    """Return the ladder if it was computed, else the evaluation of the final files."""
    if run.ladder.value is not None:
        return Section("accuracy", "Accuracy, step by step", _ladder(run.ladder.value))
    if run.eval.value is None:
        return Section("accuracy", "Accuracy", absent=run.eval.reason)
    why = Text(f"The ladder, which shows what each step loses, is missing: {run.ladder.reason}.")
    return Section("accuracy", "Accuracy", (_judged(run.eval.value), why))


def latency(run: RunContent) -> Section:
    """Return the timings, one table for each batch size."""
    bench = run.bench.value
    if bench is None:
        return Section("latency", "Latency", absent=run.bench.reason)
    blocks: list[Block] = [
        Text(
            f"{bench['cpu']}. The runs of all files are interleaved. A dot is the median, its line "
            "the 95 % confidence interval; the ratio divides a file's time by the first file's "
            "time in the same round."
        )
    ]
    for batch in sorted({row["batch"] for row in bench["results"]}):
        rows = [row for row in bench["results"] if row["batch"] == batch]
        blocks.append(_timings(batch, rows))
    blocks += [Text(f"The measurement was disturbed: {remark}.") for remark in bench["remarks"]]
    blocks += [Text(f"{warning}.") for warning in bench.get("warnings", ())]
    return Section("latency", "Latency", tuple(blocks))


def _accuracy_tiles(reference: JsonObject, judged: JsonObject) -> list[Tile]:
    summary = []
    for key, title in (("map", "mAP"), ("miou", "mIoU")):
        if judged.get(key) is not None and reference.get(key) is not None:
            points = 100 * (judged[key] - reference[key])
            detail = f"float {100 * reference[key]:.2f}, {points:+.2f} points{_interval(judged)}"
            summary.append(Tile(title, f"{100 * judged[key]:.2f}", detail))
    if judged.get("top1") is not None:
        points = 100 * (judged["top1"] - reference["top1"])
        detail = f"float {percent(reference['top1'])}, {points:+.2f} points{_interval(judged)}"
        summary.append(Tile("Top-1", percent(judged["top1"]), detail))
    if judged["sqnr_db"] is not None:
        detail = f"of the outputs, on {judged['images']} images"
        summary.append(Tile("SQNR", f"{judged['sqnr_db']:.2f} dB", detail))
    if judged.get("agreement") is not None:
        agreement = percent(judged["agreement"])
        summary.append(Tile("Agreement", agreement, "same class as the float net"))
    return summary


def _interval(judged: JsonObject) -> str:
    """Return the 95 % interval of the change of mAP or top-1, or nothing."""
    change = judged.get("map_change") or judged.get("top1_change")
    if change is None:
        return ""
    return f" (95 %: {100 * change['low']:+.2f} to {100 * change['high']:+.2f})"


def _is_int8(row: JsonObject) -> bool:
    return row["ratio"] is not None and row["file"] != "float.onnx"


def _latency_tile(row: JsonObject) -> Tile:
    interval = f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}, of float in {row['runner']}"
    return Tile(f"Latency, batch {row['batch']}", f"{row['ratio']:.3f} x", interval)


def _ladder(ladder: JsonObject) -> tuple[Block, ...]:
    rungs = ladder["rungs"]
    ratios = [_value(rung["from_first"], "sqnr_db") for rung in rungs]
    scale = scale_of(ratios)
    columns = (
        Column("form of the net", "name"),
        Column("runs in", "text"),
        Column(ladder.get("measure", "top-1")),
        Column("SQNR so far", "chart"),
        Column("dB"),
        Column("agreement"),
        Column("largest difference"),
        Column(f"this step: {ladder.get('measure', 'top-1')}"),
        Column("dB"),
        Column("agreement"),
        Column("largest difference"),
    )
    rows = tuple(_rung(rung, scale) for rung in rungs)
    text = (
        f"Measured on {ladder['images']} images; the largest |output| is "
        f"{number(ladder['largest_output'], 3)}. The last four columns compare each form with the "
        "form in the row above, the columns before them with the first form."
    )
    reasons = [Text(f"{r['name']} was not run: {r['not_run']}") for r in rungs if r["not_run"]]
    return (Text(text), Table("What each step loses", columns, rows), *reasons)


def _rung(rung: JsonObject, scale: Scale) -> tuple[Cell, ...]:
    first, step = rung["from_first"], rung["from_before"]
    ratio = _value(first, "sqnr_db")
    chart: Cell = "" if ratio is None else bar(scale, ratio, "after", f"{ratio:.2f} dB")
    change = _value(step, "top1_change")
    score = rung.get("score")
    if score is not None and step is not None:
        change = step.get("score_change")
    return (
        rung["name"],
        rung["runs_in"],
        percent(rung["top1"]) if score is None else f"{100 * score:.2f}",
        chart,
        *_distance(first),
        "-" if change is None else f"{100 * change:+.2f}",
        *_distance(step),
    )


def _distance(distance: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """Return SQNR, agreement and largest difference as text."""
    if distance is None:
        return "-", "-", "-"
    equal = distance["max_difference"] == 0
    return (
        "equal" if equal else decibels(distance["sqnr_db"]),
        percent(distance["agreement"]),
        number(distance["max_difference"], 2),
    )


def _value(distance: Mapping[str, Any] | None, name: str) -> float | None:
    return None if distance is None else distance[name]


def _judged(content: JsonObject) -> Table:
    measures = {
        key: title
        for key, title in _MEASURES.items()
        if any(key in row for row in content["results"])
    }
    titles = ("images", *measures.values(), "SQNR dB")
    rows = tuple(
        (
            row["file"],
            str(row["images"]),
            *(_measure(key, row.get(key)) for key in measures),
            decibels(row["sqnr_db"]),
        )
        for row in content["results"]
    )
    columns = (Column("file", "name"), *(Column(title) for title in titles))
    return Table("Evaluated on the same images", columns, rows)


def _measure(key: str, value: float | None) -> str:
    if key in _AS_HUNDREDTHS:
        return "-" if value is None else f"{100 * value:.2f}"
    return percent(value)


def _timings(batch: int, rows: list[JsonObject]) -> Table:
    scale = scale_of([0.0, *(row["median_high_ms"] for row in rows)])
    columns = (
        Column("file", "name"),
        Column("runs in", "text"),
        Column("median", "chart"),
        Column("median ms"),
        Column("95 % interval"),
        Column("p90"),
        Column("p99"),
        Column("images/s"),
        Column("ratio"),
        Column("95 % interval"),
    )
    return Table(f"Batch {batch}", columns, tuple(_timing(row, scale) for row in rows))


def _timing(row: JsonObject, scale: Scale) -> tuple[Cell, ...]:
    low, median, high = (row[f"median_{end}ms"] for end in ("low_", "", "high_"))
    threads = "" if row["threads"] is None else f" x{row['threads']}"
    label = f"{row['file']}: median {median:.3f} ms, {low:.3f} to {high:.3f}"
    has_ratio = row["ratio"] is not None
    return (
        row["file"],
        f"{row['runner']}, {row['device']}{threads}",
        interval(scale, low, median, high, "after" if _is_int8(row) else "before", label),
        f"{median:.3f}",
        f"{low:.3f} - {high:.3f}",
        f"{row['p90_ms']:.3f}",
        f"{row['p99_ms']:.3f}",
        f"{row['throughput_ips']:.0f}",
        f"{row['ratio']:.3f}" if has_ratio else "-",
        f"{row['ratio_low']:.3f} - {row['ratio_high']:.3f}" if has_ratio else "-",
    )


BEFORE_AFTER = Legend((("before", "plain"), ("after", "as calibrated")))
