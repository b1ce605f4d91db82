"""What a sweep found: what is printed, and the content of ``sweep.json``.

Nothing in ``sweep.json`` depends on when, where or in how many attempts it was found: the same
inputs, options and versions give the same bytes. Seconds and machines are in the records of the
store.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from reptrt.core.result import Result

RECORD_FILE, REPORT_FILE = "sweep.json", "report.html"


@dataclass(slots=True)
class Row:
    """One trial."""

    name: str
    net: str
    target: str
    recipe: str
    variant: str | None
    state: str = "to do"  # "finished", or "failed: ..."
    sha256: str | None = None  # of the INT8 file
    file: str | None = None  # where it is in the store
    bytes: int | None = None
    modelled: float | None = None  # time by the model of the target / that of the float net
    simulation: str | None = None  # why no engine can run it
    lint: Mapping[str, int] | None = None  # findings by severity, of files for TensorRT
    judged: Mapping[str, Any] | None = None  # measures of float net and file
    engines: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # GPU -> what was built
    options: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None  # of calibration and eval, whenever they were done

    @property
    def is_finished(self) -> bool:
        """Whether it has a result."""
        return self.state == "finished"

    @property
    def sqnr_db(self) -> float | None:
        """SQNR of the outputs; None: unknown, or all are equal."""
        return None if self.judged is None else self.judged["int8"]["sqnr_db"]

    @property
    def change(self) -> float | None:
        """Change of the task's measure against the float net, in points."""
        change = None if self.judged is None else self.judged["change"]
        return None if change is None else 100 * change

    def cell(self, title: str, index: int = 1) -> str:
        """Return a column of the task for the file (1) or the float net (0)."""
        cells = [] if self.judged is None else self.judged["cells"]
        return next((cell[1 + index] for cell in cells if cell[0] == title), "")


@dataclass(frozen=True, slots=True, repr=False)
class Swept(Result):
    """All trials of a sweep."""

    folder: Path
    store: str
    rows: tuple[Row, ...]
    nets: Mapping[str, Mapping[str, Any]]  # net -> source, float net, images
    versions: Mapping[str, str]
    kept: int  # trials that were finished before
    seconds: float  # of this sweep
    retried: int = 0  # trials whose worker died

    @property
    def failed(self) -> tuple[Row, ...]:
        """The trials that failed."""
        return tuple(row for row in self.rows if row.state.startswith("failed"))

    @property
    def is_complete(self) -> bool:
        """Whether no trial and no engine has failed."""
        states = (made["state"] for row in self.rows for made in row.engines.values())
        return not self.failed and not any(state.startswith("failed") for state in states)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``sweep.json``."""
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            del row["seconds"]
        return {
            "format": 1,
            "nets": {name: dict(net) for name, net in self.nets.items()},
            "rows": rows,
            "versions": dict(self.versions),
        }

    @property
    def titles(self) -> tuple[str, ...]:
        """The titles of `cells`."""
        return (*self.task_titles, "change, points", "SQNR dB", "MiB", "time / float", "lint")

    @property
    def task_titles(self) -> tuple[str, ...]:
        """The columns of the tasks of all nets."""
        found = (cell[0] for row in self.rows if row.judged for cell in row.judged["cells"])
        return tuple(dict.fromkeys(found))

    def cells(self, row: Row) -> tuple[str, ...]:
        """Return the numbers of a trial as text."""
        lint = row.lint
        return (
            *(row.cell(title) for title in self.task_titles),
            "-" if row.change is None else f"{row.change:+.2f}",
            "-" if row.sqnr_db is None else f"{row.sqnr_db:.2f}",
            "-" if row.bytes is None else f"{row.bytes / 2**20:.2f}",
            "-" if row.modelled is None else f"{row.modelled:.3f}",
            "-" if lint is None else f"{lint['error']} E {lint['warning']} W",
        )

    def to_table(self) -> Table:
        """Return the trials."""
        table = Table(box=None, pad_edge=False)
        table.add_column("trial", overflow="fold")
        for title in self.titles:
            table.add_column(title, justify="right", no_wrap=True)
        for title in ("seconds", "state"):
            table.add_column(title, justify="right" if title == "seconds" else "left")
        for row in self.rows:
            seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
            table.add_row(row.name, *self.cells(row), seconds, row.state)
        return table

    def to_lines(self) -> list[str]:
        """Return what became of the trials, and where everything is."""
        finished = sum(row.is_finished for row in self.rows)
        line = (
            f"{finished} of {len(self.rows)} trials are finished, {self.kept} of them before; "
            f"{len(self.failed)} failed; {self.seconds:.1f} s"
        )
        if self.retried:
            line += f"; {self.retried} started again after a worker died"
        lines = [
            f"{row.name}: engine for {gpu}: {made['state']}"
            for row in self.rows
            for gpu, made in row.engines.items()
        ]
        where = f"{self.folder / RECORD_FILE}  {self.folder / REPORT_FILE}"
        return [*lines, line, f"sweep  {where}  {self.store}"]
