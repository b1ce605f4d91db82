"""Results that print as tables: as text on a terminal, as HTML in a notebook."""

import html
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_WIDTH = 160  # columns, if the output is not a terminal


class Result:
    """Base class of the results of reptrt's functions: prints as tables, converts to JSON values.

    A subclass implements `to_dict`, one of `to_table` and `to_tables`, and `to_lines` if text
    follows the tables.
    """

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        raise NotImplementedError

    def to_table(self) -> Table:
        """Return the result as a table."""
        raise NotImplementedError

    def to_tables(self) -> Sequence[Table]:
        """Return the result as tables."""
        return (self.to_table(),)

    def to_lines(self) -> list[str]:
        """Return the lines of text below the tables."""
        return []

    def __str__(self) -> str:
        tables = [text_of(table) for table in self.to_tables() if table.row_count]
        return "\n".join([*tables, *self.to_lines()])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """Return the result as HTML; notebooks call this."""
        tables = [html_of(table) for table in self.to_tables() if table.row_count]
        lines = html.escape("\n".join(self.to_lines()))
        return "\n".join([*tables, f"<pre>{lines}</pre>"] if lines else tables)


def text_of(table: Table) -> str:
    """Render a table as text, as wide as the terminal or 160 columns wide without a terminal."""
    is_terminal = sys.stdout.isatty()
    console = Console(
        width=None if is_terminal else _WIDTH,
        color_system="auto" if is_terminal else None,
        force_jupyter=False,
        markup=False,
        emoji=False,
        highlight=False,
    )
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip("\n").split("\n"))


def html_of(table: Table) -> str:
    """Render a table as an HTML table whose only style is the alignment of its cells."""
    columns = table.columns
    titles = columns if table.show_header else ()
    head = "".join(_cell("th", column.header, column.justify) for column in titles)
    rows = zip(*(column.cells for column in columns), strict=True)
    body = "".join(
        "<tr>"
        + "".join(_cell("td", c, column.justify) for c, column in zip(row, columns, strict=True))
        + "</tr>"
        for row in rows
    )
    above = [f"<b>{_escaped(table.title)}</b>"] if table.title else []
    below = [f"<small>{_escaped(table.caption)}</small>"] if table.caption else []
    return "\n".join([*above, f"<table><tr>{head}</tr>{body}</table>", *below])


def _cell(tag: str, content: Any, justify: str) -> str:
    return f'<{tag} style="text-align: {justify}">{_escaped(content)}</{tag}>'


def _escaped(content: Any) -> str:
    return html.escape(str(content)).replace("\n", "<br>")
