"""report.html of a sweep: the best of each net, each net as a chart, every trial as a row."""

from collections.abc import Sequence
from pathlib import Path

from reptrt.core.artifacts import write_bytes
from reptrt.runs.report import render
from reptrt.runs.report.charts import Mark, scatter
from reptrt.runs.report.page import (
    Block,
    Column,
    Figure,
    Figures,
    Legend,
    Page,
    Section,
    Table,
    Text,
    Tile,
)
from reptrt.sweeping.record import Row, Swept

_KINDS = {"tensorrt": "after", "onnxruntime": "before"}


def write_page(path: Path, swept: Swept) -> None:
    """Write the page; it loads nothing."""
    write_bytes(path, render(page_of(swept)).encode())


def page_of(swept: Swept) -> Page:
    """Return the content of the page about a sweep."""
    failed = swept.failed
    notes = (f"{len(failed)} of {len(swept.rows)} trials failed; see Failures.",) if failed else ()
    version = swept.versions.get("reptrt", "?")
    sections = [
        Section("best", "The best of each net", (_best(swept),)),
        Section("charts", "Loss and time of each net", _charts(swept)),
        Section("trials", "All trials", (_all(swept),)),
    ]
    if failed:
        sections.append(Section("failures", "Failures", (_failures(failed),)))
    if any(row.engines for row in swept.rows):
        sections.append(Section("engines", "Engines", (_engines(swept),)))
    return Page(
        title=f"sweep of {len(swept.nets)} nets",
        subtitle=f"{len(swept.rows)} trials; reptrt {version}; files in {swept.store}",
        notes=notes,
        tiles=_tiles(swept),
        sections=tuple(sections),
    )


def loss_of(row: Row) -> float | None:
    """Return what a trial loses: points of its task's measure, else the noise in dB."""
    if row.change is not None:
        return -row.change
    return None if row.sqnr_db is None else -row.sqnr_db


def _tiles(swept: Swept) -> tuple[Tile, ...]:
    finished = [row for row in swept.rows if row.is_finished]
    seconds = sum(row.seconds or 0.0 for row in finished)
    return (
        Tile("Nets", str(len(swept.nets)), ", ".join(_some(list(swept.nets)))),
        Tile("Trials", str(len(swept.rows)), f"{len(finished)} finished"),
        Tile("Failed", str(len(swept.failed)), "listed below" if swept.failed else "none"),
        Tile("Work", f"{seconds / 60:.1f} min", "seconds of all trials together"),
    )


def _best(swept: Swept) -> Table:
    """Return the most accurate trial of each net and target; of equal ones, the first."""
    best: dict[tuple[str, str], Row] = {}
    for row in swept.rows:
        before = best.get((row.net, row.target))
        if row.judged is not None and (before is None or _rank(row) < _rank(before)):
            best[row.net, row.target] = row
    columns = (
        *(Column(title, "name") for title in ("net", "target", "trial")),
        *(Column(f"float {title}") for title in swept.task_titles),
        *(Column(title) for title in swept.titles),
    )
    rows = tuple(
        (
            *(row.net, row.target, row.name),
            *(row.cell(title, 0) for title in swept.task_titles),
            *swept.cells(row),
        )
        for row in best.values()
    )
    return Table("The trial of each net and target that loses least", columns, rows)


def _rank(row: Row) -> tuple[float, float]:
    loss, sqnr = loss_of(row), row.sqnr_db
    return (float("inf") if loss is None else loss, float("-inf") if sqnr is None else -sqnr)


def _charts(swept: Swept) -> tuple[Block, ...]:
    figures = [figure for net in swept.nets if (figure := _chart(net, swept)) is not None]
    if not figures:
        return (Text("No trial has both."),)
    legend = Legend(
        (
            *((kind, f"made for {target}") for target, kind in _KINDS.items()),
            ("threshold", "no loss; where nothing is labelled, the most noise"),
        )
    )
    return legend, Figures(tuple(figures))


def _chart(net: str, swept: Swept) -> Figure | None:
    marks, scored = [], False
    for number, row in enumerate(swept.rows, 1):
        loss = loss_of(row)
        if row.net == net and loss is not None and row.modelled is not None:
            marks.append(Mark(row.modelled, loss, _KINDS[row.target], str(number), row.name))
            scored = scored or row.change is not None
    if not marks:
        return None
    upwards = "points lost" if scored else "SQNR, negative, in dB"
    bound = 0.0 if scored else max(mark.y for mark in marks)
    chart = scatter(marks, bound, f"loss over time of the trials of {net}")
    return Figure(net, chart, (f"Upwards: {upwards}; to the right: time by the model, float is 1",))


def _all(swept: Swept) -> Table:
    columns = (
        Column("trial", "name"),
        *(Column(title) for title in (*swept.titles, "seconds")),
        Column("state", "words"),
        Column("file", "code"),
    )
    rows = tuple(
        (
            f"{number}. {row.name}",
            *swept.cells(row),
            "-" if row.seconds is None else f"{row.seconds:.1f}",
            row.state.partition(":")[0],
            row.file or "-",
        )
        for number, row in enumerate(swept.rows, 1)
    )
    return Table("All trials, in the order of the file; files are in the store", columns, rows)


def _failures(failed: Sequence[Row]) -> Table:
    columns = (Column("trial", "name"), Column("why", "words"))
    rows = tuple((row.name, row.state.removeprefix("failed: ")) for row in failed)
    return Table("Trials that have no result, and why", columns, rows)


def _engines(swept: Swept) -> Table:
    titles = (("trial", "name"), ("GPU", "name"), ("state", "words"), ("file", "code"))
    rows = tuple(
        (row.name, gpu, made["state"], made.get("file", "-"))
        for row in swept.rows
        for gpu, made in row.engines.items()
    )
    columns = tuple(Column(title, kind) for title, kind in titles)  # type: ignore[arg-type]
    return Table("Engines, each built on a machine with its GPU", columns, rows)


def _some(names: Sequence[str]) -> list[str]:
    return [*names[:3], *(["..."] if len(names) > 3 else [])]
