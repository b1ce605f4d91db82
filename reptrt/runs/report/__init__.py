"""Write a run as one HTML file that needs no network: to read, to print, to send by mail.

    run folder --content--> parts, or why one is missing --results, layers, environment-->
    page --report.html.j2--> report.html

Only files in the run's folder are read, and nothing heavy is computed. The same folder always gives
the same bytes.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from rich.table import Table

from reptrt.core.artifacts import refuse_overwriting, require_folder, write_bytes
from reptrt.core.result import Result
from reptrt.runs.report import detections, environment, layers, results
from reptrt.runs.report.content import AS_RECORDED, RunContent, read_run
from reptrt.runs.report.page import Page, Section

Made = TypeVar("Made")

REPORT_FILE = "report.html"

_STOPPED = (
    "The run was stopped. The report shows what is in the folder; some results may come from an "
    "earlier run with other options."
)

_SECTIONS: tuple[tuple[str, str, Callable[[RunContent], Section]], ...] = (
    ("accuracy", "Accuracy", results.accuracy),
    ("detections", "Detections", detections.detections),
    ("latency", "Latency", results.latency),
    ("weights", "Weight ranges", layers.ranges),
    ("noise", "Signal to noise of each layer", layers.noise),
    ("activations", "Activations and their thresholds", environment.activations),
    ("decisions", "Decisions and their costs", layers.decisions),
    ("learned", "Learned units", layers.learned),
    ("environment", "Environment and hashes", environment.environment),
)


@dataclass(frozen=True, slots=True)
class SectionState:
    """One section of a report."""

    id: str
    title: str
    absent: str | None  # why the section is empty


@dataclass(frozen=True, slots=True, repr=False)
class ReportFile(Result):
    """What `write_report` wrote."""

    path: Path
    sha256: str
    size_bytes: int
    sections: tuple[SectionState, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return asdict(self) | {"path": str(self.path)}

    def to_table(self) -> Table:
        """Return the sections of the report, and why some are empty."""
        table = Table(box=None, pad_edge=False)
        for title in ("section", "state"):
            table.add_column(title, overflow="fold")
        for section in self.sections:
            table.add_row(section.title, section.absent or "there")
        return table

    def to_lines(self) -> list[str]:
        """Return the file and its size."""
        return [f"report  {self.path}  {self.size_bytes / 2**10:.0f} KiB"]


def write_report(folder: Path, output: Path | None = None) -> ReportFile:
    """Write the report of a run, finished or stopped.

    Args:
        folder: the run's folder.
        output: the file to write; None: ``report.html`` in the folder.

    Raises:
        ArtifactError: there is no record of a run, or the file cannot be written.
    """
    path = folder / REPORT_FILE if output is None else output
    run = read_run(folder)
    require_folder(path)
    refuse_overwriting(path, [entry for entry in _inputs(folder) if entry.name != REPORT_FILE])
    page = page_of(run)
    content = render(page).encode()
    write_bytes(path, content)
    states = tuple(SectionState(s.id, s.title, s.absent) for s in page.sections)
    return ReportFile(path, hashlib.sha256(content).hexdigest(), len(content), states)


def page_of(run: RunContent) -> Page:
    """Return the content of the page about a run."""
    notes = [] if run.manifest.finished else [_STOPPED]
    notes += [f"{f.path.name}: {f.state}." for f in run.files if f.state != AS_RECORDED]
    tiles = _guarded(lambda: results.tiles(run))
    return Page(
        title=environment.name_of(run.manifest.source["name"]),
        subtitle=_guarded(lambda: _subtitle(run)),
        notes=tuple(notes),
        tiles=() if isinstance(tiles, str) else tiles,
        sections=tuple(
            _section(run, *entry)
            for entry in _SECTIONS
            if entry[0] != "detections" or detections.is_detector(run)
        ),
    )


def render(page: Page) -> str:
    """Return a page as HTML; all text is escaped."""
    loader = jinja2.PackageLoader("reptrt.runs.report", "")
    templates = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("report.html.j2").render(page=page)


def _section(
    run: RunContent, id: str, title: str, make: Callable[[RunContent], Section]
) -> Section:
    section = _guarded(lambda: make(run))
    return Section(id, title, absent=section) if isinstance(section, str) else section


def _guarded(make: Callable[[], Made]) -> Made | str:
    """Return the result of ``make``, or the reason if a file lacks what reptrt writes into it."""
    try:
        return make()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as err:
        return f"a file is not what reptrt writes ({type(err).__name__}: {err})"


def _subtitle(run: RunContent) -> str:
    """Return one line with bits, recipe, number of images, versions and machine."""
    options, machine = run.manifest.options["calibrate"], run.manifest.machine
    bits = f"W{options['weight_bits']}A{options['activation_bits']}"
    version = run.manifest.versions.get("reptrt", "?")
    return (
        f"{bits}, recipe {options['recipe']}, up to {options['images']} calibration images, "
        f"seed {options['seed']}; reptrt {version} on {machine['cpu']}"
    )


def _inputs(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
