"""The elements of a page; the template turns them into HTML and escapes all plain text."""

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from markupsafe import Markup

Cell: TypeAlias = str | Markup  # Markup is a chart of `reptrt.runs.report.charts`, nothing else
Kind = Literal["name", "text", "words", "number", "chart", "code"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table."""

    title: str
    kind: Kind = "number"
    axis: Markup | None = None  # ticks under the title


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells."""

    block: ClassVar[str] = "table"  # for the template

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Figure:
    """One chart with a title above and lines of text below."""

    title: str
    chart: Markup
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Figures:
    """Charts side by side, as many in a row as the page is wide."""

    block: ClassVar[str] = "figures"  # for the template

    figures: tuple[Figure, ...]
    wide: bool = False  # pictures, which need the space of two charts


@dataclass(frozen=True, slots=True)
class Legend:
    """The meaning of marks, as pairs of a style sheet class and a text."""

    block: ClassVar[str] = "legend"  # for the template

    entries: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    block: ClassVar[str] = "text"  # for the template

    text: str


Block: TypeAlias = Table | Figures | Legend | Text


@dataclass(frozen=True, slots=True)
class Section:
    """One section of the page, or the reason why it is empty."""

    id: str
    title: str
    blocks: tuple[Block, ...] = ()
    absent: str | None = None


@dataclass(frozen=True, slots=True)
class Tile:
    """One number of the summary."""

    title: str
    value: str
    detail: str


@dataclass(frozen=True, slots=True)
class Page:
    """The whole report."""

    title: str
    subtitle: str
    notes: tuple[str, ...]  # what the reader has to know about the state of the run
    tiles: tuple[Tile, ...]
    sections: tuple[Section, ...]

    @property
    def has_pictures(self) -> bool:
        """Whether a section shows images, which the page's policy has to allow."""
        blocks = (block for section in self.sections for block in section.blocks)
        return any(isinstance(block, Figures) and block.wide for block in blocks)


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with some significant digits, or a dash.

    >>> number(0.123456), number(1234567.0), number(None)
    ('0.1235', '1.235e+06', '-')
    """
    return "-" if value is None else f"{value:.{digits}g}"


def decibels(value: float | None) -> str:
    """Return a ratio in dB, or a dash."""
    return "-" if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    """Return a fraction in percent, or a dash."""
    return "-" if value is None else f"{100 * value:.2f} %"


def size(num_bytes: int | None) -> str:
    """Return a number of bytes with a fitting unit.

    >>> size(120_000), size(423), size(None)
    ('117 KiB', '423 B', '-')
    """
    if num_bytes is None:
        return "-"
    if num_bytes < 2**10:
        return f"{num_bytes} B"
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.0f} KiB"
