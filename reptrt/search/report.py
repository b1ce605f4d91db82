"""report.html of a search: the Pareto front as a chart, every candidate as a row."""

from pathlib import Path

from reptrt.core.artifacts import write_bytes
from reptrt.runs.report import render
from reptrt.runs.report.charts import Mark, scatter
from reptrt.runs.report.page import (
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
from reptrt.search.record import Row, Tuned, interval_text


def write_page(path: Path, tuned: Tuned, model: str) -> None:
    """Write the page; it loads nothing."""
    write_bytes(path, render(page_of(tuned, model)).encode())


def page_of(tuned: Tuned, model: str) -> Page:
    """Return the content of the page about a search."""
    head, *rest = tuned.verdict()
    return Page(
        title=f"tune {model}",
        subtitle=f"target {tuned.target}; {head}",
        notes=() if tuned.met else tuple(hint.strip() for hint in tuned.hints),
        tiles=_tiles(tuned),
        sections=(
            Section("front", "Cost and loss", _front(tuned)),
            Section("candidates", "Candidates", (_table(tuned),)),
            Section("choice", "The choice", tuple(Text(line.strip()) for line in (head, *rest))),
        ),
    )


def _tiles(tuned: Tuned) -> tuple[Tile, ...]:
    best = tuned.best
    tiles = [Tile("Chosen", best.name, "meets the bound" if tuned.met else "misses the bound")]
    for judged, title in ((best.judged, "On tuning images"), (best.confirmed, "On unseen images")):
        if judged is not None:
            inside = "" if judged.low is None else f", 95 %: {interval_text(judged)}"
            value = f"{judged.value:.2f} dB" if tuned.metric == "sqnr" else f"-{judged.loss:.2f}"
            tiles.append(Tile(title, value.replace("--", "+"), f"{judged.images} images{inside}"))
    if best.cost is not None:
        how = "measured, of plain INT8" if tuned.is_measured else "by the model, of plain INT8"
        tiles.append(Tile("Latency", f"{best.cost.ratio:.3f} x", how))
    return tuple(tiles)


def _front(tuned: Tuned) -> tuple[Figures | Legend | Text, ...]:
    final = [row for row in tuned.rows if row.cost is not None and row.judged is not None]
    marks = [_mark(row, tuned) for row in final]
    chart = scatter(marks, tuned.limit, "loss over latency of the files of the last rung")
    loss = "SQNR, negative, in dB" if tuned.metric == "sqnr" else "loss in points"
    figure = Figure(
        f"Upwards: {loss}; to the right: latency, plain INT8 is 1",
        chart,
        ("The line is the bound. Numbers are those of the table below.",),
    )
    legend = Legend(
        (
            ("threshold", "the chosen file"),
            ("after", "on the Pareto front"),
            ("before", "beaten by another in cost and loss"),
        )
    )
    return legend, Figures((figure,), wide=False)


def _mark(row: Row, tuned: Tuned) -> Mark:
    assert row.cost is not None  # of the rows of `_front`
    assert row.judged is not None
    kind = "after" if row.on_front else "before"
    if row.name == tuned.chosen:
        kind = "threshold"
    number = [other.name for other in tuned.rows].index(row.name) + 1
    return Mark(row.cost.ratio, row.judged.loss, kind, str(number), row.name)


def _table(tuned: Tuned) -> Table:
    columns = (
        Column("candidate", "name"),
        *(Column(title) for title in tuned.titles),
        Column("state", "words"),
    )
    rows = tuple(
        (f"{number}. {row.name}", *tuned.cells(row), row.state)
        for number, row in enumerate(tuned.rows, 1)
    )
    return Table("All candidates, in the order in which they were tried", columns, rows)
