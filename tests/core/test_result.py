from typing import Any

import pytest
from rich.table import Table

from reptrt.core.result import Result, html_of, text_of


class Report(Result):
    def to_dict(self) -> dict[str, Any]:
        return {"a": 1}

    def to_table(self) -> Table:
        table = Table(box=None, pad_edge=False, title="a < b", caption="one\ntwo")
        table.add_column("layer")
        table.add_column("dB", justify="right")
        table.add_row("stage[0]/conv & <bn>", "1.5")
        table.add_row("[bold]head[/bold] :warning:", "-")
        return table

    def to_lines(self) -> list[str]:
        return ["x < y", "done"]


def test_a_result_prints_its_tables_and_lines() -> None:
    lines = str(Report()).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["layer", "dB"],
        ["stage[0]/conv", "&", "<bn>", "1.5"],
        ["[bold]head[/bold]", ":warning:", "-"],
    ]
    assert lines[-2:] == ["x < y", "done"]
    assert repr(Report()) == str(Report())


def test_a_notebook_gets_escaped_html() -> None:
    html = Report()._repr_html_()
    assert '<td style="text-align: left">stage[0]/conv &amp; &lt;bn&gt;</td>' in html
    assert '<th style="text-align: right">dB</th>' in html
    assert "<b>a &lt; b</b>" in html
    assert "<small>one<br>two</small>" in html
    assert html.endswith("<pre>x &lt; y\ndone</pre>")
    assert html.count("<tr>") == html.count("</tr>") == 3


def test_a_table_without_rows_is_left_out() -> None:
    class Empty(Report):
        def to_table(self) -> Table:
            return Table("layer")

    assert str(Empty()) == "x < y\ndone"
    assert Empty()._repr_html_() == "<pre>x &lt; y\ndone</pre>"


def test_a_table_without_a_header_has_none_in_html() -> None:
    table = Table(show_header=False)
    table.add_row("images", "512")
    assert "<th" not in html_of(table)
    assert "512" in html_of(table)


def test_text_into_a_file_is_160_columns_wide_and_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    table = Table(box=None)
    table.add_column("x")
    table.add_row("y" * 150)
    assert text_of(table).split() == ["x", "y" * 150]
