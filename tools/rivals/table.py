"""The results of one net as a Markdown table, and the best row of each column."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rivals.measure import Result

from reptrt.judge.tasks.protocol import change_text

_JITTER = 0.05  # relative difference of latencies of equal graphs between runs
_NAMES = 0.01  # relative difference of file sizes that comes from the lengths of node names


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its title, its text, and its value if rows can be ranked by it."""

    title: str
    text: Callable[[Result], str]
    value: Callable[[Result], float | None] | None = None
    more_is_better: bool = False
    margin: float = 0.0  # relative difference up to which two rows are equal
    is_accuracy: bool = False  # of a task that the net may not have


def _number(form: str, value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def _top1(result: Result) -> str:
    """Return top-1 and its standard error, that of a share of so many images."""
    if result.top1 is None:
        return ""
    error = math.sqrt(result.top1 * (1 - result.top1) / (result.images or 1))
    return f"{100 * result.top1:.2f} ± {100 * error:.2f} %"


def _change(title: str, of: Callable[[Result], Mapping[str, float] | None]) -> Column:
    """Return the column of a change to the float net with its paired interval."""

    def text(result: Result) -> str:
        change = of(result)
        return "" if change is None else change_text(change)

    return Column(title, text, is_accuracy=True)


def _ratio(result: Result, batch: int) -> float | None:
    return None if result.ratios is None else result.ratios[str(batch)][0]


def _accuracy(
    title: str, text: Callable[[float | None], str], value: Callable[[Result], float | None]
) -> Column:
    return Column(title, lambda result: text(value(result)), value, True, is_accuracy=True)


def columns(batches: Sequence[int]) -> list[Column]:
    """Return the columns of the table."""
    return [
        Column("top-1", _top1, lambda r: r.top1, True, is_accuracy=True),
        _change("change (95 %)", lambda r: r.top1_change),
        _accuracy("agreement", _percent, lambda r: r.agreement),
        _accuracy("mAP", lambda v: _number(".2f", None if v is None else 100 * v), lambda r: r.map),
        _change("change of mAP (95 %)", lambda r: r.map_change),
        _accuracy("SQNR dB", lambda v: _number(".2f", v), lambda r: r.sqnr_db),
        Column("seconds", lambda r: _number(".1f", r.seconds), lambda r: r.seconds),
        Column("peak MiB", lambda r: _number(".0f", r.peak_rss_mib), lambda r: r.peak_rss_mib),
        Column("KiB", lambda r: _number(".0f", r.kib), lambda r: r.kib, margin=_NAMES),
        Column("nodes", lambda r: _number("d", r.nodes), lambda r: r.nodes),
        Column("INT8 layers", lambda r: "" if r.layers is None else f"{r.int8_layers}/{r.layers}"),
        *(
            Column(
                f"latency, batch {batch}",
                lambda r, b=batch: _number(".2f", _ratio(r, b)),
                lambda r, b=batch: _ratio(r, b),
                margin=_JITTER,
            )
            for batch in batches
        ),
        Column("lint errors", lambda r: _number("d", r.lint_errors)),
    ]


def table(results: Sequence[Result], batches: Sequence[int]) -> list[str]:
    """Return the lines of the table; marks and failures are footnotes below it.

    Accuracy that no result has is left out.
    """
    shown = [
        column
        for column in columns(batches)
        if not column.is_accuracy or any(map(column.text, results))
    ]
    lines = ["| | " + " | ".join(column.title for column in shown) + " |"]
    lines.append("|---" * (len(shown) + 1) + "|")
    notes: dict[str, int] = {}
    for result in results:
        note = f"failed: {result.why}" if result.why else result.mark
        number = f" ({notes.setdefault(note, len(notes) + 1)})" if note else ""
        cells = " | ".join(column.text(result) for column in shown)
        lines.append(f"| {result.title}{number} | {cells} |")
    return [*lines, "", *(f"({number}) {note}." for note, number in notes.items())]


def firsts(results: Sequence[Result], batches: Sequence[int]) -> list[dict[str, object]]:
    """Return, for each column, the best of our rows and the best of the rivals' rows.

    Only files that TensorRT accepts are compared: rows without a failure or lint errors.
    """
    fit = [result for result in results if result.why is None and not result.lint_errors]
    best_rows: list[dict[str, object]] = []
    for column in columns(batches):
        ours = _best([r for r in fit if not r.is_rival], column)
        rival = _best([r for r in fit if r.is_rival], column)
        if ours is None or rival is None:
            continue
        (mine, our_row), (other, their_row) = ours, rival
        lead = (other - mine if column.more_is_better else mine - other) / (abs(mine) or 1.0)
        best_rows.append(
            {
                "column": column.title,
                "ours": [our_row.title, column.text(our_row)],
                "rival": [their_row.title, column.text(their_row)],
                "rival_is_first": lead > column.margin,
            }
        )
    return best_rows


def _best(results: Sequence[Result], column: Column) -> tuple[float, Result] | None:
    if column.value is None:
        return None
    pairs = [(column.value(result), result) for result in results]
    valued = [(value, result) for value, result in pairs if value is not None]
    if not valued:
        return None
    pick = max if column.more_is_better else min
    return pick(valued, key=lambda pair: pair[0])
