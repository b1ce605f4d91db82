"""Sections about activations, and about inputs, files, options, versions and the machine."""

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from reptrt.runs.report.charts import HistogramView, histogram
from reptrt.runs.report.content import JsonObject, RunContent
from reptrt.runs.report.page import (
    Block,
    Cell,
    Column,
    Figure,
    Figures,
    Legend,
    Section,
    Table,
    Text,
    number,
    percent,
    size,
)


def activations(run: RunContent) -> Section:
    """Return a histogram of every quantized activation, with its threshold."""
    title = "Activations and their thresholds"
    calibration = run.calibrate.value
    if calibration is None:
        return Section("activations", title, absent=run.calibrate.reason)
    if not all("bins" in tensor for tensor in calibration["tensors"]):
        return Section("activations", title, absent="calibrate.json has no histograms")
    rule, margin = calibration["threshold"], calibration["margin"]
    widened = f", widened by a factor of {margin:.2f}" if margin > 1 else ""
    text = (
        "Each histogram counts |x| over the calibration images, without exact zeros; its vertical "
        f"axis is logarithmic. The line marks the threshold (rule {rule}{widened}): values more "
        "than half a step above it are clipped. Tensors that share a scale share the threshold."
    )
    full = {choice["tensor"] for choice in calibration["ranges"] if choice["full"]}
    figures = tuple(_figure(tensor, tensor["tensor"] in full) for tensor in calibration["tensors"])
    legend = Legend(
        (("after", "within the threshold"), ("clipped", "clipped"), ("threshold", "threshold"))
    )
    return Section("activations", title, (Text(text), legend, Figures(figures)))


def environment(run: RunContent) -> Section:
    """Return inputs, files, options, versions and machine."""
    record = run.manifest
    blocks: tuple[Block, ...] = (
        _inputs(run),
        _files(run),
        *(Text(f"The stage {stage} was skipped: {why}") for stage, why in run.skipped.items()),
        _pairs("Packages", "package", "version", record.versions),
        _pairs("Machine", "", "", record.machine),
        _pairs("Options", "option", "value", dict(_flat(record.options))),
    )
    return Section("environment", "Environment and hashes", blocks)


def _figure(tensor: JsonObject, full_range: bool) -> Figure:
    end = max(tensor["maximum"], tensor["amax"])
    view = HistogramView(tensor["bins"], tensor["bin_width"], tensor["amax"], end)
    share = clipped(tensor)
    kept = tensor["amax"] / tensor["maximum"]
    label = f"{tensor['tensor']}: max {number(tensor['maximum'])}, kept {number(tensor['amax'])}"
    lines = (
        f"up to {number(tensor['maximum'])}, kept {number(tensor['amax'])} ({100 * kept:.0f} %)",
        f"step {number(tensor['scale'])}{', full range' if full_range else ''}",
        f"{percent(tensor['zeros'])} zeros, {'<' if 0 < share < 1e-4 else ''}"
        f"{percent(max(share, 1e-4) if share else 0.0)} clipped",
    )
    return Figure(tensor["tensor"], histogram(view, label), lines)


def clipped(tensor: JsonObject) -> float:
    """Return the fraction of values above amax + scale / 2, interpolated within a bin."""
    width, bins = tensor["bin_width"], tensor["bins"]
    amax = tensor["amax"] + tensor["scale"] / 2  # smaller values are rounded, not clipped
    beyond = 0.0
    for index, count in enumerate(bins):
        inside = min(max(amax / width - index, 0.0), 1.0)
        end = min((index + 1) * width, tensor["maximum"]) / width - index  # no value is above
        outside = 1.0 - inside / end if inside < end else 0.0
        beyond += count * outside
    total = sum(bins) / (1.0 - tensor["zeros"]) if tensor["zeros"] < 1.0 else 0.0
    return beyond / total if total else 0.0


def _inputs(run: RunContent) -> Table:
    record = run.manifest
    source = record.source["name"]
    rows: list[tuple[Cell, ...]] = [("source", name_of(source), "")]
    rows += [("file of the source", name_of(f.path), f.sha256) for f in record.source_files]
    rows.append(("calibration images", name_of(record.data.path), record.data.sha256))
    rows.append(("evaluation images", name_of(record.eval_data.path), record.eval_data.sha256))
    columns = (Column("input", "name"), Column("name", "text"), Column("sha256", "code"))
    return Table("Inputs", columns, tuple(rows))


def _files(run: RunContent) -> Table:
    rows = tuple(
        (file.stage, file.path.name, size(file.size_bytes), file.state, file.sha256)
        for file in run.files
    )
    columns = (
        Column("stage", "name"),
        Column("file", "text"),
        Column("size"),
        Column("state", "text"),
        Column("sha256", "code"),
    )
    return Table("Files of the run", columns, rows)


def _pairs(caption: str, name: str, value: str, content: Mapping[str, Any]) -> Table:
    rows = tuple((key, _plain(entry)) for key, entry in content.items())
    return Table(caption, (Column(name, "name"), Column(value, "text")), rows)


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(_plain, value)) or "-" if isinstance(value, list) else str(value)


def name_of(path: object) -> str:
    """Return the last part of a path; the folders mean nothing to a reader elsewhere."""
    return PurePath(str(path)).name
